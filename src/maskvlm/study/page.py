"""A study's page: verdicts, a table of all cells and a plot for each question, all computed from the runs.

`runs.csv` beside it has every run with its metrics and the SHA-256 of the metrics.json that they come from.
"""

import csv
import math
import shlex
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maskvlm.reporting.curves import BLUE, GREY, ORANGE
from maskvlm.study.analysis import Answer, Compared, Interval, answer, frame_of, interval, values_of
from maskvlm.study.definition import FIRST, Metric, Study
from maskvlm.study.earlier import PAGE, REMARK, RUN_SHA256, RUNS, Outcome
from maskvlm.study.runs import StudyRun
from maskvlm.utils.whole_files import whole_file, write_text

COLOUR = {"holds": BLUE, "does not hold": ORANGE, "undecided": GREY}


def write_page(
    study: Study,
    runs: Sequence[StudyRun],
    folder: Path,
    command: str,
    earlier: Mapping[str, Outcome] | None = None,
) -> Path:
    """Write the page, its plots and `runs.csv` from the runs that are over.

    Args:
        folder: output folder, created if necessary.
        command: the command that makes the study, shown on the page.
        earlier: outcomes of runs made elsewhere, by name.

    Returns:
        the path of the page.

    Raises:
        UserError: it cannot be written (73, or 74 for a full disk).
    """
    frame = frame_of(study, runs, earlier)
    answers = [answer(frame, question) for question in study.questions]
    measured = [each for each in answers if any(one.ahead.values for one in each.compared)]
    open_claims = [each for each in answers if each not in measured]
    keep_other_runs(folder, {*zip(frame["run"], frame[RUN_SHA256], strict=True)} if len(frame) else set())
    # Without runs not even the columns are known.
    write_text(folder / RUNS, frame.to_csv(index=False, lineterminator="\n") if len(frame) else "")
    for number, each in enumerate(measured, 1):
        with whole_file(folder / plot_name(number)) as temporary:
            figure_of(study, frame, each).savefig(temporary, dpi=110, format="png")
    write_text(folder / PAGE, text_of(study, runs, frame, measured, open_claims, command))
    return folder / PAGE


def keep_other_runs(folder: Path, kept: set[tuple[str, str]]) -> None:
    """Rename a table that has further runs: it may be the only record of runs made elsewhere.

    Args:
        kept: name and `run_sha256` of the runs that the new table has; a run of the same name with other options is
            another one.
    """
    path = folder / RUNS
    try:
        with path.open(newline="", encoding="utf-8") as file:
            others = {(row.get("run"), row.get(RUN_SHA256)) for row in csv.DictReader(file)} - kept
    except (OSError, UnicodeDecodeError, csv.Error):
        return
    if others:
        aside = path.with_name(f"before-{time.strftime('%Y%m%d-%H%M%S')}-{RUNS}")
        path.rename(aside)
        print(f"note: {aside} keeps {len(others)} runs that are no longer in {RUNS}", file=sys.stderr)


def plot_name(number: int) -> str:
    """File name of a question's plot; questions are numbered from 1."""
    return f"question-{number}.png"


# ---------------------------------------------------------------------- text


