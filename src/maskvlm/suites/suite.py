"""What an evaluation suite is: a reader, items, the model's scores of them, and metrics with their chance levels.

A custom suite is a subclass of `Suite`, named by its class path: `maskvlm suite acme.birds.BirdPairs from=...`.
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
"""Largest size of a suite's JSON file, in bytes; the captions of COCO train2014 take 67 MB."""


class SuiteItem(NamedTuple):
    """One item of a suite.

    Attributes:
        images: its images, usually one: file paths or encoded bytes.
        texts: the texts to compare with the images.
        truth: the ground truth, in the form that the suite's `metrics` expects.
        kind: a category, for which metrics are also reported; "" if the suite has none.
        origin: identifies the item in messages and in scores.jsonl.
        image_ids: ids of the images, as in every set of this project ("coco 397133", "flickr 1000092795").
        box: left, top, right and bottom in pixels of the part of the image to use; None for the whole image.
    """

    images: tuple[str | bytes, ...]
    texts: tuple[str, ...]
    truth: Any
    kind: str
    origin: str
    image_ids: tuple[str, ...] = ()
    box: tuple[int, int, int, int] | None = None


class SuiteMetric(NamedTuple):
    """A metric of a suite.

    Attributes:
        value: percent, unless the name says otherwise.
        chance: chance level; None if it is not defined.
        items: number of items (or of judgements of them) that it covers.
        interval: 95 % interval, computed as the suite says; None if there is none.
    """

    name: str
    value: float
    chance: float | None
    items: int
    interval: tuple[float, float] | None = None


class Suite(ABC):
    """An evaluation suite.

    Its constructor's arguments are its options: `add_options` adds them to the command line under the same names.

    Attributes:
        question: what it tests, in one line.
        licence: licence of its files and images, as far as known.
        traps: limits and pitfalls of its metrics, one line each.
        ways: how the model can score items (see `scores.WAYS`), the default first.
        whole: every item is needed, since all are ranked together: no subset, and no item without its image.
    """

    question: ClassVar[str]
    licence: ClassVar[str]
    traps: ClassVar[tuple[str, ...]]
    ways: ClassVar[tuple[str, ...]] = WAYS
    whole: ClassVar[bool] = False

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Add the suite's own options to the parser; none by default."""
        return

    @abstractmethod
    def read(self, path: Path, images: Path | None) -> "ItemRows":
        """Read the items from the suite's files; images are not opened here.

        Args:
            path: the folder (or file) of the suite as distributed.
            images: the folder of its images; None for `images/` in `path`, or else `path`.

        Raises:
            UserError: the files are missing or have another format.
        """

    def ask(self, model: "PretrainedMaskVLM", items: Sequence[SuiteItem], way: str) -> Sequence[Any]:
        """The model's scores of each item, higher is better: by default one for each text with the item's image; []
        if an item cannot be scored this way."""
        return pair_scores(model, items, way)

    @abstractmethod
    def metrics(self, items: Sequence[SuiteItem], scores: Sequence[Any], way: str) -> list[SuiteMetric]:
        """Metrics from the scores of `ask`, for the items that have scores; the first is the suite's headline."""


class ItemRows:
    """The items of a suite, collected by its reader; rows that cannot be used are counted and listed.

    Args:
        path: the folder (or file) of the suite.
        images: as in `Suite.read`.

    Attributes:
        items: the usable items.
        skipped: reason -> messages, one for each row left out.
        files: the files read, for the record.
        notes: remarks about the files as a whole, one line each.
        ids_known: False if the items' image ids cannot be matched with those that training stored, as these start with
            the name of the prepared set, which is unknown.
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
        """Record a row that cannot be used, with the reason and a message."""
        self.skipped.setdefault(reason, []).append(message)

    @contextmanager
    def row(self) -> Iterator[None]:
        """Context in which a UserError skips the current row only."""
        try:
            yield
        except UserError as error:
            self.skip(getattr(error, "reason", "malformed row"), str(error))

    def file(self, *names: str) -> Path:
        """The first of these files that exists. Raises UserError: none does (66), it links out of the folder (77)."""
        path = find_file(self.path, *names)
        if path is None:
            raise no_files(self.path, *names)
        self.files.append(path)
        return path

    def json_file(self, *names: str) -> tuple[Path, Any]:
        """The first of these files that exists, and its content. Raises UserError as `file` and `load_json`."""
        file = self.file(*names)
        return file, load_json(content_of(file, MAX_FILE_BYTES), file)

    def lines(self, *names: str) -> Iterator[tuple[str, str]]:
        """(file:line, text) of the first of these files that exists. Blank and damaged lines are left out; the damaged
        ones are counted."""
        file = self.file(*names)
        for line in text_lines(file):
            where = f"{file}:{line.number}"
            if line.problem:
                self.skip(line.problem[0], f"{where}: {line.problem[1]}")
            elif line.text.strip():
                yield where, line.text

    def image(self, name: str, where: str) -> str:
        """The path of an image, found anywhere in the folder of images. Raises BadImage."""
        path, problem = self._images.find(name)
        if problem:
            raise BadImage(where, problem[0], problem[1])
        return path


def plain_text(value: object, key: str, where: str) -> str:
    """A text from a file, cleaned like captions in training. Raises UserError if it is not a string or has no word."""
    text = clean_caption(value)[0] if isinstance(value, str) else ""
    if not text:
        what = f"'{key}' is not text" if not isinstance(value, str) else f"'{key}' has no words"
        raise UserError(where, what, "Fix or remove the row", ExitCode.BAD_DATA)
    return text
