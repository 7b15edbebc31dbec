"""Crisscrossed Captions: human ratings, 0 to 5, of how similar captions and images of COCO are (Parekh et al. 2021,
github.com/google-research-datasets/Crisscrossed-Captions)."""

import argparse
import csv
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from maskvlm.suites.coco import CocoTexts, coco_id, read_coco_texts
from maskvlm.suites.metrics import spearman_rho
from maskvlm.suites.scores import pair_scores
from maskvlm.suites.suite import ItemRows, Suite, SuiteItem, SuiteMetric
from maskvlm.utils.errors import ExitCode, UserError

if TYPE_CHECKING:
    from maskvlm.inference.pretrained import PretrainedMaskVLM

KINDS = {"sits": ("caption", "image"), "sis": ("image1", "image2"), "sts": ("caption1", "caption2")}
"""Kind -> columns of its pairs: a text and an image, two images, two texts."""
SAMPLES = 1000
TODO = "Use the file as published"


class Cxc(Suite):
    """Three files of a split; those that exist are evaluated.

    Args:
        split: Karpathy split, val or test.
        seed: random seed of the samples.
    """

    question = "whether the model's similarities order pairs of texts and images as people do"
    licence = "see its page; captions of COCO CC BY 4.0, photos under the licences of their Flickr owners"
    ways = ("contrast", "match")
    traps = (
        "Pairs of one caption or image depend on each other. The headline is the published one: the mean of 1,000 "
        "Spearman correlations, each of one pair of half of the first column's captions or images, with the 95 % of "
        "these samples; `all pairs` is one correlation of everything.",
        "By match only texts with images can be asked.",
        "STS and SIS compare a side with itself, for which contrast was not trained.",
    )

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--split", default="test", choices=("val", "test"), help="Karpathy split (default: %(default)s)"
        )

    def __init__(self, split: str = "test", seed: int = 0) -> None:
        self.split, self.seed = split, seed

    def read(self, path: Path, images: Path | None) -> ItemRows:
        rows = ItemRows(path, images)
        texts = read_coco_texts(rows)
        for kind, columns in KINDS.items():
            names = (f"{kind}_{self.split}.csv", f"data/{kind}_{self.split}.csv", f"cxc_{kind}_{self.split}.csv")
            if not any((path / name).is_file() for name in names):
                rows.notes.append(f"{names[0]} is missing")
                continue
            lines = rows.lines(*names)
            where, header = next(lines, (names[0], ""))
            if header.split(",") != [*columns, "agg_score", "sampling_method"]:
                what = f"the first line is {header[:80]!r}"
                raise UserError(
                    where, what, f"{','.join(columns)},agg_score,sampling_method is needed", ExitCode.BAD_DATA
                )
            for where, line in lines:
                with rows.row():
                    self._add(rows, texts, kind, where, line)
        return rows

    def _add(self, rows: ItemRows, texts: CocoTexts, kind: str, where: str, line: str) -> None:
        fields = next(csv.reader([line]))
        if len(fields) != 4:
            raise UserError(where, f"{len(fields)} fields instead of 4", TODO, ExitCode.BAD_DATA)
        try:
            rated = float(fields[2])
        except ValueError:
            rated = -1.0
        if not 0 <= rated <= 5:
            raise UserError(where, f"agg_score {fields[2][:20]!r} is not from 0 to 5", TODO, ExitCode.BAD_DATA)
        captions, images, ids = [], [], []
        for column, field in zip(KINDS[kind], fields, strict=False):
            if column.startswith("caption"):
                captions.append(_caption(texts, field, column, where))
            else:
                images.append(rows.image(field, where))
                ids.append(coco_id(field))
        rows.items.append(SuiteItem((*images,), (*captions,), (rated, fields[0]), kind, where, (*ids,)))

    def ask(self, model: "PretrainedMaskVLM", items: Sequence[SuiteItem], way: str) -> list[list[float]]:
        """Scores of the items: with contrast the cosine of any two inputs; with match only pairs of text and image."""
        if way == "match":
            mixed = [item for item in items if item.kind == "sits"]
            matches = iter(pair_scores(model, mixed, way))
            return [next(matches) if item.kind == "sits" else [] for item in items]
        images = list(dict.fromkeys(image for item in items for image in item.images))
        texts = list(dict.fromkeys(text for item in items for text in item.texts))
        image_BE, text_CE = model.encode_image(images).cpu(), model.encode_text(texts).cpu()
        vector_of: dict[tuple[bool, str | bytes], Tensor] = {(True, each): image_BE[n] for n, each in enumerate(images)}
        vector_of |= {(False, each): text_CE[n] for n, each in enumerate(texts)}
        scores = []
        for item in items:
            first, second = [vector_of[True, each] for each in item.images] + [vector_of[False, t] for t in item.texts]
            scores.append([float(first @ second)])
        return scores

    def metrics(self, items: Sequence[SuiteItem], scores: Sequence[Any], way: str) -> list[SuiteMetric]:
        figures = []
        for kind in KINDS:
            rows = [row for row, item in enumerate(items) if item.kind == kind]
            if len(rows) < 4:  # the correlation is over half of them
                continue
            model_scores = [float(scores[row][0]) for row in rows]
            rated = [items[row].truth[0] for row in rows]
            queries = [items[row].truth[1] for row in rows]
            samples = sorted(sampled_spearman(model_scores, rated, queries, self.seed))
            low, high = samples[int(0.025 * len(samples))], samples[int(0.975 * len(samples)) - 1]
            mean = statistics.fmean(samples)
            name = f"{kind.upper()}, Spearman x 100"
            figures.append(SuiteMetric(name, 100 * mean, 0.0, len(rows), (100 * low, 100 * high)))
            figures.append(SuiteMetric(f"{name}, all pairs", 100 * spearman_rho(model_scores, rated), 0.0, len(rows)))
        return figures


def sampled_spearman(
    scores: Sequence[float], rated: Sequence[float], queries: Sequence[str], seed: int, samples: int = SAMPLES
) -> list[float]:
    """Spearman correlations of repeated samples: one pair of each of a random half of the queries (paper, sec. 5)."""
    rows_of: dict[str, list[int]] = {}
    for row, query in enumerate(queries):
        rows_of.setdefault(query, []).append(row)
    rng, names, correlations = random.Random(seed), sorted(rows_of), []
    if len(names) < 2:  # a single query has no order to compare
        return [0.0] * samples
    for _ in range(samples):
        rows = [rng.choice(rows_of[name]) for name in rng.sample(names, max(2, len(names) // 2))]
        correlations.append(spearman_rho([scores[row] for row in rows], [rated[row] for row in rows]))
    # If all scores are equal, the correlation is undefined: nothing is known about the order, as at chance.
    return [0.0 if value != value else value for value in correlations]


def _caption(texts: CocoTexts, field: str, column: str, where: str) -> str:
    """The caption with an id such as `COCO_val2014:sentid:648388`."""
    number = field.rpartition(":")[2]
    if not number.isdecimal() or int(number) not in texts.text:
        raise UserError(where, f"{column} {field[:60]!r} is not a caption of COCO val2014", TODO, ExitCode.BAD_DATA)
    return texts.text[int(number)]
