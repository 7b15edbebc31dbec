"""Runs a suite on a model: checks the items' images, scores the items in each way, computes and writes the metrics."""

import json
import random
import warnings
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from maskvlm.data.files import digest_of
from maskvlm.data.images import BadImage
from maskvlm.data.inputs import open_image
from maskvlm.data.raw.lines import one_line
from maskvlm.data.subset import hash_of_photo
from maskvlm.inference.pretrained import INPUT_WARNINGS, PretrainedMaskVLM, named_words, some_of
from maskvlm.suites.scores import within
from maskvlm.suites.suite import ItemRows, Suite, SuiteItem, SuiteMetric
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.overrides import check_overrides
from maskvlm.utils.whole_files import json_ready, write_json, write_text

RESULT, SCORES = "result.json", "scores.jsonl"
MAX_SCORES = 5_000_000  # per way that are written, about 100 MB: not every image with every caption of a gallery
MOST_WORDS = 10  # unknown words that are named
MOST_FIGURES = 20  # metrics per way that are printed; a thousand classes have a thousand more


class SuiteReport(NamedTuple):
    """Results of a suite.

    Attributes:
        metrics, scores: for each way.
        items: the items that were evaluated.
        of: number of items in the files, before `limit`.
        skipped: reason -> rows that were left out.
        trained_on: number of the items' images that the weights were trained on; None if the checkpoint does not say.
    """

    metrics: dict[str, list[SuiteMetric]]
    scores: dict[str, Sequence[Any]]
    items: list[SuiteItem]
    of: int
    skipped: dict[str, list[str]]
    files: list[Path]
    notes: list[str]
    trained_on: int | None


def check_ways(suite: Suite, ways: Sequence[str], limit: int | None, reads: bool = False) -> None:
    """Checks that need no files; raises as `run_suite`. reads: whether `Suite.read` will be called, too."""
    # Its card is written after the model has run, which may take hours.
    if missing := [fact for fact in ("question", "licence", "traps") if not hasattr(suite, fact)]:
        kind = f"{type(suite).__module__}.{type(suite).__qualname__}"
        todo = f"Define {'them' if len(missing) > 1 else 'it'} in the class, see docs/suites.md"
        raise UserError(f"suite {kind}", f"has no {', '.join(missing)}", todo)
    check_overrides(suite, Suite, unused=() if reads else ("read",))
    if unknown := [way for way in ways if way not in suite.ways]:
        raise UserError("--by", f"this suite cannot be scored by {unknown[0]}", f"Available: {', '.join(suite.ways)}")
    if suite.whole and limit is not None:
        raise UserError("--limit", "this suite ranks all its items among each other", "Leave it out")


def run_suite(
    suite: Suite,
    model: PretrainedMaskVLM,
    rows: ItemRows,
    ways: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
) -> SuiteReport:
    """Evaluate a model on a suite.

    Args:
        rows: the result of `suite.read`; not modified.
        ways: ways of the suite; empty for its first.
        limit: maximum number of images, drawn at random with `seed`; all their items are used.

    Raises:
        UserError: no item is left, the suite has no such way or needs all its items, the checkpoint lacks a head, or a
            method of the suite returns something else than `Suite` says.
    """
    if not isinstance(rows, ItemRows):
        raise _wrong(suite, "read", rows, "Return the ItemRows")
    check_ways(suite, ways, limit)
    ways, path = tuple(ways) or suite.ways[:1], rows.path
    total, notes = len(rows.items), [*rows.notes]
    skipped = {reason: [*messages] for reason, messages in rows.skipped.items()}
    items = with_images(subset(rows.items, limit, seed), skipped)
    if suite.whole and skipped:
        first = next(iter(skipped.values()))[0]
        what = f"{sum(map(len, skipped.values()))} rows cannot be used, the first: {first}"
        raise UserError(path, what, "Fix them: this suite needs all its items", ExitCode.BAD_DATA)
    if not items:  # all images are bad, or there are none
        first = next(iter(skipped.values()), ["; ".join(notes) or "the files are empty"])[0]
        raise UserError(path, f"no item can be used: {first}", "Check --path and --images", ExitCode.BAD_DATA)
    with warnings.catch_warnings():
        # Unusual images are intended, and a warning would be about one of thousands; texts get notes below.
        for kind in INPUT_WARNINGS:
            warnings.simplefilter("ignore", kind)
        scores = {way: _asked(suite, model, items, way) for way in ways}
    looked_at = some_of(list(dict.fromkeys(image for item in items for image in item.images)))
    far = sum(line is not None for line in model.far(looked_at)) if looked_at else 0
    if 2 * far > len(looked_at):  # a few unusual ones are no reason to doubt the metrics
        note = f"{far} of {len(looked_at)} images checked are unlike those that the model was trained on"
        notes.append(f"{note}; take the metrics with care")
    if model.warned_words:
        named = named_words(model.warned_words, MOST_WORDS)
        notes.append(f"words that the model's tokenizer does not know, of some of the texts: {named}")
    if model.truncated_warnings:
        notes.append(f"some texts are longer than the model reads, such as {model.truncated_warnings[0]}")
    if model.mask_warnings:
        notes.append(f"some texts hold a masked word, such as {model.mask_warnings[0]}")
    metrics = {}
    for way in ways:
        places = [row for row, each in enumerate(scores[way]) if len(each)]
        if missing := len(items) - len(places):
            notes.append(f"by {way}: {missing} of {len(items)} items cannot be scored, and are left out")
        metrics[way] = _measured(suite, [items[row] for row in places], [scores[way][row] for row in places], way)
    seen_count = trained_on(model, items) if rows.ids_known else None
    return SuiteReport(metrics, scores, items, total, skipped, rows.files, notes, seen_count)


