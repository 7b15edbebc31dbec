"""Runs that keep the features of a frozen tower: the same losses, fewer passes; and when that cannot be."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskvlm.cli import Command, run
from maskvlm.errors import UserError

SMALL: dict[str, Any] = {
    "data.steps": 6,
    "data.batch_size": 6,
    "data.source.train": 12,  # each image is met three times
    "data.source.val": 6,
    "data.augment": False,
    "model.task.weight_words": 0,
    "model.task.rerank_k": 2,
    "model.backbone.image.config": "{patch_size: 16, embed_dim: 32, depth: 2, num_heads: 2}",
    "model.backbone.text.config": "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 64}",
    "model.backbone.image.frozen": 1,
    "trainer.limit_val_batches": 1,
    "trainer.log_every_n_steps": 1,
}
LOSSES = ("itc", "itm", "mlm", "mim")


@pytest.fixture
def fit(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, list[float]]]:
    """The losses of a run by its name."""
    monkeypatch.chdir(Path(__file__).resolve().parents[1])

    def losses(name: str, **settings: Any) -> dict[str, list[float]]:
        words = [f"--{key}={value}" for key, value in (SMALL | settings).items()]
        run(Command, ["fit", "--folder", str(tmp_path / name), *stack(WHERE="cpu"), *words])
        with (tmp_path / name / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["train/itc"]]
        return {loss: [float(row[f"train/{loss}"]) for row in rows] for loss in LOSSES}

    return losses


def test_a_run_with_kept_features_learns_what_one_without_learns(
    fit: Callable[..., dict[str, list[float]]], tmp_path: Path
) -> None:
    expected = fit("without")
    keeps = {"model.backbone.image.kept_features": str(tmp_path / "features")}
    for name in ("first", "second"):  # made, and found there
        found = fit(name, **keeps)
        assert [len(found[loss]) for loss in LOSSES] == [6] * 4
        for loss in LOSSES:
            assert found[loss] == pytest.approx(expected[loss], rel=1e-4), (name, loss)
    files = sorted(path.suffix for path in (tmp_path / "features").iterdir())
    assert files == [".float32", ".there"]
    assert all(next((tmp_path / "features").glob("*.there")).read_bytes())


@pytest.mark.parametrize(
    ("key", "value"), [("model.backbone.image.normalisation", "imagenet"), ("trainer.precision", "bf16-mixed")]
)
def test_what_changes_features_has_files_of_its_own(
    fit: Callable[..., dict[str, list[float]]], tmp_path: Path, key: str, value: str
) -> None:
    keeps = {"model.backbone.image.kept_features": str(tmp_path / "features"), "data.steps": 1}
    fit("first", **keeps)
    fit("other", **keeps, **{key: value})
    assert len(list((tmp_path / "features").glob("*.there"))) == 2


def test_images_that_are_augmented_are_not_kept(fit: Callable[..., dict[str, list[float]]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"kept_features: an image that is augmented looks different each time"):
        fit("augmented", **{"model.backbone.image.kept_features": str(tmp_path / "features"), "data.augment": True})
    assert not (tmp_path / "features").exists()
