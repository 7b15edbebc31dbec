"""ARO's Visual Genome Relation and Attribution: a sentence about a part of an image, and the same with its two objects,
or their attributes, swapped (Yuksekgonul et al. 2023, github.com/mertyg/vision-language-models-are-bows)."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskvlm.data.files import get, get_name
from maskvlm.data.raw.coco_flickr import find_file
from maskvlm.data.raw.genome import IMAGE_DATA, genome_photo_id, read_coco_ids
from maskvlm.suites.metrics import first_is_best, percent_right
from maskvlm.suites.suite import ItemRows, Suite, SuiteItem, SuiteMetric, plain_text
from maskvlm.utils.errors import ExitCode, UserError

LAYOUT = "ARO"
FILES = {"relation": "visual_genome_relation.json", "attribution": "visual_genome_attribution.json"}
MOST_PIXELS = 1_000_000  # largest coordinate in an image
ENOUGH = 25
"""Minimum number of items for a relation or pair of attributes to have its own metric, as published for attributes."""


class Aro(Suite):
    """ARO's relation and attribution tests: two files, one for each."""

    question = "which of two sentences is true whose two things, or whose attributes, are exchanged"
    licence = "code MIT; images are of Visual Genome (CC BY 4.0; photos of COCO and YFCC100M)"
    traps = (
        "Many a false sentence is odd English (`the grass is eating the horse`): score_no_image says how often a text "
        "model alone finds the true one.",
        "Of a relation that holds both ways (near, next to, with) both sentences are true. The authors' notebook "
        "leaves out a list of such relations and of rare ones; here a relation counts that has 25 items, and "
        "result.json has each one's figure.",
        "The headline is the mean over relations, as published; the share of all items is mostly that of a few "
        "frequent relations.",
        "About half of Visual Genome's images are COCO's, too, and most models were trained on them. The report counts "
        "those that the weights have seen where Visual Genome's image_data.json lies in PATH.",
    )

    def read(self, path: Path, images: Path | None) -> ItemRows:
        rows = ItemRows(path, images)
        image_data = find_file(path, IMAGE_DATA)
        rows.ids_known = image_data is not None
        coco_ids = {} if image_data is None else read_coco_ids(image_data)
        for test, name in FILES.items():
            if not (path / name).is_file():
                rows.notes.append(f"{name} is missing")
                continue
            file, content = rows.json_file(name)
            if not isinstance(content, list):
                what = f"{type(content).__name__} instead of a list of items"
                raise UserError(file, what, f"A file in the {LAYOUT} layout is needed", ExitCode.BAD_DATA)
            for number, record in enumerate(content):
                where = f"{file} [{number}]"
                with rows.row():
                    texts = tuple(
                        plain_text(get(record, key, str, where, LAYOUT), key, where)
                        for key in ("true_caption", "false_caption")
                    )
                    image = get_name(record, "image_path", where, LAYOUT)
                    stem = Path(image).stem
                    ids = (genome_photo_id(int(stem), coco_ids) if stem.isdecimal() else f"vg {stem}",)
                    kind = f"{test}: {_kind(record, test, where)}"
                    box = _box(record, where)
                    rows.items.append(SuiteItem((rows.image(image, where),), texts, 0, kind, where, ids, box))
        if not rows.files:
            todo = f"Looked for {' and '.join(FILES.values())}"
            raise UserError(path, "none of this suite's files is here", todo, ExitCode.MISSING_INPUT)
        return rows

    def metrics(self, items: Sequence[SuiteItem], scores: Sequence[Any], way: str) -> list[SuiteMetric]:
        right = [first_is_best(each) for each in scores]
        counts = Counter(item.kind for item in items)
        headlines, kinds = [], []
        for test in FILES:
            rows = [row for row, item in enumerate(items) if item.kind.startswith(f"{test}:")]
            if not rows:
                continue
            own = []
            for kind, count in counts.most_common():
                if kind.startswith(f"{test}:") and count >= ENOUGH:
                    own.append(self._share(kind, [row for row in rows if items[row].kind == kind], items, right))
            if own:
                mean = sum(each.value for each in own) / len(own)
                count = sum(each.items for each in own)
                headlines.append(SuiteMetric(f"{test}, mean over {len(own)} kinds", mean, 50.0, count))
            headlines.append(self._share(f"{test}, all items", rows, items, right))
            kinds += own
        return [*headlines, *kinds]

    def _share(self, name: str, rows: list[int], items: Sequence[SuiteItem], right: list[bool]) -> SuiteMetric:
        return percent_right(name, [right[row] for row in rows], 50.0, [items[row].images[0] for row in rows])


def _kind(record: Any, test: str, where: str) -> str:
    """The relation or the two attributes of an item."""
    if test == "relation":
        return plain_text(get(record, "relation_name", str, where, LAYOUT), "relation_name", where)
    attributes = get(record, "attributes", list, where, LAYOUT)
    if len(attributes) != 2:
        what = f"'attributes' has {len(attributes)} entries instead of two"
        raise UserError(where, what, f"A file in the {LAYOUT} layout is needed", ExitCode.BAD_DATA)
    return "_".join(plain_text(each, "attributes", where) for each in attributes)


def _box(record: Any, where: str) -> tuple[int, int, int, int]:
    """Left, top, right and bottom in pixels of the part of the image that the sentence is about."""
    left, top, width, height = (_pixels(record, f"bbox_{key}", where) for key in ("x", "y", "w", "h"))
    if width < 1 or height < 1:
        raise UserError(where, f"a box of {width} by {height} pixels", "Fix or remove the row", ExitCode.BAD_DATA)
    return left, top, left + width, top + height


def _pixels(record: Any, key: str, where: str) -> int:
    value = get(record, key, object, where, LAYOUT)
    # `not <=` is also true of NaN
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MOST_PIXELS:
        raise UserError(
            where, f"'{key}' is not a number of pixels", f"A file in the {LAYOUT} layout is needed", ExitCode.BAD_DATA
        )
    return round(value)