def text_of(
    study: Study,
    runs: Sequence[StudyRun],
    frame: pd.DataFrame,
    answers: Sequence[Answer],
    open_claims: Sequence[Answer],
    command: str,
) -> str:
    """The page in Markdown. answers: those with at least one measured comparison; open_claims: the others."""
    seeds = sorted({run.seed for run in runs})
    lines = [
        f"# {study.title}", "", *([study.about.strip(), ""] if study.about.strip() else []),
        f"Made by `{command}` from {len(frame)} of {len(runs)} runs ({len(study.cells)} cells, seeds "
        f"{', '.join(map(str, seeds))}; {_hours(frame)}). The command of a run begins "
        f"`maskvlm {study.run}`. [{RUNS}]({RUNS}) has each run's metrics. Intervals are of 95 %, by "
        "Student's t over the seeds; differences are paired by seed. A comparison holds, or does not, where the whole "
        "interval says so; of forty without any difference one is expected to hold, and one not to, by chance, more "
        "where a page is looked at while its seeds are still made. A claim holds where all of its comparisons do.",
        "",
    ]  # fmt: skip
    if study.first is not None:
        own = shlex.join(f"--{key}={value}" for key, value in study.first_options)
        start = f"Every run starts from the last weights of a run of its seed: {study.arms[FIRST]} (`{own}`)."
        unmade = sorted({run.seed for run in runs if run.start and run.start.diverged and not run.finished})
        if unmade:
            start += f" It diverged with seed {', '.join(map(str, unmade))}: the runs that start from it were not made."
        lines += [start, ""]
    remarked = frame[frame[REMARK] != ""] if len(frame) else frame
    if len(remarked):
        remarks = [f"{run} {remark}" for run, remark in zip(remarked["run"], remarked[REMARK], strict=True)]
        lines += [
            f"Not every run made all steps: {', '.join(remarks)}. A run that its score ended early is measured with "
            "its best weights, and counts as the others do. Without one that diverged its arm would look better than "
            "it is: what that arm is compared in is undecided.",
            "",
        ]
    if answers:
        lines += ["## Claims", "", "| | claim | against | ahead by | verdict |", "|---|---|---|---|---|"]
        for number, each in enumerate(answers, 1):
            # One line per comparison: a claim can fail in one comparison and be undecided in another.
            rows = [(_than(study, one), _ahead(one.ahead, each.question.metric), one.verdict) for one in each.compared]
            columns = ("<br>".join(column) for column in zip(*rows, strict=True))
            lines.append(f"| {number} | {_cell(each.question.claim)} | {' | '.join(columns)} |")
        lines.append("")
    if open_claims:
        reasons = (f"- {each.question.claim} ({_why_open(study, frame, each)})" for each in open_claims)
        lines += ["Not measured:", "", *reasons, ""]
    lines += ["## Cells", "", *cell_table(study, frame), ""]
    for number, each in enumerate(answers, 1):
        lines += [f"## {number}. {each.question.claim}", "", *_answer_lines(study, each), ""]
        lines += [f"![{_cell(each.question.claim)}]({plot_name(number)})", ""]
    return "\n".join(lines)


def _why_open(study: Study, frame: pd.DataFrame, each: Answer) -> str:
    """Why no comparison of a claim has a value, by its first one."""
    pair = each.compared[0].comparison
    for name in (*pair, *(each.question.more_than or ())):
        label = study.label(study.cell(name))
        over = frame[frame["cell"] == name] if len(frame) else frame
        if not len(over):
            return f"no run yet of: {label}"
        if not len(values_of(frame, name, each.question.metric)):
            diverged = over[REMARK].str.startswith("diverged").all()
            return f"{'every run diverged' if diverged else f'no {each.question.metric.name} in the runs'} of: {label}"
    return "its cells have no seed in common yet"


def _hours(frame: pd.DataFrame) -> str:
    """Total time of all runs; runs without a known time are counted separately, not as zero."""
    hours = frame["hours"] if len(frame) else pd.Series(dtype=float)
    unknown = len(hours) - hours.count()
    total = f"{hours.sum():.1f} hours of runs, waiting included"
    return f"at least {total}; the hours of {unknown} are not known" if unknown else total


def cell_table(study: Study, frame: pd.DataFrame) -> list[str]:
    """A row for each cell that has been run, with the means of the study's columns and half their intervals' widths."""
    metrics = [study.metrics[name] for name in study.columns]
    lines = [
        f"| | seeds | hours a run, waiting included | {' | '.join(_cell(f'{m.name}, {m.unit}') for m in metrics)} |"
    ]
    lines.append(f"|---|---|---|{'---|' * len(metrics)}")
    for cell in study.cells:
        rows = frame[frame["cell"] == cell.name] if len(frame) else frame
        if not len(rows):
            continue
        known = rows["hours"].count()
        hours = f"{rows['hours'].mean():.2f}" + (f" ({known})" if known < len(rows) else "") if known else ""
        intervals = [interval(values_of(frame, cell.name, metric).tolist()) for metric in metrics]
        means = [
            # With the number of runs, if not all of them have the metric; the same for hours.
            _mean(each, metric) + (f" ({each.values})" if 0 < each.values < len(rows) else "")
            for each, metric in zip(intervals, metrics, strict=True)
        ]
        lines.append(f"| {_cell(study.label(cell))} | {len(rows)} | {hours} | {' | '.join(means)} |")
    return lines


