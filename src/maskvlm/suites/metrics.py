"""Metrics from scores of any kind. A tie or a NaN counts against the model; in a ranking, NaN is the lowest score.

Shapes: P positives, N negatives, J judged pairs.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from scipy import stats

from maskvlm.suites.suite import SuiteMetric


def first_is_best(scores: Sequence[float]) -> bool:
    """Whether the first score is higher than all others."""
    return all(scores[0] > other for other in scores[1:])


def clustered_interval(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float] | None:
    """95 % interval of the mean of fractions from 0 to 1 that are dependent within a group, such as the captions of an
    image: by Student's t over the groups, or by Wilson's rule for that many groups if all values are 0 or all are 1.
    None for fewer than two groups, or if all groups have the same mean, as the spread is then unknown.
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
    """Percentage of correct answers, with its interval over groups (images).

    Args:
        right: value of each item, 0 to 1. chance: chance level in percent.
    """
    if not right:
        return SuiteMetric(name, math.nan, chance, 0)
    values = [float(each) for each in right]
    within = clustered_interval(values, groups)
    percent = None if within is None else (100 * within[0], 100 * within[1])
    return SuiteMetric(name, 100 * sum(values) / len(values), chance, len(values), percent)


def area_under_curve(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Fraction of all pairs of a positive and a negative in which the positive scores higher; a tie counts half."""
    positive_P1 = torch.tensor(positives, dtype=torch.float64)[:, None]
    negative_N = torch.tensor(negatives, dtype=torch.float64)
    # (P, 1) against (N,) -> (P, N)
    return float(((positive_P1 > negative_N).double() + (positive_P1 == negative_N).double() / 2).mean())


def kendall_tau(scores: Sequence[float], truth: Sequence[float], variant: str) -> float:
    """Kendall's tau, -1 to 1; 0 if all scores are equal. variant: `b`, or `c` (Stuart) if the two have scales of
    different lengths."""
    return _number(stats.kendalltau(ranked(scores), truth, variant=variant).statistic)


def spearman_rho(scores: Sequence[float], truth: Sequence[float]) -> float:
    """Spearman's rank correlation, -1 to 1; 0 if all scores are equal. Ties get their mean rank."""
    score_J = ranked(scores)
    # SciPy would warn that the correlation is undefined.
    return 0.0 if np.ptp(score_J) == 0 else _number(stats.spearmanr(score_J, truth).statistic)


def ranked(scores: Sequence[float]) -> np.ndarray:
    """Ranks of the scores, [J]; the rank of NaN is 0."""
    score_J = np.asarray(scores, dtype=np.float64)
    lost_J = np.isnan(score_J)
    rank_J = np.zeros(len(score_J))
    rank_J[~lost_J] = stats.rankdata(score_J[~lost_J])
    return rank_J


def _number(value: float) -> float:
    """The value, or 0 for NaN: nothing is known about the order."""
    return 0.0 if math.isnan(value) else float(value)


def map_at_r_chance(relevant: int, total: int) -> float:
    """Expected mAP@R of a random order, 0 to 1: the item at place r is relevant with probability R / N, and each of the
    r - 1 before it is then one of the other R - 1 relevant ones among N - 1."""
    if total < 2:
        return float(relevant > 0)
    places = range(1, relevant + 1)
    before = (relevant - 1) / (total - 1)
    return sum((1 + (place - 1) * before) / place for place in places) / total
