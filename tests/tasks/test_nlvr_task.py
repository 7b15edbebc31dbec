"""NLVR: consistency written out, and the two images."""

import math

import pytest
import torch
from toy_examples import example, example_batch
from toys import WIDTH, toy_backbone

from maskvlm.objectives.answers import ScoredExample
from tasks.nlvr.task import Nlvr, consistency, consistency_chance, groups_of

LABELS = ("True", "False")


def scored(*rows: tuple[str, float | None]) -> list[ScoredExample]:
    """Examples by (group, right)."""
    return [ScoredExample(n, example(n, group=group), "", right) for n, (group, right) in enumerate(rows)]


def test_consistency_by_hand() -> None:
    """Sentence a: all three right. b: one of two. c: its one is wrong. Two examples without a group stand alone."""
    rows = scored(
        ("a", 1.0), ("b", 1.0), ("a", 1.0), ("c", 0.0), ("b", 0.0), ("a", 1.0), ("", 1.0), ("", 0.0), ("a", None),
    )  # fmt: skip
    assert sorted(len(group) for group in groups_of(rows)) == [1, 1, 1, 2, 3]
    assert consistency(rows) == 100 * 2 / 5
    assert consistency_chance(rows) == pytest.approx(100 * (1 / 8 + 1 / 4 + 3 / 2) / 5)
    assert Nlvr(LABELS).extra_metrics(rows) == {
        "consistency": consistency(rows),
        "consistency_chance": consistency_chance(rows),
    }
    assert consistency_chance(rows, 4) == pytest.approx(100 * (1 / 64 + 1 / 16 + 3 / 4) / 5)
    of_four = Nlvr(("a", "b", "c", "d")).extra_metrics(rows)
    assert of_four["consistency_chance"] == consistency_chance(rows, 4)


def test_where_no_truth_is_published_nothing_is_said() -> None:
    for rows in ([], scored(("a", None), ("", None))):
        assert math.isnan(consistency(rows))
        assert math.isnan(consistency_chance(rows))


def test_two_images_unless_told_otherwise() -> None:
    assert Nlvr(LABELS).images_per_example == 2
    backbone, task = toy_backbone(), Nlvr(LABELS, images_per_example=3)
    task.build(backbone)
    assert task.head.layers[0].in_features == 3 * 3 * WIDTH
    task.set_uniform(torch.rand)
    batch = example_batch(2, 3)._replace(target_BK=torch.eye(2))
    assert task.logits(backbone, batch, torch.rand).shape == (2, 2)
    assert set(task(backbone, batch)) == {"nlvr"}
