"""A run whose score no longer rises ends, and what is measured then is its best checkpoint."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from maskvlm.checkpoint.io import load
from maskvlm.cli.lightning import LightningCommand, best_of, run_command
from maskvlm.training.checkpointing import KeepState
from maskvlm.training.lightning_private import evaluate_after_whole_steps
from maskvlm.training.resume import asked_for, finished
from maskvlm.utils.whole_files import read_json

ROOT = Path(__file__).resolve().parents[2]
COMPACT = yaml.safe_load((ROOT / "conf" / "pretrain-compact.yaml").read_text())["trainer"]["callbacks+"][0]["init_args"]
SMALL = {
    "data.steps": 12,
    "data.batch_size": 4,
    "data.eval_batch_size": 6,
    "data.source.train": 24,
    "data.source.val": 6,
    "model.lr": 0,
    "model.lr_encoders": 0,
    "model.task.weight_words": 0,
    "model.task.rerank_k": 2,
    "model.backbone.image.config": "{patch_size: 16, embed_dim: 32, depth: 1, num_heads: 2}",
    "model.backbone.text.config": "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 64}",
    "trainer.val_check_interval": 0.25,
}


def fit(folder: Path, stack: Callable[..., list[str]], patience: int | None, **more_options: object) -> None:
    """more_options: dots as two underscores; `threshold`: the score that ends a run."""
    threshold = more_options.pop("threshold", None)
    stop = {**COMPACT, "patience": patience, "stopping_threshold": threshold}
    callback = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stop}
    more = folder.parent / "stop.yaml"
    more.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]} if patience else {}}))
    words = ["fit", "--folder", str(folder), *stack(WHERE="cpu"), "-c", str(more)]
    options = {**SMALL, **{key.replace("__", "."): value for key, value in more_options.items()}}
    run_command(LightningCommand, [*words, *(f"--{key}={value}" for key, value in options.items())])


def test_the_best_weights_are_measured_where_the_score_no_longer_rises(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a rate of 0 the first evaluation, after three steps, is the best one, and all are alike."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    fit(tmp_path / "run", stack, patience=2)
    best, last = (load(tmp_path / "run" / f"{name}.ckpt") for name in ("best", "last"))
    assert (best["global_step"], last["global_step"]) == (3, 9)
    assert read_json(tmp_path / "run" / "metrics.json")["step"] == 3
    stderr = capsys.readouterr().err
    assert (finished(tmp_path / "run"), asked_for(tmp_path / "run")) == (9, 12)
    assert "not finished" not in stderr
    assert f"the score no longer rose: stopped early at step 9; evaluating {tmp_path / 'run' / 'best.ckpt'}" in stderr


def test_a_run_without_evaluations_comes_to_its_end(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no score then. With an interval of 1, Lightning asks for it at the end of the epoch."""
    monkeypatch.chdir(ROOT)
    fit(tmp_path / "run", stack, patience=2, trainer__limit_val_batches=0, trainer__val_check_interval=1.0)
    assert load(tmp_path / "run" / "last.ckpt")["global_step"] == 12


@pytest.mark.parametrize("patience", [None, 3])
def test_a_run_that_comes_to_its_end_measures_its_last_weights(
    patience: int | None, stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where patience is lost at that very end."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    fit(tmp_path / "run", stack, patience)
    assert load(tmp_path / "run" / "last.ckpt")["global_step"] == 12
    assert read_json(tmp_path / "run" / "metrics.json")["step"] == 12


def test_more_patience_trains_on(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would restore the old one from the checkpoint."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    fit(tmp_path / "run", stack, patience=1)
    assert finished(tmp_path / "run") == 6
    fit(tmp_path / "run", stack, patience=3, ckpt_path="last")
    assert load(tmp_path / "run" / "last.ckpt")["global_step"] == finished(tmp_path / "run") == 12


def test_a_score_that_was_reached_finishes_a_run(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    fit(tmp_path / "run", stack, patience=3, threshold=-1.0)
    assert finished(tmp_path / "run") == 3
    assert "the score reached -1.0: stopped early at step 3" in capsys.readouterr().err


def test_a_run_that_was_ending_does_not_train_on_when_it_is_started_again(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its last step, before it was measured."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LightningCommand, "after_fit", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "run", stack, patience=1)
    assert load(tmp_path / "run" / "last.ckpt")["global_step"] == 6
    fit(tmp_path / "run", stack, patience=1)
    assert load(tmp_path / "run" / "last.ckpt")["global_step"] == 6
    assert read_json(tmp_path / "run" / "metrics.json")["step"] == 3


def test_an_evaluation_never_falls_between_two_passes_of_a_step(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six passes make three steps, a quarter of them is one pass: evaluated after whole steps alone."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    evaluated: list[tuple[int, int]] = []
    start = KeepState.on_validation_start

    def noted(self: KeepState, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            evaluated.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.ready))
        start(self, trainer, module)

    monkeypatch.setattr(KeepState, "on_validation_start", noted)
    fit(tmp_path / "run", stack, None, data__steps=3, trainer__accumulate_grad_batches=2)
    assert evaluated == [(1, 2), (2, 4), (3, 6)]


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


def test_what_is_shorter_than_a_step_is_evaluated_at_its_end() -> None:
    for every, batches, expected in ((1, 6, 2), (5, 6, 6), (5, 5, 5), (1, 1, 1)):
        trainer: Any = SimpleNamespace(val_check_batch=every, accumulate_grad_batches=2, num_training_batches=batches)
        evaluate_after_whole_steps(trainer)
        assert trainer.val_check_batch == expected
