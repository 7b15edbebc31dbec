"""NLVR and visual entailment: consistency, recall and confusion of the classes by hand, and the two images."""

import math

import pytest
import torch
from toy_examples import example, example_batch
from toys import WIDTH, toy_backbone

from maskvlm.objectives.answers import ScoredExample
from tasks.entailment.task import Entailment
from tasks.nlvr.task import Nlvr, consistency, consistency_chance, groups_of


def test_consistency_by_hand() -> None:
    """Sentence a: all three right. b: one of two. c, d: the only one is wrong. Two without a group stand alone."""
    groups = (
        ("a", 1.0), ("b", 1.0), ("a", 1.0), ("c", 0.0), ("b", 0.0), ("a", 1.0), ("", 1.0), ("", 0.0), ("d", 0.0),
        ("a", None),
    )  # fmt: skip
    rows = [ScoredExample(n, example(n, group=group), "", right) for n, (group, right) in enumerate(groups)]
    assert sorted(len(group) for group in groups_of(rows)) == [1, 1, 1, 1, 2, 3]
    assert consistency(rows) == pytest.approx(100 * 2 / 6)
    assert consistency_chance(rows) == pytest.approx(100 * (1 / 8 + 1 / 4 + 4 / 2) / 6)
    of_four = Nlvr(("a", "b", "c", "d")).extra_metrics(rows)
    chance = pytest.approx(100 * (1 / 64 + 1 / 16 + 4 / 4) / 6)
    assert of_four == {"consistency": consistency(rows), "consistency_chance": chance}
    for none in ([], rows[-1:]):  # where no truth is published nothing is said
        assert math.isnan(consistency(none))
        assert math.isnan(consistency_chance(none))


def test_two_images_unless_told_otherwise() -> None:
    assert Nlvr(("True", "False")).images_per_example == Nlvr(("True", "False")).methods["compare"].images == 2
    assert Entailment.methods["entail"].images == 1
    backbone, task = toy_backbone(), Nlvr(("True", "False"), images_per_example=3)
    task.build(backbone)
    assert task.head.layers[0].in_features == 3 * 3 * WIDTH
    task.set_uniform(torch.rand)
    batch = example_batch(2, 3)._replace(target_BK=torch.eye(2))
    assert task.logits(backbone, batch, torch.rand).shape == (2, 2)
    assert set(task(backbone, batch)) == {"nlvr"}


def test_recall_and_confusion_by_hand() -> None:
    """A truth of "" is not published."""
    e, n, c = labels = ("entailment", "neutral", "contradiction")
    rows = [
        ScoredExample(number, example(number, answers=[truth] if truth else []), predicted, None)
        for number, (truth, predicted) in enumerate([(e, e), (e, n), (e, e), (e, c), (n, n), ("", c)])
    ]
    metrics = Entailment(labels).extra_metrics(rows)
    assert (metrics[f"recall/{e}"], metrics[f"recall/{n}"]) == (50, 100)
    assert metrics[f"recall/{e}_chance"] == 100 / 3
    assert math.isnan(metrics[f"recall/{c}"])
    counts = {name: value for name, value in metrics.items() if name.startswith("confusion/")}
    assert len(counts) == 9
    assert {name: value for name, value in counts.items() if value} == {
        f"confusion/{e}_as_{e}": 2, f"confusion/{e}_as_{n}": 1, f"confusion/{e}_as_{c}": 1, f"confusion/{n}_as_{n}": 1,
    }  # fmt: skip
    assert Entailment(labels).extra_metrics(rows[-1:]) == {}
