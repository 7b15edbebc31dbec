"""The metrics of an evaluation as a table, each beside its chance level, and the paper's claim as numbers."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from maskvlm.objectives.retrieval_metrics import KS
from maskvlm.reporting.meters import number

SIZES = {"retrieval/pictures": "images", "retrieval/captions": "captions"}
RETRIEVAL = (
    ("captions of an image, contrast alone", "retrieval/itc_tr_r"),
    ("captions of an image, re-ranked", "retrieval/tr_r"),
    ("image of a caption, contrast alone", "retrieval/itc_ir_r"),
    ("image of a caption, re-ranked", "retrieval/ir_r"),
)
SUMS = (
    ("sum of both ways, contrast alone", "retrieval/itc_rsum"),
    ("sum of both ways, re-ranked", "retrieval/rsum"),
)
SWEPT = re.compile(r"retrieval/(k\d+|k_all)_(tr|ir)_r1")
LEVELS = ("_majority", "_chance")


class Measured(NamedTuple):
    """One number, asked with the right partner, with another row's, and with none.

    Attributes:
        name: what a reader sees.
        key: in the metrics; `_wrong_image`, `_no_image` (or `_text`) and `_chance` follow it.
        partner: `image` or `text`.
        digits: after the point.
        gain: `points` (more is better), `nats` (less is better) or `%` (less is better, relative).
    """

    name: str
    key: str
    partner: str
    digits: int
    gain: str


WORDS = (
    Measured("accuracy, %", "mlm/accuracy", "image", 1, "points"),
    Measured("loss, nats", "mlm/nats", "image", 3, "nats"),
)
PIXELS = (
    Measured("squared error", "mim/mse", "text", 4, "%"),
    Measured("absolute error", "mim/l1", "text", 4, "%"),
    Measured("squared, objects", "mim/object_mse", "text", 4, "%"),
    Measured("absolute, objects", "mim/object_l1", "text", 4, "%"),
)


def gain(kind: str, right: float, other: float) -> str:
    """How much better the right partner is: `+13.9` points, `+0.520` nats, `+12.2 %` less error; `-` unknown.

    Positive is better in all three; a worse right partner has a minus.
    """
    if math.isnan(right) or math.isnan(other):
        return "-"
    if kind == "points":
        return f"{right - other:+.1f}"
    if kind == "nats":
        return f"{other - right:+.3f}"
    return f"{100 * (other - right) / other:+.1f} %" if other else "-"


def metrics_table(metrics: Mapping[str, float]) -> Table:
    """What was measured, in groups: retrieval, masked words, masked pixels, downstream tasks, whatever else there is.

    Args:
        metrics: names and values as a task's `compute` gives them; any may be missing.
    """
    parts = [
        retrieval_table(metrics),
        sweep_table(metrics),
        partner_table("Words, with image", WORDS, metrics),
        partner_table("Pixels, with caption", PIXELS, metrics),
        *(table for name in tasks_of(metrics) for table in (task_table(name, metrics), confusion_table(name, metrics))),
        other_table(metrics),
    ]
    whole = Table.grid()
    for part in parts:
        if part is not None:
            whole.add_row(part)
    if claims := claim_line(metrics):
        whole.add_row(Text(claims, style="bold"))
    return whole


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(Text(title), no_wrap=True)
    for column in columns:
        # `Text`, as a label may hold what rich takes for markup.
        table.add_column(Text(column), justify="right", no_wrap=True)
    return table


def retrieval_table(metrics: Mapping[str, float]) -> Table | None:
    """Recall in percent, by contrast alone and re-ranked, with what a random order reaches."""
    sizes = [f"{metrics[key]:.0f} {name}" for key, name in SIZES.items() if key in metrics]
    among = f" ({', '.join(sizes)})" if sizes else ""
    table = _table(f"Recall in %{among}", [f"R@{k}" for k in KS])
    # tr: texts for an image; ir: images for a text. Each way is followed by its chance level.
    for direction in ("tr", "ir"):
        for name, key in RETRIEVAL:
            if key.endswith(f"{direction}_r") and f"{key}1" in metrics:
                table.add_row(name, *(f"{metrics[f'{key}{k}']:.1f}" for k in KS))
        chance = [metrics.get(f"retrieval/{direction}_r{k}_chance", math.nan) for k in KS]
        if table.rows and not math.isnan(chance[0]):
            table.add_row("  by chance", *(f"{value:.1f}" for value in chance), style="dim")
    for name, key in SUMS:
        if table.rows and key in metrics:
            table.add_row(name, "", "", f"{metrics[key]:.1f}")
    return table if table.rows else None


def sweep_table(metrics: Mapping[str, float]) -> Table | None:
    """R@1 in percent both ways for every number of candidates that matching has ranked again."""
    table = _table("R@1 in %, candidates re-ranked", ["captions", "images"])
    for name in metrics:
        if match := SWEPT.fullmatch(name):
            row = [f"{metrics.get(f'retrieval/{match[1]}_{side}_r1', math.nan):.1f}" for side in ("tr", "ir")]
            # Each number of candidates is in two names: a row at the first of them.
            if match[2] == "tr":
                table.add_row(match[1].removeprefix("k").removeprefix("_"), *row)
    return table if table.rows else None


def tasks_of(metrics: Mapping[str, float]) -> list[str]:
    """Prefixes of the downstream tasks that give an accuracy, or say how many examples were measured."""
    own = [name for name in metrics if name.count("/") == 1 and name.endswith(("/accuracy", "/examples"))]
    tasks = dict.fromkeys(name.partition("/")[0] for name in own)
    return [name for name in tasks if name != "mlm"]


def percentages(task: str, metrics: Mapping[str, float]) -> list[str]:
    """Metrics of a task that are percentages: accuracy of all and by kind, recall by class, whatever has a level."""
    own = [name for name in metrics if name.startswith(f"{task}/") and not name.endswith(LEVELS)]
    kinds = ("accuracy", "recall/")
    return [n for n in own if n.split("/", 1)[1].startswith(kinds) or any(n + end in metrics for end in LEVELS)]


def task_table(task: str, metrics: Mapping[str, float]) -> Table | None:
    """Percentages, each beside the chance level (the most frequent answer's, or chance), by kind below."""
    among = f" ({metrics[f'{task}/examples']:.0f} examples)" if f"{task}/examples" in metrics else ""
    names = percentages(task, metrics)
    levels = any(name + end in metrics for name in names for end in LEVELS)
    # CIDEr of captions is a hundred times a mean, as percentages are, but no share of anything.
    unit = "%" if f"{task}/accuracy" in metrics else "x 100"
    table = _table(f"{task}{among}", [unit, "chance level"] if levels else [unit])
    for name in names:
        # The majority where there is one, else chance.
        known = [f"{metrics[name + end]:.1f} ({end[1:]})" for end in LEVELS if name + end in metrics]
        # accuracy/KIND stands indented below the accuracy of all.
        label = name.split("/", 1)[1].replace("accuracy/", "  ", 1).replace("recall/", "recall, ", 1)
        cells = [f"{metrics[name]:.1f}", *([known[0] if known else ""] * levels)]
        table.add_row(Text(label.replace("accuracy_", "accuracy, ", 1)), *cells)
    return table if table.rows else None


def confusion_table(task: str, metrics: Mapping[str, float]) -> Table | None:
    """How often each class was taken for which: a row a truth, a column an answer."""
    start = f"{task}/confusion/"
    # The labels by the diagonal, where each is taken for itself: a label may hold `_as_`.
    right = (re.fullmatch(rf"{re.escape(start)}(.+)_as_\1", name) for name in metrics)
    labels = [match[1] for match in right if match]
    table = _table("truth, and what was said", labels)
    for truth in labels:
        counts = (metrics.get(f"{start}{truth}_as_{answer}", math.nan) for answer in labels)
        table.add_row(Text(truth), *(f"{count:.0f}" for count in counts))
    return table if table.rows else None


def partner_table(title: str, measured: Sequence[Measured], metrics: Mapping[str, float]) -> Table | None:
    """Each number with the right partner, a wrong one and none, and what the right one gains over both."""
    columns = ["right", "wrong", "none", "vs wrong", "vs none"]
    chances = any(f"{m.key}_chance" in metrics for m in measured)
    table = _table(title, [*columns, "chance"] if chances else columns)
    for m in measured:
        if m.key not in metrics:
            continue
        wrong, none = f"{m.key}_wrong_{m.partner}", f"{m.key}_no_{m.partner}"
        values = [metrics.get(key, math.nan) for key in (m.key, wrong, none)]
        cells = ["-" if math.isnan(value) else f"{value:.{m.digits}f}" for value in values]
        # Against the wrong partner, and against none.
        cells += [gain(m.gain, values[0], other) for other in values[1:]]
        chance = metrics.get(f"{m.key}_chance")
        # True counts as one cell, False as none: there may be no such column.
        table.add_row(m.name, *cells, *(["" if chance is None else f"{chance:.{m.digits}f}"] * chances))
    return table if table.rows else None


def other_table(metrics: Mapping[str, float]) -> Table | None:
    """What no group above knows, by name."""
    # What the tables above have shown; the rest is listed as it is.
    known = {f"{key}{k}{end}" for _, key in RETRIEVAL for k in KS for end in ("", "_chance")}
    known |= {*SIZES, *(key for _, key in SUMS), "score"}  # the score repeats what another group shows
    known |= {name for name in metrics if SWEPT.fullmatch(name)}
    for task in tasks_of(metrics):
        known |= {f"{name}{end}" for name in percentages(task, metrics) for end in ("", *LEVELS)} | {f"{task}/examples"}
        known |= {name for name in metrics if name.startswith(f"{task}/confusion/")}
    for m in (*WORDS, *PIXELS):
        ends = ("", f"_wrong_{m.partner}", f"_no_{m.partner}", "_chance", "_gain")
        known |= {f"{m.key}{end}" for end in ends}
    table = _table("Metric", ["value"])
    for name, value in metrics.items():
        if name not in known:
            table.add_row(Text(name), f"{value:.4g}")
    return table if table.rows else None


def claim_line(metrics: Mapping[str, float]) -> str:
    """The paper's claim in one sentence: what the right partner is worth; "" where neither was measured."""
    parts = []
    if "mlm/accuracy_wrong_image" in metrics:
        points, nats = (gain(m.gain, metrics[m.key], metrics[f"{m.key}_wrong_image"]) for m in WORDS)
        parts.append(f"masked words {points} points right ({nats} nats)")
    if "mim/mse_wrong_text" in metrics:
        less = gain("%", metrics["mim/mse"], metrics["mim/mse_wrong_text"])
        parts.append(f"masked pixels {less} less squared error")
    return f"Gain of the right partner over a wrong one: {', '.join(parts)}" if parts else ""


def score_line(metrics: Mapping[str, float]) -> str:
    """What a downstream task is judged by, in a few words: `accuracy 71.3 (majority 29.7)`."""
    names = [name for name in metrics if name.count("/") == 1 and name.endswith("/accuracy")]
    if not names:
        return f"score {number(metrics['score'])}" if "score" in metrics else ""
    # A share of right answers says nothing without what the most frequent answer reaches.
    level = metrics.get(f"{names[0]}_majority", math.nan)
    known = "" if math.isnan(level) else f" (majority {level:.1f})"
    return f"accuracy {metrics[names[0]]:.1f}{known}"
