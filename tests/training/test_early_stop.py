"""A run whose score no longer rises ends, and what is measured then is its best checkpoint."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from training.small_runs import SMALL as LEARNING

from maskvlm.checkpoint.io import load
from maskvlm.cli.lightning import LightningCommand, best_of
from maskvlm.training.lightning_private import evaluate_after_whole_steps
from maskvlm.training.resume import asked_for, finished
from maskvlm.utils.whole_files import read_json

ROOT = Path(__file__).resolve().parents[2]
COMPACT = yaml.safe_load((ROOT / "conf" / "pretrain-compact.yaml").read_text())["trainer"]["callbacks+"][0]["init_args"]
SMALL = LEARNING | {"model.lr": 0, "model.lr_encoders": 0}
"""At a rate of 0 the first evaluation is the best one, and all are alike."""


@pytest.fixture
def still(fit: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Trains at a rate of 0 with this patience."""

    def run(patience: int, threshold: float | None = None, **settings: Any) -> dict[str, Any]:
        stop = {**COMPACT, "patience": patience, "stopping_threshold": threshold}
        callback = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stop}
        (tmp_path / "stop.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
        return fit("run", "-c", str(tmp_path / "stop.yaml"), model__lr=0, model__lr_encoders=0, **settings)

    return run


@pytest.mark.slow
def test_the_best_weights_are_measured_where_the_score_no_longer_rises(
    still: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run was killed after its last step, before it was measured: it does not train on."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LightningCommand, "after_fit", killed)
        with pytest.raises(KeyboardInterrupt):
            still(1)
    assert still(1)["global_step"] == 6
    assert load(tmp_path / "run" / "best.ckpt")["global_step"] == 3
    assert read_json(tmp_path / "run" / "metrics.json")["step"] == 3
    assert (finished(tmp_path / "run"), asked_for(tmp_path / "run")) == (6, 12)


@pytest.mark.slow
def test_more_patience_trains_on_and_a_run_that_comes_to_its_end_measures_its_last_weights(
    still: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Lightning would restore the old patience from the checkpoint. The new one is lost at the very end."""
    assert still(1)["global_step"] == 6
    assert still(3, ckpt_path="last")["global_step"] == finished(tmp_path / "run") == 12
    assert read_json(tmp_path / "run" / "metrics.json")["step"] == 12


def test_the_best_is_measured_where_patience_was_lost_alone() -> None:
    """Whatever else ends a run early, such as `trainer.max_time`, leaves it with its last weights."""
    stop, saver = EarlyStopping("score", patience=2), ModelCheckpoint()
    saver.best_model_path = "best.ckpt"
    for lost, step, best in ((0, 5, None), (2, 5, "best.ckpt"), (2, 12, None)):
        stop.wait_count = lost
        trainer: Any = SimpleNamespace(
            should_stop=True, callbacks=[stop, saver], global_step=step, datamodule=SimpleNamespace(total_steps=12)
        )
        assert best_of(trainer) == best


def test_an_evaluation_never_falls_between_two_passes_of_a_step() -> None:
    """What is shorter than a step is evaluated at its end."""
    for every, batches, expected in ((1, 6, 2), (5, 6, 6), (5, 5, 5), (1, 1, 1)):
        trainer: Any = SimpleNamespace(val_check_batch=every, accumulate_grad_batches=2, num_training_batches=batches)
        evaluate_after_whole_steps(trainer)
        assert trainer.val_check_batch == expected
