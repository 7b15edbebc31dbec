"""The pointing game (Zhang et al. 2018) on Flickr30k Entities (Plummer et al. 2017): does the map of `explain` peak on
the object that a phrase names?"""

import argparse
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from maskvlm.data.inputs import open_image
from maskvlm.data.raw.captions import flickr_id
from maskvlm.data.raw.lines import read_text
from maskvlm.data.safe_open import check_below
from maskvlm.suites.metrics import percent_right
from maskvlm.suites.suite import ItemRows, Suite, SuiteItem, SuiteMetric, plain_text
from maskvlm.utils.errors import ExitCode, UserError

if TYPE_CHECKING:
    from maskvlm.inference.pretrained import PretrainedMaskVLM

PHRASE = re.compile(r"\[/EN#(\d+)((?:/[a-z]+)+) ([^\]]+)\]")
MAX_XML_BYTES = 1_000_000
TODO = "Use the file as published"
Box = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of the image's width and height, 0 to 1."""


class Boxed(NamedTuple):
    """A phrase of a caption and the boxes of the objects that it names."""

    phrase: str
    boxes: tuple[Box, ...]


class Pointing(Suite):
    """Phrases with boxes from the captions of a split.

    Args:
        split: list of photos beside the folders: `test` for test.txt; `all` for every photo.
    """

    question = "whether the map of a masked phrase peaks within a box of what it names"
    licence = "see its page; photos under Flickr's terms of use, non-commercial research and education only"
    ways = ("explain",)
    traps = (
        "Boxes are large: the middle of the image alone hits many (`the middle of the image`), far more than a random "
        "point, which is the chance level here.",
        "The peak is the middle of one patch; the original takes a pixel, with 15 pixels of tolerance, which are not "
        "given here.",
        "The phrase is masked as a whole, and the map is of how it is filled in: of a phrase that the model would not "
        "have said, it tells little.",
        "Phrases for which the annotators drew no box (scenes, what cannot be seen) are not asked.",
    )

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--split", default="test", help="list of photos: test stands for test.txt; or all (default: %(default)s)"
        )

    def __init__(self, split: str = "test") -> None:
        self.split = split

    def read(self, path: Path, images: Path | None) -> ItemRows:
        rows = ItemRows(path, images)
        sentences, annotations = (_folder(path, name) for name in ("Sentences", "Annotations"))
        if self.split == "all":
            names = sorted(file.stem for file in sentences.glob("*.txt"))
        else:
            names = [line.strip() for _, line in rows.lines(f"{self.split}.txt")]
        for name in names:
            with rows.row():
                self._photo(rows, name, sentences / f"{name}.txt", annotations / f"{name}.xml")
        return rows

    def _photo(self, rows: ItemRows, name: str, sentences: Path, annotations: Path) -> None:
        check_below(sentences, rows.path)
        image = rows.image(f"{name}.jpg", str(sentences))
        text, problem = read_text(sentences)
        if problem:
            raise UserError(sentences, problem[1], TODO, ExitCode.BAD_DATA)
        boxes = read_boxes(annotations, rows.path)
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{sentences}:{number}"
            for match in PHRASE.finditer(line):
                chain, kind, phrase = match.groups()
                if chain in boxes:
                    with rows.row():
                        caption = plain_text(PHRASE.sub(r"\3", line), "the caption", where)
                        # `explain` takes words, and uses their first occurrence.
                        if len(re.findall(rf"\b{re.escape(phrase)}\b", caption, re.IGNORECASE)) > 1:
                            rows.skip("phrase stands there twice", f"{where}: '{phrase}'")
                            continue
                        truth = Boxed(plain_text(phrase, "the phrase", where), boxes[chain])
                        ids = (flickr_id(name),)
                        rows.items.append(SuiteItem((image,), (caption,), truth, kind.strip("/"), where, ids))

    def ask(self, model: "PretrainedMaskVLM", items: Sequence[SuiteItem], way: str) -> list[list[float]]:
        """Peaks of the attention and Grad-CAM maps: x, y, x, y, as fractions of the image; [] if the phrase is beyond
        the part of the text that the model reads; -1, -1 for a map without a peak."""
        peaks: list[list[float]] = []
        for item in items:
            try:
                explanation: Any = model.explain(open_image(item.images[0]), item.texts[0], item.truth.phrase)
            except UserError as error:
                if error.where != "word":
                    raise
                peaks.append([])
                continue
            peaks.append([*peak(explanation.attention), *peak(explanation.gradcam)])
        return peaks

    def metrics(self, items: Sequence[SuiteItem], scores: Sequence[Any], way: str) -> list[SuiteMetric]:
        images = [item.images[0] for item in items]
        chance = 100 * sum(covered_share(item.truth.boxes) for item in items) / max(1, len(items))
        figures = []
        for name, first in (("attention", 0), ("Grad-CAM", 2)):
            right = [
                inside(each[first : first + 2], item.truth.boxes) for each, item in zip(scores, items, strict=True)
            ]
            figures.append(percent_right(f"{name} peaks within a box", right, chance, images))
        middle = [inside((0.5, 0.5), item.truth.boxes) for item in items]
        figures.append(percent_right("the middle of the image", middle, chance, images))
        return figures


