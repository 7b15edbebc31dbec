"""`curves.png`: a run's losses with their chance levels, held-out metrics, learning rates and speed."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maskvlm.reporting.meters import NOT_LOSSES, number
from maskvlm.reporting.metric_tables import LEVELS, percentages

Rows = Sequence[Mapping[str, float]]
"""Logged values, in order; every row has `step`."""

BLUE, ORANGE, GREY = "#1f6fb4", "#d9601a", "#7a7a7a"
COLOURS = (BLUE, ORANGE, "#2e9350", "#8a5bb5", "#b0892b", GREY)
COLUMNS = 3
NO_DECAY = " (no decay)"
"""Suffix of Lightning's names for parameter groups without weight decay."""
TITLES = {
    "itc": "ITC: contrast",
    "itm": "ITM: matching",
    "mlm": "MLM: masked words",
    "mim": "MIM: masked pixels",
    "words": "Words of the caption from the image",
}


class Curve(NamedTuple):
    """One curve of a held-out panel."""

    key: str
    label: str
    colour: str
    style: str = "-"


WORDS = (
    Curve("mlm/accuracy", "right image", BLUE),
    Curve("mlm/accuracy_wrong_image", "wrong image", ORANGE),
    Curve("mlm/accuracy_no_image", "no image", GREY),
)
PIXELS = (
    Curve("mim/mse", "right caption", BLUE),
    Curve("mim/mse_wrong_text", "wrong caption", ORANGE),
    Curve("mim/mse_no_text", "no caption", GREY),
)
RECALL = (
    Curve("retrieval/tr_r1", "captions of an image", BLUE),
    Curve("retrieval/itc_tr_r1", "(contrast alone)", BLUE, ":"),
    Curve("retrieval/ir_r1", "image of a caption", ORANGE),
    Curve("retrieval/itc_ir_r1", "(contrast alone)", ORANGE, ":"),
)
KNOWN = ("train/", "level/", "lr", "mlm/", "mim/", "retrieval/")


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a CSVLogger's metrics.csv; empty cells are left out."""
    with path.open(newline="") as file:
        return [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]


