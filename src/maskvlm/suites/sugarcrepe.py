"""SugarCrepe: a caption of an image against a slightly different one that is false (Hsieh et al. 2023,
github.com/RAIVNLab/sugar-crepe)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskvlm.data.files import get, get_name
from maskvlm.suites.coco import coco_id
from maskvlm.suites.metrics import first_is_best, percent_right
from maskvlm.suites.suite import ItemRows, Suite, SuiteItem, SuiteMetric, plain_text
from maskvlm.utils.errors import ExitCode, UserError

KINDS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
LAYOUT = "SugarCrepe"


class SugarCrepe(Suite):
    """Seven files, one for each kind of change that makes the caption false."""

    question = "which of two captions that differ in an object, an attribute or a relation is true"
    licence = "MIT; the images are of COCO val2017, under the licences of their Flickr owners"
    traps = (
        "The false captions were written by a language model and filtered so that two text models see no difference; "
        "score_no_image says whether yours does.",
        "`score` adds up over words and favours the shorter caption, above all in add_att and add_obj; score_per_word "
        "does not.",
        "About three of four images of COCO val2017 are in Karpathy's training split (as `restval`): a model that was "
        "trained on it has seen them, with the true caption. The report counts them where the checkpoint tells.",
        "The mean over the seven kinds is not the share of all 7,511 items: kinds have 245 to 2,062 of them.",
    )

    def read(self, path: Path, images: Path | None) -> ItemRows:
        rows = ItemRows(path, images)
        for kind in KINDS:
            names = (f"{kind}.json", f"data/{kind}.json", f"sugarcrepe_{kind}.json")
            if not any((path / name).is_file() for name in names):
                rows.notes.append(f"{kind}.json is missing")
                continue
            file, content = rows.json_file(*names)
            if not isinstance(content, dict):
                what = f"{type(content).__name__} instead of an object of numbered items"
                raise UserError(file, what, f"A file in the {LAYOUT} layout is needed", ExitCode.BAD_DATA)
            for number, record in content.items():
                where = f"{file} item {number[:20]}"
                with rows.row():
                    name = get_name(record, "filename", where, LAYOUT)
                    texts = tuple(
                        plain_text(get(record, key, str, where, LAYOUT), key, where)
                        for key in ("caption", "negative_caption")
                    )
                    image = rows.image(name, where)
                    rows.items.append(SuiteItem((image,), texts, 0, kind, where, (coco_id(name),)))
        if not rows.files:
            todo = f"Looked for {KINDS[0]}.json and six more"
            raise UserError(path, "none of this suite's files is here", todo, ExitCode.MISSING_INPUT)
        return rows

    def metrics(self, items: Sequence[SuiteItem], scores: Sequence[Any], way: str) -> list[SuiteMetric]:
        right = [first_is_best(each) for each in scores]
        kinds = []
        for kind in KINDS:
            if rows := [row for row, item in enumerate(items) if item.kind == kind]:
                groups = [items[row].images[0] for row in rows]
                kinds.append(percent_right(kind, [right[row] for row in rows], 50.0, groups))
        mean = sum(each.value for each in kinds) / len(kinds)
        return [SuiteMetric(f"mean of {len(kinds)} kinds", mean, 50.0, len(items)), *kinds]