def _asked(suite: Suite, model: PretrainedMaskVLM, items: list[SuiteItem], way: str) -> Sequence[Any]:
    """The result of `Suite.ask`, checked."""
    scores: Sequence[Any] = suite.ask(model, items, way)
    todo = "Return the scores of each item, [] for one without"
    if not hasattr(scores, "__len__"):
        raise _wrong(suite, "ask", scores, todo)
    if len(scores) != len(items):
        raise UserError(_method(suite, "ask"), f"gave scores of {len(scores)} items, there are {len(items)}", todo)
    return scores


def _measured(suite: Suite, items: list[SuiteItem], scores: list[Any], way: str) -> list[SuiteMetric]:
    """The result of `Suite.metrics`, checked: the model may have run for hours."""
    metrics: Any = suite.metrics(items, scores, way)
    todo = "Return a list of SuiteMetric"
    if not isinstance(metrics, list | tuple):
        raise _wrong(suite, "metrics", metrics, todo)
    for one in metrics:
        if not isinstance(one, SuiteMetric):
            raise _wrong(suite, "metrics", one, todo)
        if not isinstance(one.value, Real):
            what = f"gave the value of {one.name} as a {type(one.value).__name__}"
            raise UserError(_method(suite, "metrics"), what, "Give a number")
    # Numbers of NumPy, too, are written to JSON.
    return [
        SuiteMetric(
            str(one.name),
            float(one.value),
            None if one.chance is None else float(one.chance),
            int(one.items),
            None if one.interval is None else (float(one.interval[0]), float(one.interval[1])),
        )
        for one in metrics
    ]


def _wrong(suite: Suite, method: str, value: object, todo: str) -> UserError:
    return UserError(_method(suite, method), f"gave a {type(value).__name__}", todo)


def _method(suite: Suite, method: str) -> str:
    return f"{type(suite).__module__}.{type(suite).__qualname__}.{method}"


def subset(items: list[SuiteItem], limit: int | None, seed: int) -> list[SuiteItem]:
    """The items of at most `limit` images, in their order; all items without an image are kept."""
    groups = list(dict.fromkeys(item.images for item in items if item.images))
    if limit is None or limit >= len({image for group in groups for image in group}):
        return items
    images: set[str | bytes] = set()
    if all(len(group) == 1 for group in groups):
        images.update(image for (image,) in random.Random(seed).sample(groups, limit))
    else:  # items with several images are kept whole, as long as there is room
        for group in random.Random(seed).sample(groups, len(groups)):
            if len(images.union(group)) <= limit:
                images.update(group)
    return [item for item in items if images.issuperset(item.images)]


