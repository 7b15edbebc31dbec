"""The interface of readers of raw sets: good and bad rows in the order of the files."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

from maskvlm.utils.errors import UserError


class RawRow(NamedTuple):
    """One image and all its captions.

    Attributes:
        image: path of a file, or the encoded bytes (archives, Parquet, hub).
        captions: as in the file, not cleaned; () in annotated sets.
        image_id: the same photo has the same id in every set: "coco 458752", "flickr 1000092795", "vg 2343".
        split: "train", "val" or "test"; "pictures" in annotated sets.
        origin: names the row in messages: file:line, `file image 12 (name.jpg)`, shard.tar!000001.jpg.
        name: in annotated sets, the path by which tasks find the image: relative to `images/` in the raw folder, or to
            the raw folder if there is no `images/`.
    """

    image: str | bytes
    captions: tuple[str, ...]
    image_id: str
    split: str
    origin: str
    name: str = ""


class BadRow(NamedTuple):
    """A row that the reader cannot use; returned in order among the good ones.

    Attributes:
        reason: short key to count by.
        origin: as in `RawRow`.
        message: one line on what is wrong with it.
        split: as in `RawRow`, if known; else "train".
    """

    reason: str
    origin: str
    message: str
    split: str


class Facts(NamedTuple):
    """Facts about a set, as published.

    Attributes:
        title: full name of the set.
        images, captions: published counts for comparison; None if unknown. For sets in the paper's 4-M mix, the counts
            of that mix.
        licence: one line.
    """

    title: str
    images: int | None
    captions: int | None
    licence: str


class RawSet(ABC):
    """A data set as distributed.

    Subclass this to write your own reader: `maskvlm data acme.birds.Birds raw=FOLDER name=birds`.

    Args:
        raw: folder or file of the set.
        name: name of the set; prefix of the ids.

    Attributes:
        path: `raw` as a path.
        facts: title, published counts, licence.
        annotations: files to copy next to the images (vqav2, nlvr2, snli_ve, daquar, nlvr_pairs).
        notes: lines on the set as a whole, complete once all rows are read: how images were found, how many
            img2dataset requested and received.
    """

    facts: Facts
    # class attributes: a reader assigns its own lists and must not append to these
    annotations: list[Path] = []
    notes: list[str] = []

    def __init__(self, raw: str, name: str) -> None:
        self.path, self.name = Path(raw), name

    @abstractmethod
    def rows(self) -> Iterator[RawRow | BadRow]:
        """Good and bad rows in a deterministic order; cheap, as image files are not opened here.

        Raises:
            UserError: the set as a whole cannot be read.
        """


def checked_rows(reader: RawSet) -> Iterator[RawRow | BadRow]:
    """The rows of a reader, which may be of another package and give anything.

    Raises:
        UserError: it gives no rows, a row of another class, or one whose fields are of other types (2).
    """
    where = f"{type(reader).__module__}.{type(reader).__qualname__}.rows"
    given: Any = reader.rows()
    try:
        rows: Iterator[Any] = iter(given)
    except TypeError:
        todo = "Yield the rows, each a RawRow or a BadRow"
        raise UserError(where, f"gave a {type(given).__name__}", todo) from None
    for row in rows:
        if not isinstance(row, RawRow | BadRow):
            raise UserError(where, f"gave a {type(row).__name__}", "Yield a RawRow or a BadRow")
        if isinstance(row, RawRow):
            if isinstance(row.image, PathLike):
                row = row._replace(image=fspath(row.image))
            for name, kinds in (("image", (str, bytes)), ("image_id", (str,)), ("split", (str,)), ("origin", (str,))):
                value: object = getattr(row, name)
                if not isinstance(value, kinds):
                    todo = f"Give {' or '.join(kind.__name__ for kind in kinds)}"
                    raise UserError(where, f"gave {name} as a {type(value).__name__} in {row.origin!s:.80}", todo)
        yield row