def series(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one key."""
    # Values that are not finite cannot be plotted.
    pairs = [(row["step"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
    return [step for step, _ in pairs], [value for _, value in pairs]


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Mean over `reach` values to either side: over fewer at the start, where losses fall fast, and over those
    available at the end."""
    means = []
    for place in range(len(values)):
        # The same number of values on both sides, except at the end.
        near = min(reach, place)
        window = values[place - near : place + near + 1]
        means.append(sum(window) / len(window))
    return means


def curves(source: Path | Rows, path: Path, levels: Mapping[str, float] | None = None, title: str = "") -> Path:
    """Draw the curves of a run.

    Args:
        source: the CSVLogger's metrics.csv, or its rows.
        path: path of the PNG; its folder must exist.
        levels: chance levels of losses for which none was logged as `level/<loss>`.
        title: title above all panels.

    Returns:
        `path`.
    """
    rows = read_rows(source) if isinstance(source, Path) else source
    figure = draw_curves(rows, levels or {}, title)
    figure.savefig(path, format="png", dpi=110)
    return path


def draw_curves(rows: Rows, levels: Mapping[str, float], title: str = "") -> Figure:
    """One panel for each loss, each group of held-out metrics, the learning rates, and the speed."""
    keys = {key for row in rows for key in row}
    # Known losses in the order of TITLES, then the others by name.
    losses = sorted(key for key in keys if key.startswith("train/") and key not in NOT_LOSSES)
    losses.sort(key=lambda key: [*TITLES, key.removeprefix("train/")].index(key.removeprefix("train/")))
    held_out = [(RECALL, "recall@1, %"), (WORDS, "masked words right, %")]
    held_out.append((PIXELS, "squared error of masked pixels"))
    groups = [part for part in held_out if any(line.key in keys for line in part[0])]
    others = sorted({key.split("/")[0] for key in keys if "/" in key and not key.startswith(KNOWN)})
    # A group without decay has the same rate as its twin, if there is one.
    rates = [key for key in sorted(keys) if key.startswith("lr") and key.removesuffix(NO_DECAY) not in keys - {key}]
    speed = "train/pairs_per_second" in keys
    count = len(losses) + len(groups) + len(others) + bool(rates) + speed
    figure, panels = grid(count, title)
    for key in losses:
        draw_loss(next(panels), rows, key.removeprefix("train/"), levels)
    for lines, name in groups:
        draw_lines(next(panels), rows, lines, name)
    for group in others:
        draw_lines(next(panels), rows, task_curves(group, rows), group)
    if rates:
        draw_rates(next(panels), rows, rates)
    if speed:
        draw_speed(next(panels), rows)
    # The same range of steps for all panels.
    last = max((row["step"] for row in rows), default=1)
    for axes in figure.axes:
        axes.set_xlim(0, 1.02 * max(last, 1))
    return figure


def task_curves(group: str, rows: Rows) -> tuple[Curve, ...]:
    """A task's percentages over all examples, each with its chance level dashed; if it has none, all of its metrics.
    The metric that is the score comes first. Kinds of examples are shown in the table only."""
    keys = {key: 0.0 for row in rows for key in row}
    own = [key for key in sorted(keys) if key.startswith(f"{group}/") and key.count("/") == 1]
    own = [key for key in own if not key.endswith((*LEVELS, "/examples"))]
    shares = [key for key in percentages(group, keys) if key in own]
    # Without metrics derived from another one, such as the `accuracy_ceiling` of an accuracy.
    names = [key for key in shares or own if not any(key.startswith(f"{other}_") for other in own)]
    score = {key for row in rows for key in names if key in row and row[key] == row.get("score")}
    names.sort(key=lambda key: key not in score)
    lines: list[Curve] = []
    for key, colour in zip(names, COLOURS, strict=False):
        lines.append(Curve(key, key.split("/", 1)[1], colour))
        # The dashed lines appear in the legend once: a leading underscore hides a label.
        label = "_level" if any(line.style == "--" for line in lines) else "chance level"
        lines += [Curve(f"{key}{end}", label, colour, "--") for end in LEVELS if f"{key}{end}" in keys]
    return tuple(lines)


def grid(count: int, title: str) -> tuple[Figure, "Panels"]:
    """A figure with room for `count` panels."""
    columns = min(COLUMNS, max(1, count))
    lines = max(1, math.ceil(count / columns))
    figure = Figure(figsize=(4.2 * columns, 2.7 * lines + 0.3), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11, parse_math=False)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    return figure, Panels(list(axes), count)


class Panels:
    """Yields the panels in order; those beyond `count` stay blank."""

    def __init__(self, axes: list[Axes], count: int) -> None:
        self.axes = iter(axes[:count])
        for spare in axes[count:]:
            spare.set_axis_off()

    def __next__(self) -> Axes:
        axes = next(self.axes)
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        return axes


def draw_loss(axes: Axes, rows: Rows, name: str, levels: Mapping[str, float]) -> None:
    """Draw a loss: the logged values in a pale colour, their running mean, and the chance level."""
    steps, values = series(rows, f"train/{name}")
    axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values, len(values) // 25), color=BLUE, linewidth=1.6)
    level_steps, level = series(rows, f"level/{name}")
    if not level and name in levels and steps:
        level_steps, level = [steps[0], steps[-1]], [levels[name]] * 2
    if level:
        # A level may change with the batch, as for masked pixels.
        level = smooth(level, len(level) // 6)
        label = f"knows nothing: {number(level[-1])}"
        axes.plot(level_steps, level, color="black", linestyle="--", linewidth=1, label=label)
        axes.legend(fontsize=7.5, frameon=False, loc="upper right")
    axes.set_title(TITLES.get(name, name), fontsize=10, parse_math=False)
    settled = values[len(values) // 20 :]  # the first values may be far above all others
    if settled:
        low, top = min(*settled, *level, settled[0]), max(*settled, *level, settled[0])
        # More room at the top, for the legend.
        axes.set_ylim(low - 0.06 * (top - low or 1), top + 0.25 * (top - low or 1))


def draw_lines(axes: Axes, rows: Rows, lines: Sequence[Curve], title: str) -> None:
    """Draw held-out metrics over steps. Retrieval among a different number of images is not comparable, so a line only
    joins values with the same number; stars mark the largest."""
    retrieval = any(line.key.startswith("retrieval/") for line in lines)
    sizes: list[float] = sorted({row["retrieval/pictures"] for row in rows if "retrieval/pictures" in row})
    # Evaluations during training may have fewer images than the last one.
    split = retrieval and len(sizes) > 1
    for line in lines:
        for size in sizes if split else [None]:
            part = [row for row in rows if size is None or row.get("retrieval/pictures") == size]
            star = size is not None and size == sizes[-1]
            # Stars have no label, so that each line is in the legend once.
            look: dict[str, Any] = (
                {"marker": "*", "markersize": 9} if star else {"marker": "o", "markersize": 3.5, "label": line.label}
            )
            # A single point is not a line.
            style = line.style if len(series(part, line.key)[0]) > 1 else "none"
            fill = line.colour if line.style == "-" else "white"
            axes.plot(
                *series(part, line.key), linestyle=style, color=line.colour, linewidth=1.5,
                markerfacecolor=fill, **look,
            )  # fmt: skip
    among = f", of {sizes[0]:.0f} images (stars: {sizes[-1]:.0f})" if split else ""
    axes.set_title(f"{title}{among}", fontsize=10, parse_math=False)
    if retrieval:
        axes.set_ylim(bottom=0)
    low, top = axes.get_ylim()
    entries = sum(not line.label.startswith("_") for line in lines)
    axes.set_ylim(low, top + 0.12 * entries / 2 * (top - low))  # room for the legend
    if entries:
        axes.legend(fontsize=7, frameon=False, loc="upper left", ncols=2)


def draw_rates(axes: Axes, rows: Rows, keys: Sequence[str]) -> None:
    """Draw the learning rates by parameter group; groups with the same rate are drawn once."""
    drawn: list[list[float]] = []
    for key in keys:
        steps, values = series(rows, key)
        # Groups with the same rate would hide each other.
        if values not in drawn:
            axes.plot(
                steps,
                values,
                color=COLOURS[len(drawn) % len(COLOURS)],
                linewidth=1.5,
                label=key.split("/")[-1],
            )
            drawn.append(values)
    axes.set_title("learning rate", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.yaxis.get_offset_text().set_fontsize(8)
    if len(drawn) > 1:
        axes.legend(fontsize=7, frameon=False)


def draw_speed(axes: Axes, rows: Rows) -> None:
    """Draw the pairs per second; the title has the mean share of time spent waiting for data."""
    axes.plot(*series(rows, "train/pairs_per_second"), color=BLUE, linewidth=1.2)
    axes.set_ylim(bottom=0)
    waits = series(rows, "train/data_wait")[1]
    wait = f" (waiting for data: {100 * sum(waits) / len(waits):.0f} %)" if waits else ""
    axes.set_title(f"pairs per second{wait}", fontsize=10)