def peak(map_RC: Any) -> tuple[float, float]:
    """x and y of the centre of the patch with the highest value, as fractions of the image. If no single patch has it,
    as in a map of zeros: -1, -1, which is in no box."""
    rows, columns = map_RC.shape
    if (map_RC == map_RC.max()).sum() != 1:
        return -1.0, -1.0
    row, column = divmod(int(map_RC.argmax()), columns)
    return (column + 0.5) / columns, (row + 0.5) / rows


def inside(point: Sequence[float], boxes: Sequence[Box]) -> bool:
    """Whether a point is in one of the boxes, edges included."""
    return any(left <= point[0] <= right and top <= point[1] <= bottom for left, top, right, bottom in boxes)


def covered_share(boxes: Sequence[Box]) -> float:
    """Fraction of the image that the boxes cover together: their edges divide it into cells, each inside or outside."""
    xs, ys = ({0.0, 1.0, *(box[side] for box in boxes for side in sides)} for sides in ((0, 2), (1, 3)))
    across, down = sorted(xs), sorted(ys)
    share = 0.0
    for left, right in pairwise(across):
        for top, bottom in pairwise(down):
            if inside(((left + right) / 2, (top + bottom) / 2), boxes):
                share += (right - left) * (bottom - top)
    return share


def read_boxes(file: Path, root: Path) -> dict[str, tuple[Box, ...]]:
    """Chain id of a phrase -> the boxes of the objects that it names, from an `Annotations/PHOTO.xml`. A box without a
    chain belongs to no phrase.

    Raises:
        UserError: the file is missing or not of this format, or a box lies outside of the image.
    """
    check_below(file, root)
    text, problem = read_text(file, MAX_XML_BYTES)
    if problem:
        raise UserError(file, problem[1], TODO, ExitCode.BAD_DATA)
    # XML entities, with which a small file can expand without limit, are declared there; no file of the set has one.
    if "<!" in text:
        raise UserError(file, "declarations or comments (<!), which no file of the set has", TODO, ExitCode.BAD_DATA)
    try:
        tree = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(file, f"not XML ({error})", TODO, ExitCode.BAD_DATA) from error
    width, height = _number(tree, "size/width", file), _number(tree, "size/height", file)
    if not width or not height:
        raise UserError(file, f"an image of {width} x {height} pixels", TODO, ExitCode.BAD_DATA)
    boxes: dict[str, tuple[Box, ...]] = {}
    for thing in tree.findall("object"):
        if thing.find("bndbox") is None:
            continue
        left, top, right, bottom = (_number(thing, f"bndbox/{key}", file) for key in ("xmin", "ymin", "xmax", "ymax"))
        if not (left <= right <= width and top <= bottom <= height):
            what = f"box {left},{top},{right},{bottom} is not within {width} x {height}"
            raise UserError(file, what, TODO, ExitCode.BAD_DATA)
        # Pixels are counted from 1, as in PASCAL VOC, and both edges are included: a box of one pixel has width 1.
        box = (max(0, left - 1) / width, max(0, top - 1) / height, right / width, bottom / height)
        for name in thing.findall("name"):
            boxes[name.text or ""] = (*boxes.get(name.text or "", ()), box)
    return boxes


def _number(element: ElementTree.Element, place: str, file: Path) -> int:
    text = (element.findtext(place) or "").strip()
    if not re.fullmatch(r"\d{1,6}", text):
        raise UserError(file, f"<{place}> is {text[:20]!r} instead of a number", TODO, ExitCode.BAD_DATA)
    return int(text)


def _folder(path: Path, name: str) -> Path:
    folder = next((path / each for each in (name, name.lower()) if (path / each).is_dir()), None)
    if folder is None:
        what = f"there is no folder {name}"
        raise UserError(path, what, "Name the folder of Flickr30k Entities", ExitCode.MISSING_INPUT)
    check_below(folder, path)
    return folder
