"""Figures out of scores, whatever gave them. A tie, or a score that is no number, counts against the model: ranked, it
is the lowest.

Shapes: P positives, N negatives, J judged pairs.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from scipy import stats

from maskvlm.suites.suite import SuiteMetric


def first_is_best(scores: Sequence[float]) -> bool:
    """Whether the first score is above all others."""
    return all(scores[0] > other for other in scores[1:])


def clustered_interval(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float] | None:
    """95 % interval of the mean of shares, 0 to 1, that depend on each other within a group, such as those of the
    captions of an image: by Student's t over the groups, and by Wilson's rule for so many groups where all values are 0
    or all are 1. None for fewer than two groups, and where all groups have one mean: they say nothing of the spread.
    """
    mean = sum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    count = len(sums)
    if count < 2:
        return None
    if mean in (0.0, 1.0):
        wilson = stats.binomtest(round(mean * count), count).proportion_ci(method="wilson")
        return float(wilson.low), float(wilson.high)
    error = math.sqrt(sum(each**2 for each in sums.values()) * count / (count - 1)) / len(values)
    if error < 1e-12:
        return None
    margin = float(stats.t.ppf(0.975, count - 1)) * error
    return max(0.0, mean - margin), min(1.0, mean + margin)


def percent_right(
    name: str, right: Sequence[bool | float], chance: float | None, groups: Sequence[Hashable]
) -> SuiteMetric:
    """Share of right answers in percent, with its interval over groups (images).

    Args:
        right: 0 to 1 of each item. chance: percent.
    """
    if not right:
        return SuiteMetric(name, math.nan, chance, 0)
    values = [float(each) for each in right]
    within = clustered_interval(values, groups)
    percent = None if within is None else (100 * within[0], 100 * within[1])
    return SuiteMetric(name, 100 * sum(values) / len(values), chance, len(values), percent)


def area_under_curve(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Share of all pairs of a positive and a negative where the positive scores higher; a tie is half."""
    positive_P1 = torch.tensor(positives, dtype=torch.float64)[:, None]
    negative_N = torch.tensor(negatives, dtype=torch.float64)
    # (P, 1) against (N,) -> (P, N)
    return float(((positive_P1 > negative_N).double() + (positive_P1 == negative_N).double() / 2).mean())


def kendall_tau(scores: Sequence[float], truth: Sequence[float], variant: str) -> float:
    """Kendall's tau, -1 to 1; 0 of scores that are all alike. variant: `b`, or `c` where the two have scales of
    different lengths (Stuart)."""
    return _number(stats.kendalltau(ranked(scores), truth, variant=variant).statistic)


def spearman_rho(scores: Sequence[float], truth: Sequence[float]) -> float:
    """Spearman's rank correlation, -1 to 1; 0 of scores that are all alike. Ties get their mean rank."""
    score_J = ranked(scores)
    # scipy would warn of a correlation that is not defined.
    return 0.0 if np.ptp(score_J) == 0 else _number(stats.spearmanr(score_J, truth).statistic)


def ranked(scores: Sequence[float]) -> np.ndarray:
    """The scores' ranks, [J], of which 0 is that of all that are no numbers."""
    score_J = np.asarray(scores, dtype=np.float64)
    lost_J = np.isnan(score_J)
    rank_J = np.zeros(len(score_J))
    rank_J[~lost_J] = stats.rankdata(score_J[~lost_J])
    return rank_J


def _number(value: float) -> float:
    """0 where nothing is known of the order."""
    return 0.0 if math.isnan(value) else float(value)


def map_at_r_chance(relevant: int, total: int) -> float:
    """Expected mAP@R of a random order, 0 to 1: the item at place r is relevant with R / N, and the r - 1 before it are
    then of the other R - 1 among N - 1."""
    if total < 2:
        return float(relevant > 0)
    places = range(1, relevant + 1)
    before = (relevant - 1) / (total - 1)
    return sum((1 + (place - 1) * before) / place for place in places) / total
