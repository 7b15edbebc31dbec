"""Flickr8k's human judgements of how well a caption of some image fits this one (Hodosh et al. 2013), compared as is
usual for caption metrics (Anderson et al. 2016; Hessel et al. 2021, github.com/jmhessel/clipscore)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskvlm.data.raw.captions import flickr_id
from maskvlm.suites.metrics import kendall_tau
from maskvlm.suites.suite import ItemRows, Suite, SuiteItem, SuiteMetric, plain_text
from maskvlm.utils.errors import ExitCode, UserError

EXPERTS, CROWD, TOKENS = "ExpertAnnotations.txt", "CrowdFlowerAnnotations.txt", "Flickr8k.token.txt"


class Flickr8kJudgements(Suite):
    """Both files of judgements, or the one that exists, beside the captions that they name."""

    question = "whether the model's scores order captions of an image as people do"
    licence = "non-commercial research and education only; photos under Flickr's terms of use"
    ways = ("match", "contrast", "score", "score_per_word", "score_no_image")
    traps = (
        "Experts: tau-c over each of the three judgements by itself, without captions of the image itself, as "
        "published; with the mean of the three, or with tau-b, other figures come out of the same scores.",
        "Crowd: tau-b against the share of yes, which has few values: ties are the rule.",
        "The candidates are captions that people wrote of other images: no model's mistakes are among them.",
        "`score` adds up over words and falls with the length of a caption.",
        "A model that was trained on other captions of Flickr8k, or on Flickr30k, may have seen the images.",
    )

    def read(self, path: Path, images: Path | None) -> ItemRows:
        rows = ItemRows(path, images)
        caption: dict[str, str] = {}
        of_image: dict[str, set[str]] = {}
        for where, line in rows.lines(TOKENS):
            with rows.row():
                name, text = _fields(line, 2, where)
                caption[name] = plain_text(text, "the caption", where)
                of_image.setdefault(name.rpartition("#")[0], set()).add(caption[name])
        own = 0
        for file, kind, count in ((EXPERTS, "experts", 5), (CROWD, "crowd", 5)):
            if not (path / file).is_file():
                rows.notes.append(f"{file} is missing")
                continue
            for where, line in rows.lines(file):
                with rows.row():
                    image, name, *numbers = _fields(line, count, where)
                    if name not in caption:
                        todo = "Use the file of the same distribution"
                        raise UserError(where, f"{name[:80]!r} is not a caption of {TOKENS}", todo, ExitCode.BAD_DATA)
                    # An image's own captions are the references of caption metrics.
                    if kind == "experts" and caption[name] in of_image.get(image, ()):
                        own += 1
                        continue
                    truth = _judged(numbers, where) if kind == "experts" else _share_of_yes(numbers, where)
                    item = SuiteItem(
                        (rows.image(image, where),), (caption[name],), truth, kind, where, (flickr_id(image),)
                    )
                    rows.items.append(item)
        if own:
            rows.notes.append(f"{own:,} judged pairs of an image and its own caption are left out, as published")
        return rows

    def metrics(self, items: Sequence[SuiteItem], scores: Sequence[Any], way: str) -> list[SuiteMetric]:
        figures = []
        for kind, variant in (("experts", "c"), ("crowd", "b")):
            pairs = [
                (each[0], judged)
                for each, item in zip(scores, items, strict=True)
                if item.kind == kind
                for judged in item.truth
            ]
            if len(pairs) > 1:
                tau = kendall_tau([score for score, _ in pairs], [judged for _, judged in pairs], variant)
                figures.append(SuiteMetric(f"{kind}, Kendall's tau-{variant} x 100", 100 * tau, 0.0, len(pairs)))
        return figures


def _fields(line: str, count: int, where: str) -> list[str]:
    fields = line.split("\t")
    if len(fields) != count:
        what = f"{len(fields)} fields between tabs instead of {count}"
        raise UserError(where, what, "Use the file as published", ExitCode.BAD_DATA)
    return fields


def _judged(numbers: list[str], where: str) -> list[float]:
    """Three judgements, from 1 (does not describe the image at all) to 4 (describes it)."""
    if wrong := [each for each in numbers if each not in ("1", "2", "3", "4")]:
        todo = "Use the file as published"
        raise UserError(where, f"judgement {wrong[0][:20]!r} is not from 1 to 4", todo, ExitCode.BAD_DATA)
    return [float(each) for each in numbers]


def _share_of_yes(numbers: list[str], where: str) -> list[float]:
    """The fraction of yes. numbers: that fraction, the number of yes and the number of no, which must agree."""
    try:
        share, yes, no = float(numbers[0]), int(numbers[1]), int(numbers[2])
        right = yes >= 0 and no >= 0 and abs(share - yes / (yes + no)) < 1e-5
    except (ValueError, ZeroDivisionError):
        right = False
    if not right:
        what = f"{' '.join(numbers)[:60]!r} is not a share of yes with its counts"
        raise UserError(where, what, "Use the file as published", ExitCode.BAD_DATA)
    return [share]
