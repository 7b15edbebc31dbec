"""What every reader of a raw set hands out: good rows and bad rows in the order of the files."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class RawRow(NamedTuple):
    """One image and all its captions.

    Attributes:
        image: path of a file, or the encoded bytes (archives, Parquet, hub).
        captions: as the file has them, not cleaned; () in annotated sets.
        image_id: the same photo has the same id in every set: "coco 458752", "flickr 1000092795", "vg 2343".
        split: "train", "val" or "test"; "pictures" in annotated sets.
        origin: names the row in messages: file:line, `file image 12 (name.jpg)`, shard.tar!000001.jpg.
        name: in annotated sets the path relative to the raw folder, by which readers of tasks find the image.
    """

    image: str | bytes
    captions: tuple[str, ...]
    image_id: str
    split: str
    origin: str
    name: str = ""


class BadRow(NamedTuple):
    """A row that the reader itself cannot use; handed out in sequence with the good ones.

    Attributes:
        reason: short key to count by.
        origin: as of `RawRow`.
        message: one line: what is wrong with it.
        split: as of `RawRow`, as far as known ("train" where not).
    """

    reason: str
    origin: str
    message: str
    split: str


class Facts(NamedTuple):
    """Facts about a set, as published.

    Attributes:
        title: its full name.
        images, captions: counts to compare with; None where unknown. Where the set is in the paper's 4-M mix, the
            counts of that mix.
        licence: one line.
    """

    title: str
    images: int | None
    captions: int | None
    licence: str


class RawSet(ABC):
    """A set as it is distributed.

    A reader of your own is a class of this kind: `maskvlm data acme.birds.Birds raw=FOLDER name=birds`.

    Args:
        raw: its folder or file.
        name: the set's, starts the ids.

    Attributes:
        path: `raw` as a path.
        facts: its title, published counts, licence.
        annotations: files to copy beside the images (vqav2, nlvr2, snli_ve, daquar, nlvr_pairs).
        notes: one line each about the set as a whole, complete when all rows were read: how images were found,
            how many img2dataset asked for and got.
    """

    facts: Facts
    # values of the class: a reader assigns lists of its own, and does not append to these
    annotations: list[Path] = []
    notes: list[str] = []

    def __init__(self, raw: str, name: str) -> None:
        self.path, self.name = Path(raw), name

    @abstractmethod
    def rows(self) -> Iterator[RawRow | BadRow]:
        """Good and bad rows in a deterministic order; cheap: files of images are not opened here.

        Raises:
            UserError: the set as a whole cannot be read.
        """
