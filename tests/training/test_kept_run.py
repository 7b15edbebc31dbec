"""Runs that keep the features of a frozen tower: the same losses, fewer passes; and when that cannot be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training.small_runs import logged

from maskvlm.utils.errors import UserError

Fit = Callable[..., dict[str, Any]]
SMALL: dict[str, Any] = {
    "data__steps": 6,
    "data__source__train": 12,  # each image is met twice
    "data__augment": False,
    "model__backbone__image__config": "{patch_size: 16, embed_dim: 32, depth: 2, num_heads: 2}",
    "model__backbone__image__frozen": 1,
    "trainer__limit_val_batches": 0,
}
LOSSES = ("itc", "itm", "mlm", "mim")


def losses_in(folder: Path) -> list[float]:
    return [float(value) for loss in LOSSES for _, value in logged(folder, f"train/{loss}")]


@pytest.mark.slow
def test_a_run_with_kept_features_learns_what_one_without_learns(fit: Fit, tmp_path: Path) -> None:
    """Also where features of both versions of a mirrored image are kept, which must not share a row; what changes
    features has files of its own."""
    mirror = SMALL | {"data__augment": "mirror", "data__caption_aware": False}
    keeps = {"model__backbone__image__feature_cache": str(tmp_path / "features")}
    fit("without", **mirror)
    for name in ("made", "found"):
        fit(name, **mirror, **keeps)
        assert len(losses_in(tmp_path / name)) == 6 * len(LOSSES)
        assert losses_in(tmp_path / name) == pytest.approx(losses_in(tmp_path / "without"), rel=1e-4)
    (there,) = (tmp_path / "features").glob("*.there")
    flags = np.frombuffer(there.read_bytes(), np.uint8)
    assert flags.size == 2 * 12
    assert 12 < flags.sum() <= 24
    other = {"data__steps": 1, "model__backbone__image__normalisation": "imagenet"}
    fit("other", **mirror | other, **keeps)
    assert len([*(tmp_path / "features").glob("*.there")]) == 2


def test_images_that_are_augmented_are_not_kept(fit: Fit, tmp_path: Path) -> None:
    keeps = {"model__backbone__image__feature_cache": str(tmp_path / "features")}
    with pytest.raises(UserError, match="feature_cache: an augmented image"):
        fit("augmented", **SMALL | keeps | {"data__augment": True})
    assert not (tmp_path / "features").exists()