def _answer_lines(study: Study, each: Answer) -> list[str]:
    question = each.question
    unit = question.metric.unit
    measure = f"`{question.metric.name}` in {unit}" + (", less is better" if question.metric.lower else "")
    least = f", by more than {question.by:g} {unit}" if question.by else ""
    whole = "As a whole: " if len(each.compared) > 1 else ""
    lines = [
        f"{whole}**{each.verdict}**. Judged by {measure}{least}{f' ({question.source})' if question.source else ''}."
    ]
    if question.more_than is not None:
        better, than = (study.label(study.cell(name)) for name in question.more_than)
        lines.append(f"Ahead by more than {better} is ahead of {than}.")
    lines += ["", "| better | than | ahead by | verdict | seed by seed |", "|---|---|---|---|---|"]
    for one in each.compared:
        better = _cell(study.label(study.cell(one.comparison.better)))
        seeds = ", ".join(f"{value:+.3g}" for value in one.by_seed)
        ahead = _ahead(one.ahead, question.metric)
        lines.append(f"| {better} | {_than(study, one)} | {ahead} | {one.verdict} | {seeds} |")
    return lines


def _than(study: Study, one: Compared) -> str:
    """Description of the cell that the better one is compared with."""
    return _cell(study.label(study.cell(one.comparison.than)))


def _ahead(estimate: Interval, metric: Metric) -> str:
    if estimate.values == 0:
        return "not measured"
    if math.isnan(estimate.low):
        return f"{estimate.mean:+.3g} {metric.unit} (one seed)"
    if estimate.low == estimate.high:
        return f"{estimate.mean:+.3g} {metric.unit} ({estimate.values} seeds, all the same, so no interval)"
    return f"{estimate.mean:+.3g} {metric.unit} ({estimate.low:+.3g} to {estimate.high:+.3g}, {estimate.values} seeds)"


def _mean(estimate: Interval, metric: Metric) -> str:
    if estimate.values == 0:
        return ""
    digits = 1 if metric.unit == "points" else 3
    half = "" if math.isnan(estimate.low) else f" ± {(estimate.high - estimate.low) / 2:.{digits}f}"
    return f"{estimate.mean:.{digits}f}{half}"


def _cell(text: str) -> str:
    """The text, escaped for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


# ---------------------------------------------------------------------- plots


def figure_of(study: Study, frame: pd.DataFrame, each: Answer) -> Figure:
    """Plot of a question. Left: the values of every cell by seed, with mean and interval. Right: the differences."""
    question = each.question
    pairs = [one.comparison for one in each.compared] + ([question.more_than] if question.more_than else [])
    cells = list(dict.fromkeys(name for pair in pairs for name in pair))
    height = 1.2 + 0.55 * max(len(cells), len(each.compared))
    # A label is text: matplotlib would read "$2 to $5" as a formula.
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(10, height), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_levels(left, study, frame, cells, question.metric)
        draw_differences(right, study, each)
    return figure


def label_lines(text: str) -> str:
    """A label, wrapped to leave room for the plot."""
    return textwrap.fill(text, 34)


def draw_levels(axes: Axes, study: Study, frame: pd.DataFrame, cells: Sequence[str], metric: Metric) -> None:
    """Draw every run as a dot, and mean and interval as a bar."""
    for place, name in enumerate(cells):
        values = values_of(frame, name, metric).tolist()
        axes.plot(values, [place] * len(values), "o", color=GREY, alpha=0.5, markersize=4)
        if values:
            _bar(axes, interval(values), place, BLUE)
    axes.set_yticks(range(len(cells)), [label_lines(study.label(study.cell(name))) for name in cells], fontsize=8)
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.set_xlabel(f"{metric.name}, {metric.unit}", fontsize=8)
    axes.grid(axis="x", alpha=0.3)


def draw_differences(axes: Axes, study: Study, each: Answer) -> None:
    """Draw each comparison's lead with its interval, and the line that it must exceed."""
    axes.axvline(each.question.by, color="black", linewidth=0.8)
    for place, one in enumerate(each.compared):
        axes.plot(one.by_seed, [place] * len(one.by_seed), "o", color=GREY, alpha=0.5, markersize=4)
        if one.ahead.values:
            _bar(axes, one.ahead, place, COLOUR[one.verdict])
    than = [study.label(study.cell(one.comparison.than)) for one in each.compared]
    axes.set_yticks(range(len(than)), [label_lines(f"ahead of {name}") for name in than], fontsize=8)
    axes.set_ylim(len(than) - 0.5, -0.5)
    axes.set_xlabel(f"ahead by, {each.question.metric.unit} (95 %)", fontsize=8)
    axes.grid(axis="x", alpha=0.3)


def _bar(axes: Axes, estimate: Interval, place: int, colour: str) -> None:
    if not math.isnan(estimate.low):
        axes.plot([estimate.low, estimate.high], [place, place], color=colour, linewidth=2)
    axes.plot([estimate.mean], [place], "D", color=colour, markersize=6)
