"""Runs that keep the features of a frozen tower: the same losses, fewer passes; and when that cannot be."""

import csv
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from maskvlm import MaskVLM
from maskvlm.checkpoint.io import load
from maskvlm.cli.lightning import LightningCommand, run_command
from maskvlm.training.lit import LitModel
from maskvlm.utils.errors import UserError

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
    monkeypatch.chdir(Path(__file__).resolve().parents[2])

    def losses(name: str, **settings: Any) -> dict[str, list[float]]:
        words = [f"--{key}={value}" for key, value in (SMALL | settings).items()]
        run_command(LightningCommand, ["fit", "--folder", str(tmp_path / name), *stack(WHERE="cpu"), *words])
        with (tmp_path / name / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["train/itc"]]
        return {loss: [float(row[f"train/{loss}"] or "nan") for row in rows] for loss in LOSSES}

    return losses


def test_a_run_with_kept_features_learns_what_one_without_learns(
    fit: Callable[..., dict[str, list[float]]], tmp_path: Path
) -> None:
    expected = fit("without")
    keeps = {"model.backbone.image.feature_cache": str(tmp_path / "features")}
    for name in ("first", "second"):  # made, and found there
        losses = fit(name, **keeps)
        assert [len(losses[loss]) for loss in LOSSES] == [6] * 4
        for loss in LOSSES:
            assert losses[loss] == pytest.approx(expected[loss], rel=1e-4), (name, loss)
    files = sorted(path.suffix for path in (tmp_path / "features").iterdir())
    assert files == [".float32", ".there"]
    assert all(next((tmp_path / "features").glob("*.there")).read_bytes())


def test_features_of_both_versions_of_a_mirrored_image_are_kept(
    fit: Callable[..., dict[str, list[float]]], tmp_path: Path
) -> None:
    """Fails where both versions share a row: the losses are those of features that are computed anew."""
    settings = {"data.augment": "mirror", "data.caption_aware": False, "data.steps": 12}
    expected = fit("without", **settings)
    losses = fit("kept", **settings, **{"model.backbone.image.feature_cache": str(tmp_path / "features")})
    for loss in LOSSES:
        assert losses[loss] == pytest.approx(expected[loss], rel=1e-4), loss
    there = np.frombuffer(next((tmp_path / "features").glob("*.there")).read_bytes(), np.uint8)
    assert there.size == 2 * 12
    assert 12 < there.sum() <= 24


@pytest.mark.parametrize(
    ("key", "value"), [("model.backbone.image.normalisation", "imagenet"), ("trainer.precision", "bf16-mixed")]
)
def test_what_changes_features_has_files_of_its_own(
    fit: Callable[..., dict[str, list[float]]], tmp_path: Path, key: str, value: str
) -> None:
    keeps = {"model.backbone.image.feature_cache": str(tmp_path / "features"), "data.steps": 1}
    fit("first", **keeps)
    fit("other", **keeps, **{key: value})
    assert len(list((tmp_path / "features").glob("*.there"))) == 2


def test_images_that_are_augmented_are_not_kept(fit: Callable[..., dict[str, list[float]]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"feature_cache: an augmented image looks different each time"):
        fit("augmented", **{"model.backbone.image.feature_cache": str(tmp_path / "features"), "data.augment": True})
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(("keeps", "freeze"), [(False, True), (True, True), (True, "image")])
def test_a_run_whose_aligned_encoders_stand_still(
    fit: Callable[..., dict[str, list[float]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keeps: bool,
    freeze: bool | Literal["image"],
) -> None:
    """What is aligned learns in the first three steps of six, all else in the last three; then it is asked."""
    weights: list[dict[str, torch.Tensor]] = []

    def record(self: LitModel, *_: Any) -> None:
        weights.append({name: value.detach().clone() for name, value in self.named_parameters()})

    monkeypatch.setattr(LitModel, "on_train_batch_end", record)
    settings = {
        "model.task.contrast_first": 0.5,
        "model.task.image_learns": 1.0,
        "model.task.freeze_aligned": freeze,
        "model.task.contrast_patches": 0.5,
        "model.task.fully_masked_share": 0.5,
        "model.task.image_mask_ratio": 0.6,
        "model.backbone.image.masked_patches": "left_out",
        "model.backbone.query_positions": True,
        "model.backbone.image.feature_cache": str(tmp_path / "features") if keeps else "null",
        "model.warmup": 0,
    }
    losses = fit("run", **settings)
    assert not Path("None").exists()  # null is no folder
    assert [len(losses[loss]) for loss in LOSSES] == [6] * 4
    assert [value == value for value in losses["itm"]] == [False] * 3 + [True] * 3
    learned = [{name for name, value in now.items() if not value.equal(was[name])} for was, now in pairwise(weights)]
    image = "backbone.image."
    early = (image + "vit", "backbone.text", "task.projection")
    stops = early if freeze is True else early[:1]
    assert all(name.startswith(early) for name in set.union(*learned[:2]))
    assert {name.split(".")[1] for name in set.union(*learned[:2])} == {"image", "text", "projection"}
    assert not any(name.startswith(stops) for name in set.union(*learned[2:]))
    assert all(any(name.startswith(part) for name in learned[-1]) for part in early if part not in stops)
    assert image + "mask_token" in set.union(*learned[2:])
    # Adam's own count begins with each parameter's learning.
    state = load(tmp_path / "run" / "last.ckpt")["optimizer_states"][0]
    late = {place for group in state["param_groups"] if group.get("late") for place in group["params"]}
    assert {int(state["state"][place]["step"]) for place in late} == {3}
    model = MaskVLM.from_pretrained(tmp_path / "run" / "last.ckpt")
    photo = Image.new("RGB", (48, 48), "red")
    filled = [model.reconstruct(photo, np.arange(9).reshape(3, 3) % 9 == at, "a red ball") for at in (0, 4)]
    assert [each.size for each in filled] == [(48, 48)] * 2
    model.save_pretrained(tmp_path / "hub")
    again = MaskVLM.from_pretrained(tmp_path / "hub")
    assert again.backbone.image.left_out
    assert again.reconstruct(photo, np.arange(9).reshape(3, 3) == 0, "a red ball").tobytes() == filled[0].tobytes()
