"""Figures out of scores, whatever gave them. A tie, or a score that is no number, counts against the model.

Shapes: P positives, N negatives, J judged pairs.
"""

import math
from collections.abc import Hashable, Sequence

import torch
from torchmetrics.functional import kendall_rank_corrcoef, spearman_corrcoef

from maskvlm.suites.suite import SuiteMetric

NORMAL_95 = 1.959964
"""Standard errors on either side of a mean that hold 95 % of a normal distribution."""


def first_is_best(scores: Sequence[float]) -> bool:
    """Whether the first score is above all others."""
    return all(scores[0] > other for other in scores[1:])


def clustered_error(values: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Standard error of a mean whose values depend on each other within a group, such as the captions of an image."""
    mean = sum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    return math.sqrt(sum(each**2 for each in sums.values())) / len(values)


def percent_right(
    name: str, right: Sequence[bool | float], chance: float | None, groups: Sequence[Hashable]
) -> SuiteMetric:
    """Share of right answers in percent, with its interval over groups (images).

    Args:
        right: 0 to 1 of each item. chance: percent.
    """
    if not right:
        return SuiteMetric(name, math.nan, chance, 0)
    values = [100.0 * float(each) for each in right]
    mean, margin = sum(values) / len(values), NORMAL_95 * clustered_error(values, groups)
    return SuiteMetric(name, mean, chance, len(values), (max(0.0, mean - margin), min(100.0, mean + margin)))


def area_under_curve(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Share of all pairs of a positive and a negative where the positive scores higher; a tie is half."""
    positive_P1 = torch.tensor(positives, dtype=torch.float64)[:, None]
    negative_N = torch.tensor(negatives, dtype=torch.float64)
    # (P, 1) against (N,) -> (P, N)
    return float(((positive_P1 > negative_N).double() + (positive_P1 == negative_N).double() / 2).mean())


def kendall_tau(scores: Sequence[float], truth: Sequence[float], variant: str) -> float:
    """Kendall's tau, -1 to 1. variant: `b`, or `c` where the two have scales of different lengths (Stuart)."""
    score_J, truth_J = torch.tensor(scores, dtype=torch.float64), torch.tensor(truth, dtype=torch.float64)
    found = kendall_rank_corrcoef(score_J, truth_J, variant=variant)  # type: ignore[arg-type]
    assert isinstance(found, torch.Tensor)
    return float(found)


def spearman_rho(scores: Sequence[float], truth: Sequence[float]) -> float:
    """Spearman's rank correlation, -1 to 1; ties get their mean rank."""
    return float(spearman_corrcoef(torch.tensor(scores, dtype=torch.float64), torch.tensor(truth, dtype=torch.float64)))


def map_at_r_chance(relevant: int, total: int) -> float:
    """Expected mAP@R of a random order, 0 to 1: the item at place r is relevant with R / N, and the r - 1 before it are
    then of the other R - 1 among N - 1."""
    if total < 2:
        return float(relevant > 0)
    places = range(1, relevant + 1)
    before = (relevant - 1) / (total - 1)
    return sum((1 + (place - 1) * before) / place for place in places) / total
