"""What an evaluation suite is: a reader, items, the model's scores of them, metrics with their chance levels.

A suite of your own is one class of this kind, named by its path: `maskvlm suite acme.birds.BirdPairs from=...`.
"""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from maskvlm.data.caption_text import clean_caption
from maskvlm.data.files import image_folder, load_json
from maskvlm.data.images import BadImage
from maskvlm.data.raw.captions import ImagesByName
from maskvlm.data.raw.coco_flickr import find_file, no_files
from maskvlm.data.raw.lines import text_lines
from maskvlm.data.safe_open import content_of
from maskvlm.suites.scores import WAYS, pair_scores
from maskvlm.utils.errors import ExitCode, UserError

if TYPE_CHECKING:
    from maskvlm.inference.pretrained import PretrainedMaskVLM

MAX_FILE_BYTES = 500_000_000
"""Largest size of a suite's JSON file, in bytes; the captions of COCO train2014 have 67 MB."""


class SuiteItem(NamedTuple):
    """One question of a suite.

    Attributes:
        images: of it, most often one: the path of a file, or encoded bytes.
        texts: what is compared with them.
        truth: what is true, as the suite's `metrics` reads it.
        kind: metrics are also given by kind; "" where a suite has none.
        origin: names it in messages and in scores.jsonl.
        image_ids: of the images, as in every set of this project ("coco 397133", "flickr 1000092795").
        box: left, top, right and bottom in pixels of the only part of the image that is looked at; None for all of it.
    """

    images: tuple[str | bytes, ...]
    texts: tuple[str, ...]
    truth: Any
    kind: str
    origin: str
    image_ids: tuple[str, ...] = ()
    box: tuple[int, int, int, int] | None = None


class SuiteMetric(NamedTuple):
    """A figure of a suite.

    Attributes:
        value: percent, except where the name says otherwise.
        chance: what a model that knows nothing would get; None where that is not defined.
        items: that it is of (or judgements of them).
        interval: 95 %, by what the suite says; None where there is none.
    """

    name: str
    value: float
    chance: float | None
    items: int
    interval: tuple[float, float] | None = None


class Suite(ABC):
    """An evaluation suite.

    Its constructor's arguments are its options: `add_options` says them to the command line under the same names.

    Attributes:
        question: what it asks, in a line.
        licence: of its files and images, as far as known.
        traps: what its figures do not say, one line each.
        ways: how the model can be asked (see `scores.WAYS`), the usual first.
        whole: every item is needed, since they are ranked among each other: no subset, and no item without its image.
    """

    question: ClassVar[str]
    licence: ClassVar[str]
    traps: ClassVar[tuple[str, ...]]
    ways: ClassVar[tuple[str, ...]] = WAYS
    whole: ClassVar[bool] = False

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Options of this suite alone; none as it comes."""
        return

    @abstractmethod
    def read(self, path: Path, images: Path | None) -> "ItemRows":
        """The items of the suite's files; images are not opened here.

        Args:
            path: the folder (or file) of the suite as it is distributed.
            images: the folder of its images; None for `images/` in `path`, or else `path`.

        Raises:
            UserError: the files are not there, or none of this form.
        """

    def ask(self, model: "PretrainedMaskVLM", items: Sequence[SuiteItem], way: str) -> Sequence[Any]:
        """The model's scores of each item, higher is better: as it comes one for each text with the item's image; []
        where an item cannot be asked so."""
        return pair_scores(model, items, way)

    @abstractmethod
    def metrics(self, items: Sequence[SuiteItem], scores: Sequence[Any], way: str) -> list[SuiteMetric]:
        """Figures out of what `ask` gave, for items that have scores; the first is the suite's own headline."""


class ItemRows:
    """The items of a suite, as its reader finds them; rows that cannot be used are counted and listed.

    Args:
        path: the folder (or file) of the suite.
        images: as of `Suite.read`.

    Attributes:
        items: the good ones.
        skipped: reason -> the others, a message each.
        files: that were read, for the record.
        notes: one line each about the files as a whole.
        ids_known: False where the items' image ids cannot be those that training kept, as the name of the prepared set
            begins them and is not known.
    """

    ids_known = True

    def __init__(self, path: Path, images: Path | None) -> None:
        if not path.exists():
            raise UserError(path, "no such file or folder", "Name the suite's folder", ExitCode.MISSING_INPUT)
        self.path = path
        self.items: list[SuiteItem] = []
        self.skipped: dict[str, list[str]] = {}
        self.files: list[Path] = []
        self.notes: list[str] = []
        self.folder = image_folder(images, path if path.is_dir() else path.parent, "--images")
        self._images = ImagesByName(self.folder)

    def skip(self, reason: str, message: str) -> None:
        """Count and list a row that cannot be used."""
        self.skipped.setdefault(reason, []).append(message)

    @contextmanager
    def row(self) -> Iterator[None]:
        """A row whose mistakes leave out that row alone."""
        try:
            yield
        except UserError as error:
            self.skip(getattr(error, "reason", "malformed row"), str(error))

    def file(self, *names: str) -> Path:
        """The first of these files that is there. Raises UserError (66): none is; (77): it is a link that leads out."""
        path = find_file(self.path, *names)
        if path is None:
            raise no_files(self.path, *names)
        self.files.append(path)
        return path

    def json_file(self, *names: str) -> tuple[Path, Any]:
        """The first of these files that is there, and its content. Raises UserError as `file` and `load_json`."""
        file = self.file(*names)
        return file, load_json(content_of(file, MAX_FILE_BYTES), file)

    def lines(self, *names: str) -> Iterator[tuple[str, str]]:
        """(file:line, text) of the first of these files that is there; blank and damaged lines are left out, the latter
        counted."""
        file = self.file(*names)
        for line in text_lines(file):
            where = f"{file}:{line.number}"
            if line.problem:
                self.skip(line.problem[0], f"{where}: {line.problem[1]}")
            elif line.text.strip():
                yield where, line.text

    def image(self, name: str, where: str) -> str:
        """The path of an image, anywhere in the folder of images. Raises BadImage."""
        path, problem = self._images.find(name)
        if problem:
            raise BadImage(where, problem[0], problem[1])
        return path


def plain_text(value: object, key: str, where: str) -> str:
    """A text of a file, cleaned as captions are in training. Raises UserError where there is no word in it."""
    text = clean_caption(value)[0] if isinstance(value, str) else ""
    if not text:
        what = f"'{key}' is no text" if not isinstance(value, str) else f"'{key}' holds no word"
        raise UserError(where, what, "Mend or remove the row", ExitCode.BAD_DATA)
    return text
