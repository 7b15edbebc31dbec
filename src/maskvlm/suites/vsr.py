"""Visual Spatial Reasoning: is a sentence about the spatial relation of two objects true of the image (Liu et al. 2023,
github.com/cambridgeltl/visual-spatial-reasoning)."""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskvlm.data.files import get, get_name, load_json
from maskvlm.suites.coco import coco_id
from maskvlm.suites.metrics import area_under_curve, percent_right
from maskvlm.suites.suite import ItemRows, Suite, SuiteItem, SuiteMetric, plain_text
from maskvlm.utils.errors import ExitCode, UserError

LAYOUT = "VSR"
ENOUGH = 20
"""Minimum number of items for a relation to have its own metric."""


class Vsr(Suite):
    """Sentences that are true or false of an image.

    Args:
        split: kind and part of the split, such as `zeroshot/test` or `random/test`.
    """

    question = "whether a sentence about how two things stand to each other is true of the image"
    licence = "Apache-2.0; the images are of COCO train2017 and val2017, under the licences of their Flickr owners"
    ways = ("match", "contrast")
    traps = (
        "A match of 0.5 is a threshold that pre-training never set: accuracy can be at chance while the order is good. "
        "The area under the curve has no threshold; one that is tuned on these items would tell on itself.",
        "A sentence whose relation is wrong still names two things that are there: models that match by objects call "
        "nearly everything true.",
        "Left and right are the viewer's in some items and the thing's own in others; people are right on 95 %.",
        "The images are COCO's training images, too: most models have seen them, with other captions.",
    )

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--split", default="zeroshot/test", help="zeroshot or random, a slash, the part (default: %(default)s)"
        )

    def __init__(self, split: str = "zeroshot/test") -> None:
        self.split = split

    def read(self, path: Path, images: Path | None) -> ItemRows:
        kind, _, part = self.split.partition("/")
        if kind not in ("zeroshot", "random") or part not in ("train", "dev", "test"):
            raise UserError(
                "--split", f"'{self.split}' is not a split", "Give zeroshot/test, random/test, or their dev"
            )
        rows, name = ItemRows(path, images), f"{self.split}.jsonl"
        places = (name, f"splits/{name}", f"data/splits/{name}", f"vsr_{kind}_{part}.jsonl")
        for where, line in rows.lines(*places):
            with rows.row():
                record = load_json(line.encode(), *_place(where))
                label = get(record, "label", int, where, LAYOUT)
                if label not in (0, 1):
                    todo = f"A file in the {LAYOUT} layout is needed"
                    raise UserError(where, f"'label' is {label} instead of 0 or 1", todo, ExitCode.BAD_DATA)
                text = plain_text(get(record, "caption", str, where, LAYOUT), "caption", where)
                relation = plain_text(get(record, "relation", str, where, LAYOUT), "relation", where)
                file = get_name(record, "image", where, LAYOUT)
                rows.items.append(
                    SuiteItem((rows.image(file, where),), (text,), label, relation, where, (coco_id(file),))
                )
        return rows

    def metrics(self, items: Sequence[SuiteItem], scores: Sequence[Any], way: str) -> list[SuiteMetric]:
        sides = [[each[0] for each, item in zip(scores, items, strict=True) if item.truth == side] for side in (1, 0)]
        curve = 100 * area_under_curve(*sides) if all(sides) else float("nan")
        area = SuiteMetric("area under the curve", curve, 50.0, len(items))
        # A cosine has no threshold between true and false.
        if way != "match":
            return [area]
        right = [
            not math.isnan(each[0]) and (each[0] > 0.5) == bool(item.truth)
            for each, item in zip(scores, items, strict=True)
        ]
        images = [item.images[0] for item in items]
        majority = 100 * max(map(len, sides)) / len(items)
        figures = [percent_right("accuracy", right, majority, images), area]
        called = [each[0] > 0.5 for each in scores]
        figures.append(SuiteMetric("called true", 100 * sum(called) / len(called), None, len(items)))
        for relation, count in Counter(item.kind for item in items).most_common():
            if count >= ENOUGH:
                rows = [row for row, item in enumerate(items) if item.kind == relation]
                true = sum(items[row].truth for row in rows)
                chance = 100 * max(true, count - true) / count
                name = f"accuracy, {relation}"
                figures.append(percent_right(name, [right[row] for row in rows], chance, [images[row] for row in rows]))
        return figures


def _place(where: str) -> tuple[Path, int]:
    file, _, number = where.rpartition(":")
    return Path(file), int(number)
