"""Results of a study: means with intervals, differences paired by seed, and a verdict on each claim."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from maskvlm.study.definition import Claim, Comparison, Metric, Study
from maskvlm.study.earlier import FACTS, OF_STUDY, Outcome
from maskvlm.study.runs import METRICS, StudyRun

CONFIDENCE = 0.95
Verdict = Literal["holds", "does not hold", "undecided"]


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval by Student's t; the interval is NaN for fewer than two values.

    Attributes:
        values: number of values.
    """

    mean: float
    low: float
    high: float
    values: int


class Compared(NamedTuple):
    """A comparison with its result: how far `better` is ahead, paired by seed, in the metric's unit."""

    comparison: Comparison
    ahead: Interval
    by_seed: tuple[float, ...]
    verdict: Verdict


class Answer(NamedTuple):
    """A question with the results of all its comparisons."""

    question: Claim
    compared: tuple[Compared, ...]
    verdict: Verdict


def frame_of(study: Study, runs: Sequence[StudyRun], earlier: Mapping[str, Outcome] | None = None) -> pd.DataFrame:
    """One row for each run that is over: its facts, hours, every metric of its metrics.json, and the study's metrics.

    Args:
        earlier: outcomes of runs made elsewhere, by name; a run made here takes precedence.
    """
    rows = []
    for run in runs:
        outcome = outcome_of(run) or (earlier or {}).get(run.name)
        if outcome is None:
            continue
        values = (
            run.name, run.cell.name, run.cell.arm, run.cell.fraction, run.seed, outcome.hours, run.sha256,
            outcome.sha256, outcome.remark,
        )  # fmt: skip
        facts = dict(zip(FACTS, values, strict=True))
        # Prefixed, as a study's metric may have the name of a key or a fact.
        own = {OF_STUDY + name: metric.of(outcome.metrics) for name, metric in study.metrics.items()}
        rows.append(facts | own | dict(outcome.metrics))
    return pd.DataFrame(rows)


def outcome_of(run: StudyRun) -> Outcome | None:
    """The outcome of a run that is finished here or has diverged (then without metrics); otherwise None."""
    metrics, hours = run.metrics, (run.seconds or float("nan")) / 3600
    if metrics is None:
        return Outcome(hours, {}, "", run.diverged) if run.diverged else None
    content = (run.folder / METRICS).read_bytes()
    return Outcome(hours, metrics, hashlib.sha256(content).hexdigest(), run.remark)


def interval(values: Sequence[float], size: float = 0.0) -> Interval:
    """Mean and confidence interval of independent values, such as one per seed.

    Args:
        size: magnitude of the numbers whose differences the values are; the rounding of these is no spread.
    """
    sample = np.asarray(values, float)
    mean = float(sample.mean()) if len(sample) else float("nan")
    if len(sample) < 2:
        return Interval(mean, float("nan"), float("nan"), len(sample))
    error = stats.sem(sample)
    # SciPy's interval is NaN if there is no spread. Differences from rounding alone do not count as spread.
    if error <= 1e-9 * max(np.abs(sample).max(), size):
        return Interval(mean, mean, mean, len(sample))
    low, high = stats.t.interval(CONFIDENCE, len(sample) - 1, loc=mean, scale=error)
    return Interval(mean, float(low), float(high), len(sample))


def values_of(frame: pd.DataFrame, cell: str, metric: Metric) -> "pd.Series[float]":
    """Values of a metric in the runs of a cell: seed -> value."""
    if frame.empty:
        return pd.Series(dtype=float)
    column = frame[frame["cell"] == cell].set_index("seed")[OF_STUDY + metric.name]
    return column.dropna().astype(float)


def has_lost_runs(frame: pd.DataFrame, comparison: Comparison, metric: Metric) -> bool:
    """Whether a finished or diverged run of either cell lacks a metric that other runs of that cell have."""
    columns = [frame[frame["cell"] == cell][OF_STUDY + metric.name] for cell in comparison] if len(frame) else []
    return any(0 < values.count() < len(values) for values in columns)


def lead(frame: pd.DataFrame, comparison: Comparison, metric: Metric) -> "pd.Series[float]":
    """Seed -> how far `better` is ahead, for the seeds that both cells have."""
    better, than = (values_of(frame, cell, metric) for cell in comparison)
    ahead = (better - than).dropna()
    return -ahead if metric.lower else ahead


def answer(frame: pd.DataFrame, question: Claim) -> Answer:
    """What the runs made so far say about a claim."""
    compared = []
    for comparison in question.comparisons:
        ahead = lead(frame, comparison, question.metric)
        if question.more_than is not None:
            ahead = (ahead - lead(frame, question.more_than, question.metric)).dropna()
        pairs = [comparison, *([question.more_than] if question.more_than is not None else [])]
        # Of all values that were compared.
        sizes = [values_of(frame, cell, question.metric).abs().max() for pair in pairs for cell in pair]
        estimate = interval(ahead.tolist(), max((size for size in sizes if not math.isnan(size)), default=0.0))
        # If diverged runs were ignored, their arm would look better than it is, or its rival worse by comparison.
        lost = any(has_lost_runs(frame, pair, question.metric) for pair in pairs)
        compared.append(
            Compared(comparison, estimate, tuple(ahead), "undecided" if lost else verdict_by(estimate, question.by))
        )
    verdicts = {each.verdict for each in compared}
    # All must hold; a single one that does not hold decides.
    every: Verdict = "holds" if verdicts == {"holds"} else "undecided"
    return Answer(question, tuple(compared), "does not hold" if "does not hold" in verdicts else every)


def verdict_by(ahead: Interval, by: float) -> Verdict:
    """holds: the whole interval is above `by`; does not hold: it is below; undecided: it contains `by`, or there is no
    interval, for example because all seeds have the same difference and the spread is unknown."""
    if ahead.low == ahead.high:
        return "undecided"
    if ahead.low > by:
        return "holds"
    return "does not hold" if ahead.high < by else "undecided"
