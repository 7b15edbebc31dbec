"""The metrics of an evaluation as tables with chance levels, and the paper's claim in numbers."""

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
    """A metric measured with the right partner, with another row's, and with none.

    Attributes:
        name: name for display.
        key: its key in the metrics; suffixes are `_wrong_image`, `_no_image` (or `_text`) and `_chance`.
        partner: `image` or `text`.
        digits: number of decimals.
        gain: `points` (higher is better), `nats` (lower is better) or `%` (lower is better, relative).
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
    """How much better the right partner is: `+13.9` points, `+0.520` nats, `+12.2 %` less error; `-` if unknown.

    Positive is better in all three; the sign is negative if the right partner is worse.
    """
    if math.isnan(right) or math.isnan(other):
        return "-"
    if kind == "points":
        return f"{right - other:+.1f}"
    if kind == "nats":
        return f"{other - right:+.3f}"
    return f"{100 * (other - right) / other:+.1f} %" if other else "-"


def metrics_table(metrics: Mapping[str, float]) -> Table:
    """The metrics in groups: retrieval, masked words, masked pixels, downstream tasks, and the rest.

    Args:
        metrics: names and values from a task's `compute`; any may be missing.
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
        # `Text`, as rich would interpret brackets in a label as markup.
        table.add_column(Text(column), justify="right", no_wrap=True)
    return table


def retrieval_table(metrics: Mapping[str, float]) -> Table | None:
    """Recall in percent, by contrast alone and re-ranked, with that of a random order."""
    sizes = [f"{metrics[key]:.0f} {name}" for key, name in SIZES.items() if key in metrics]
    among = f" ({', '.join(sizes)})" if sizes else ""
    table = _table(f"Recall in %{among}", [f"R@{k}" for k in KS])
    # tr: texts for an image; ir: images for a text. Each direction is followed by its chance level.
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
    """R@1 in percent in both directions, for each number of candidates re-ranked by matching."""
    table = _table("R@1 in %, candidates re-ranked", ["captions", "images"])
    for name in metrics:
        if match := SWEPT.fullmatch(name):
            row = [f"{metrics.get(f'retrieval/{match[1]}_{side}_r1', math.nan):.1f}" for side in ("tr", "ir")]
            # Each number of candidates is in two names: add the row at one of them.
            if match[2] == "tr":
                table.add_row(match[1].removeprefix("k").removeprefix("_"), *row)
    return table if table.rows else None


def tasks_of(metrics: Mapping[str, float]) -> list[str]:
    """Prefixes of the downstream tasks that have an accuracy or a number of examples."""
    own = [name for name in metrics if name.count("/") == 1 and name.endswith(("/accuracy", "/examples"))]
    tasks = dict.fromkeys(name.partition("/")[0] for name in own)
    return [name for name in tasks if name != "mlm"]


def percentages(task: str, metrics: Mapping[str, float]) -> list[str]:
    """Metrics of a task that are percentages: accuracy overall and by kind, recall by class, any with a level."""
    own = [name for name in metrics if name.startswith(f"{task}/") and not name.endswith(LEVELS)]
    kinds = ("accuracy", "recall/")
    return [n for n in own if n.split("/", 1)[1].startswith(kinds) or any(n + end in metrics for end in LEVELS)]


def task_table(task: str, metrics: Mapping[str, float]) -> Table | None:
    """Percentages of a task, each beside its level (that of the most frequent answer, or chance); kinds below."""
    among = f" ({metrics[f'{task}/examples']:.0f} examples)" if f"{task}/examples" in metrics else ""
    names = percentages(task, metrics)
    levels = any(name + end in metrics for name in names for end in LEVELS)
    # CIDEr is a mean times a hundred, like a percentage, but not a fraction of anything.
    unit = "%" if f"{task}/accuracy" in metrics else "x 100"
    table = _table(f"{task}{among}", [unit, "chance level"] if levels else [unit])
    for name in names:
        # The majority if there is one, else chance.
        known = [f"{metrics[name + end]:.1f} ({end[1:]})" for end in LEVELS if name + end in metrics]
        # accuracy/KIND is indented below the overall accuracy.
        label = name.split("/", 1)[1].replace("accuracy/", "  ", 1).replace("recall/", "recall, ", 1)
        cells = [f"{metrics[name]:.1f}", *([known[0] if known else ""] * levels)]
        table.add_row(Text(label.replace("accuracy_", "accuracy, ", 1)), *cells)
    return table if table.rows else None


def confusion_table(task: str, metrics: Mapping[str, float]) -> Table | None:
    """The confusion matrix: one row per true class, one column per answer."""
    start = f"{task}/confusion/"
    # The labels are taken from the diagonal, as a label may contain `_as_`.
    right = (re.fullmatch(rf"{re.escape(start)}(.+)_as_\1", name) for name in metrics)
    labels = [match[1] for match in right if match]
    table = _table("truth, and what was said", labels)
    for truth in labels:
        counts = (metrics.get(f"{start}{truth}_as_{answer}", math.nan) for answer in labels)
        table.add_row(Text(truth), *(f"{count:.0f}" for count in counts))
    return table if table.rows else None


def partner_table(title: str, measured: Sequence[Measured], metrics: Mapping[str, float]) -> Table | None:
    """Each metric with the right partner, a wrong one and none, and the gain of the right one over both."""
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
        # True adds one cell, False none, as there may be no such column.
        table.add_row(m.name, *cells, *(["" if chance is None else f"{chance:.{m.digits}f}"] * chances))
    return table if table.rows else None


def other_table(metrics: Mapping[str, float]) -> Table | None:
    """The metrics that are in no group above, by name."""
    # Those in the tables above; the rest is listed unchanged.
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
    """The paper's claim in one sentence: the gain of the right partner; "" if neither part was measured."""
    parts = []
    if "mlm/accuracy_wrong_image" in metrics:
        points, nats = (gain(m.gain, metrics[m.key], metrics[f"{m.key}_wrong_image"]) for m in WORDS)
        parts.append(f"masked words {points} points right ({nats} nats)")
    if "mim/mse_wrong_text" in metrics:
        less = gain("%", metrics["mim/mse"], metrics["mim/mse_wrong_text"])
        sign = {"+": "less", "-": "more"}[less[0]]
        parts.append(f"masked pixels {less[1:] or 'unknown'} {sign} squared error")
    return f"Gain of the right partner over a wrong one: {', '.join(parts)}" if parts else ""


def score_line(metrics: Mapping[str, float]) -> str:
    """The main metric of a downstream task, in a few words: `accuracy 71.3 (majority 29.7)`."""
    names = [name for name in metrics if name.count("/") == 1 and name.endswith("/accuracy")]
    if not names:
        return f"score {number(metrics['score'])}" if "score" in metrics else ""
    # An accuracy means little without that of the most frequent answer.
    level = metrics.get(f"{names[0]}_majority", math.nan)
    known = "" if math.isnan(level) else f" (majority {level:.1f})"
    return f"accuracy {metrics[names[0]]:.1f}{known}"
