"""ECCV Caption: retrieval on COCO with the matches that COCO's annotation misses (Chun et al. 2022,
github.com/naver-ai/eccv-caption). The relevant pairs and the metrics are those of the authors' package."""

import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maskvlm.data.images import BadImage
from maskvlm.objectives.retrieval_metrics import BLOCK, KS, top_items
from maskvlm.suites.coco import read_coco_texts
from maskvlm.suites.metrics import map_at_r_chance
from maskvlm.suites.suite import ItemRows, Suite, SuiteItem, SuiteMetric
from maskvlm.utils.errors import ExitCode, UserError

if TYPE_CHECKING:
    from maskvlm.inference.pretrained import PretrainedMaskVLM

Relevant = Mapping[int, Sequence[int]]


class EccvCaption(Suite):
    """The 5,000 images and 25,000 captions of Karpathy's test split of COCO."""

    question = "which captions fit which images of COCO's test split, counting matches that COCO does not know"
    licence = "ECCV Caption: MIT; captions of COCO CC BY 4.0, photos under the licences of their Flickr owners"
    ways = ("contrast",)
    whole = True
    traps = (
        "mAP@R is of 1,261 images and 1,332 captions, COCO's and CxC's recall of all 5,000 and 25,000: they are not of "
        "the same queries.",
        "The matches were found with five models and then judged by people: a match that none of the five found is "
        "still counted as wrong.",
        "By contrast alone: matching would have to score every pair, or re-rank what contrast found.",
        "Of equal scores any may come first; the package takes the order that it is given.",
    )

    def read(self, path: Path, images: Path | None) -> ItemRows:
        official = judge()
        rows = ItemRows(path, images)
        texts = read_coco_texts(rows)
        wanted = [int(number) for number in official.coco_ids]
        if absent := [number for number in wanted if number not in texts.text]:
            what = f"{len(absent):,} of {len(wanted):,} captions are missing, the first is {absent[0]}"
            raise UserError(rows.files[0], what, "Use captions_val2014.json of COCO 2014", ExitCode.BAD_DATA)
        captions_of: dict[int, list[int]] = {}
        for number in wanted:
            captions_of.setdefault(texts.image[number], []).append(number)
        for image, numbers in captions_of.items():
            where = f"{rows.files[0]} image {image}"
            with rows.row():
                if image not in texts.name:
                    raise BadImage(where, "missing", "the file does not name it")
                image_path = rows.image(texts.name[image], where)
                captions = tuple(texts.text[number] for number in numbers)
                rows.items.append(SuiteItem((image_path,), captions, (image, numbers), "", where, (f"coco {image}",)))
        return rows

    def ask(self, model: "PretrainedMaskVLM", items: Sequence[SuiteItem], way: str) -> list[Tensor]:
        """Cosine similarities of each image with every caption, [C] each."""
        image_BE = model.encode_image([item.images[0] for item in items]).cpu()
        return list(image_BE @ model.encode_text([text for item in items for text in item.texts]).cpu().T)

    def metrics(self, items: Sequence[SuiteItem], scores: Sequence[Any], way: str) -> list[SuiteMetric]:
        contrast_BC = torch.stack(list(scores))
        images = [item.truth[0] for item in items]
        captions = [number for item in items for number in item.truth[1]]
        return retrieval_figures(judge(), contrast_BC, images, captions)


def judge() -> Any:
    """The package's `Metrics`, which holds the relevant pairs. Raises UserError (69) if it is not installed."""
    try:
        # The package warns that it could use a faster JSON library.
        with contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module("eccv_caption").Metrics()
    except ImportError as error:
        todo = "pip install 'maskvlm[suites]'"
        raise UserError("eccv_caption", "eccv-caption is not installed", todo, ExitCode.UNAVAILABLE) from error


def retrieval_figures(official: Any, contrast_BC: Tensor, images: list[int], captions: list[int]) -> list[SuiteMetric]:
    """The package's metrics in percent, in both directions, with those of a random order."""
    sides = {
        "i2t": (images, captions, contrast_BC, "captions of an image"),
        "t2i": (captions, images, contrast_BC.T, "images of a caption"),
    }
    # No metric looks beyond the largest number of relevant items of any query.
    depth = {side: max([*KS, *map(len, official.eccv_gts[side].values())]) for side in sides}
    ranked = {
        side: dict(zip(queries, ranked_ids(score_QG, gallery, depth[side]), strict=True))
        for side, (queries, gallery, score_QG, _) in sides.items()
    }
    with contextlib.redirect_stderr(io.StringIO()):  # hides progress bars
        eccv = official.eccv_metrics(ranked, "all")
        recalls = {
            name: {k: getattr(official, f"{name}_recalls")(ranked, "all", K=k) for k in KS}
            for name in ("cxc", "coco_5k")
        }
    figures = []
    for side, (_, gallery, _, direction) in sides.items():
        relevant, total = [len(set(each)) for each in official.eccv_gts[side].values()], len(gallery)
        chance = {
            "map_at_r": sum(map_at_r_chance(count, total) for count in relevant) / len(relevant),
            "rprecision": sum(relevant) / len(relevant) / total,
            "r1": sum(relevant) / len(relevant) / total,
        }
        names = {"map_at_r": "mAP@R", "rprecision": "R-precision", "r1": "R@1"}
        for key, level in chance.items():
            value = 100 * float(eccv[f"eccv_{key}"][side])
            figures.append(SuiteMetric(f"ECCV {names[key]}, {direction}", value, 100 * level, len(relevant)))
        for name, truth in (("cxc", official.cxc_gts), ("coco_5k", official.coco_gts)):
            counts = [len(set(each)) for each in truth[side].values()]
            for k in KS:
                level = 100 * sum(hit_chance(count, total, k) for count in counts) / len(counts)
                label = f"{'CxC' if name == 'cxc' else 'COCO'} R@{k}, {direction}"
                figures.append(SuiteMetric(label, 100 * float(recalls[name][k][side]), level, len(counts)))
    return figures


def ranked_ids(score_QG: Tensor, gallery: Sequence[int], depth: int) -> list[list[int]]:
    """The ids of the best items of each query, best first."""
    parts = (top_items(block_qG, depth) for block_qG in score_QG.split(BLOCK))
    return [[gallery[place] for place in places] for part in parts for places in part.tolist()]


def hit_chance(relevant: int, total: int, k: int) -> float:
    """Probability that k items drawn from the gallery include a relevant one."""
    missed = 1.0
    for drawn in range(min(k, total)):
        missed *= max(0, total - relevant - drawn) / (total - drawn)
    return 1 - missed