def with_images(items: list[SuiteItem], skipped: dict[str, list[str]]) -> list[SuiteItem]:
    """The items whose images can be read; the others are added to `skipped`, by reason. This is known before the model
    runs for hours, at the cost of decoding twice."""
    bad: dict[str | bytes, BadImage] = {}
    sizes: dict[str | bytes, tuple[int, int]] = {}
    for image, origin in {image: item.origin for item in items for image in item.images}.items():
        try:
            sizes[image] = open_image(image, origin).size
        except BadImage as error:
            bad[image] = error
    readable = []
    for item in items:
        wrong = next((bad[image] for image in item.images if image in bad), None)
        if wrong is not None:
            skipped.setdefault(wrong.reason, []).append(f"{item.origin}: {wrong.what}")
            continue
        try:
            if item.box is not None:
                within(item.box, sizes[item.images[0]])
            readable.append(item)
        except UserError as error:
            skipped.setdefault("box outside of its image", []).append(f"{item.origin}: {error.what}")
    return readable


def trained_on(model: PretrainedMaskVLM, items: Sequence[SuiteItem]) -> int | None:
    """Number of the items' images that the weights were trained on, by their ids; None if unknown."""
    history = model.origin.history
    wanted = {hash_of_photo(image_id) for item in items for image_id in item.image_ids}
    if not history or not wanted or any(entry.ids is None for entry in history):
        return None
    seen_ids = torch.cat([entry.ids for entry in history if entry.ids is not None])
    return int(torch.isin(torch.tensor(sorted(wanted)), seen_ids).sum())


def table_of_suite(report: SuiteReport) -> Table:
    """A table of the metrics with their intervals and chance levels."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("by", no_wrap=True)
    table.add_column("metric")
    for name in ("value", "95 %", "chance", "items"):
        table.add_column(name, justify="right", no_wrap=True)
    for way, metrics in report.metrics.items():
        for place, one in enumerate(metrics[:MOST_FIGURES]):
            between = "" if one.interval is None else f"{one.interval[0]:.1f} to {one.interval[1]:.1f}"
            chance = "" if one.chance is None else f"{one.chance:.1f}"
            # Kinds are names from an untrusted file: no markup, and no control characters for the terminal.
            label = Text("".join(letter if letter.isprintable() else "\ufffd" for letter in one.name))
            table.add_row("" if place else way, label, f"{one.value:.1f}", between, chance, f"{one.items:,}")
        if len(metrics) > MOST_FIGURES:
            table.add_row("", f"... and {len(metrics) - MOST_FIGURES} more in {RESULT}")
        table.add_section()
    return table


def lines_of_suite(report: SuiteReport) -> list[str]:
    """Notes on the metrics: a subset, rows left out, images that the weights were trained on. Names in them are
    untrusted: no control characters are printed."""
    lines = list(report.notes)
    images = len({image for item in report.items for image in item.images})
    if len(report.items) < report.of:
        lines.append(f"measured on {len(report.items):,} of {report.of:,} items, with {images:,} images")
    for reason, rows in report.skipped.items():
        lines.append(f"left out: {len(rows):,} ({reason}), such as {rows[0]}")
    if report.trained_on is not None:
        lines.append(f"{report.trained_on:,} of these images were in the training data of the weights")
    return [one_line(line, 1000) for line in lines]


def write_result(
    folder: Path, name: str, suite: Suite, options: dict[str, Any], report: SuiteReport, model: PretrainedMaskVLM
) -> None:
    """Write `result.json`, with the metrics, the suite's card and what was measured on what, and `scores.jsonl`, with
    every item's scores, from which other metrics can be computed. options: plain values, as given."""
    result = {
        "suite": name,
        "told": suite.question,
        "licence": suite.licence,
        "traps": list(suite.traps),
        "options": options,
        "step": model.config.step,
        "files_sha256": digest_of(*report.files) if report.files else None,
        "items": len(report.items),
        "items_of_files": report.of,
        "trained_on": report.trained_on,
        "notes": report.notes,
        "skipped": report.skipped,
        "metrics": {
            way: {each.name: {key: value for key, value in each._asdict().items() if key != "name"} for each in figures}
            for way, figures in report.metrics.items()
        },
    }
    write_json(folder / RESULT, result)
    # Remove the scores of an earlier run, which would not belong to these metrics.
    (folder / SCORES).unlink(missing_ok=True)
    if sum(map(len, next(iter(report.scores.values())))) > MAX_SCORES:
        return
    lines = []
    for row, item in enumerate(report.items):
        facts = {"origin": item.origin, "kind": item.kind, "truth": item.truth}
        lines.append(
            json_ready(facts | {way: [float(each) for each in scores[row]] for way, scores in report.scores.items()})
        )
    write_text(folder / SCORES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
