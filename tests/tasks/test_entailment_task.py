"""Visual entailment: recall and confusion of the classes, against torchmetrics and by hand."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import ConfusionMatrix, Recall
from toy_examples import example

from maskvlm.objectives.answers import ScoredExample
from tasks.entailment.task import Entailment

LABELS = ("entailment", "neutral", "contradiction")


def scored(rows: list[tuple[str, str]]) -> list[ScoredExample]:
    """Examples by (truth, prediction); a truth of "" is not published."""
    return [
        ScoredExample(
            n, example(n, answers=[truth] if truth else []), prediction, float(truth == prediction) if truth else None
        )
        for n, (truth, prediction) in enumerate(rows)
    ]


def test_by_hand() -> None:
    e, n, c = LABELS
    metrics = Entailment(LABELS).extra_metrics(scored([(e, e), (e, n), (e, e), (e, c), (n, n), ("", c)]))
    assert metrics[f"recall/{e}"] == 50
    assert metrics[f"recall/{e}_chance"] == 100 / 3
    assert metrics[f"recall/{n}"] == 100
    assert math.isnan(metrics[f"recall/{c}"])
    counts = {
        name.removeprefix("confusion/"): value for name, value in metrics.items() if name.startswith("confusion/")
    }
    assert len(counts) == 9
    assert {name: value for name, value in counts.items() if value} == {
        f"{e}_as_{e}": 2, f"{e}_as_{n}": 1, f"{e}_as_{c}": 1, f"{n}_as_{n}": 1,
    }  # fmt: skip
    assert Entailment(LABELS).extra_metrics(scored([("", e)])) == {}


@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=30))
def test_against_torchmetrics(rows: list[tuple[str, str]]) -> None:
    metrics = Entailment(LABELS).extra_metrics(scored(rows))
    truth, prediction = (torch.tensor([LABELS.index(row[side]) for row in rows]) for side in (0, 1))
    counts = ConfusionMatrix(task="multiclass", num_classes=3)(prediction, truth)
    recall = Recall(task="multiclass", num_classes=3, average=None)(prediction, truth)
    for row, label in enumerate(LABELS):
        for column, other in enumerate(LABELS):
            assert metrics[f"confusion/{label}_as_{other}"] == counts[row, column]
        if (truth == row).any():
            assert math.isclose(metrics[f"recall/{label}"], 100 * recall[row].item(), rel_tol=1e-5, abs_tol=1e-9)
