"""A run that ended with steps left, or is given more of them, or whose folder was moved, trains on."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from training.test_early_stop import SMALL as STILL

from maskvlm.checkpoint.io import load
from maskvlm.cli.lightning import LightningCommand, best_checkpoint, run_command
from maskvlm.training.checkpointing import KeepState, follow_folder
from maskvlm.training.csv_log import rows_in
from maskvlm.training.lightning_private import reopen_pass
from maskvlm.training.resume import finished
from maskvlm.training.run_record import RunRecord
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.launch import Finished
from maskvlm.utils.whole_files import read_json

SMALL = STILL | {"model.lr": 1e-3, "model.lr_encoders": 1e-3, "trainer.val_check_interval": 3}


@pytest.fixture
def fit(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, object]]:
    """Trains in a folder of this name, and returns its last checkpoint."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])

    def run(name: str, **more: object) -> dict[str, object]:
        options = {**SMALL, **{key.replace("__", "."): value for key, value in more.items()}}
        words = ["fit", "--folder", str(tmp_path / name), *stack(WHERE="cpu")]
        run_command(LightningCommand, [*words, *(f"--{key}={value}" for key, value in options.items())])
        return load(tmp_path / name / "last.ckpt")

    return run


def end_time_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of `trainer.max_time` is over after this step, however long it took."""
    check = Timer._check_time_remaining

    def checked(timer: Timer, trainer: L.Trainer) -> None:
        timer._offset = 1e6 if trainer.global_step >= step else timer._offset  # type: ignore[assignment]
        check(timer, trainer)

    monkeypatch.setattr(Timer, "_check_time_remaining", checked)


def test_a_run_that_its_time_ended_goes_on_with_more(
    fit: Callable[..., dict[str, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """To the bit as one that had the time; what stopped is not finished."""
    whole = fit("whole")
    with monkeypatch.context() as patch:
        end_time_at(5, patch)
        assert fit("run", trainer__max_time="00:01:00:00")["global_step"] == 5
        assert "stopped at step 5 of 12: trainer.max_time was reached; repeat the" in capsys.readouterr().err
        # Without more time it stays where it is.
        assert fit("run", trainer__max_time="00:01:00:00")["global_step"] == 5
    assert finished(tmp_path / "run") is None
    went_on = fit("run", trainer__max_time="99:00:00:00")
    assert went_on["global_step"] == finished(tmp_path / "run") == 12
    torch.testing.assert_close(went_on["state_dict"], whole["state_dict"], rtol=0, atol=0)
    assert read_json(tmp_path / "run" / "metrics.json") == read_json(tmp_path / "whole" / "metrics.json")
    # Repeated elsewhere, the configuration begins anew: it names no checkpoint.
    assert yaml.safe_load((tmp_path / "run" / "config-fit.yaml").read_text())["ckpt_path"] is None


def test_a_callback_that_stops_a_run_does_not_finish_it(
    fit: Callable[..., dict[str, object]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end = KeepState.on_train_batch_end

    def stops(self: KeepState, trainer: L.Trainer, *rest: object) -> None:
        end(self, trainer, *rest)  # type: ignore[arg-type]
        trainer.should_stop = trainer.global_step == 6

    with monkeypatch.context() as patch:
        patch.setattr(KeepState, "on_train_batch_end", stops)
        assert fit("run")["global_step"] == 6
    assert "stopped at step 6 of 12 by a callback; repeat the command to resume" in capsys.readouterr().err
    assert fit("run")["global_step"] == 12


def test_the_best_weights_are_written_before_the_pass_ends(
    fit: Callable[..., dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that is evaluated at its end alone: a stop after that evaluation must not cost them."""
    best_paths: list[str | None] = []
    # Asked of the callback: the file itself is written in the background.
    monkeypatch.setattr(
        RunRecord, "on_train_epoch_end", lambda _, trainer, module: best_paths.append(best_checkpoint(trainer))
    )
    fit("run", data__steps=2, trainer__val_check_interval=1.0)
    assert best_paths == [str(tmp_path / "run" / "best.ckpt")]


def test_a_profile_lies_in_the_runs_folder(fit: Callable[..., dict[str, object]], tmp_path: Path) -> None:
    fit("run", data__steps=1, trainer__val_check_interval=1, trainer__profiler="simple")
    assert "training_step" in (tmp_path / "run" / "fit-profile.txt").read_text()


def test_a_run_is_stopped_after_whole_steps(
    fit: Callable[..., dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is over after the first of two passes whose gradients are added up."""
    check = Timer._check_time_remaining

    def checked(timer: Timer, trainer: L.Trainer) -> None:
        timer._offset = 1e6 if trainer.fit_loop.epoch_loop.batch_progress.current.ready >= 3 else 0
        check(timer, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Timer, "_check_time_remaining", checked)
        stopped = fit("run", trainer__max_time="00:01:00:00", trainer__accumulate_grad_batches=2, data__steps=6)
    assert (stopped["global_step"], stopped["PairData"]["batches"]) == (2, 4)  # type: ignore[index]
    assert not (tmp_path / "run" / "attempts.json").exists()


def test_a_pass_is_reopened_whatever_of_it_was_counted() -> None:
    for processed, completed in ((1, 1), (1, 0), (0, 0)):
        current = {"ready": 1, "started": 1, "processed": processed, "completed": completed}
        progress = {"current": current, "total": dict(current)}
        loops: dict[str, Any] = {"epoch_progress": progress, "epoch_loop.batch_progress": {"is_last_batch": True}}
        loops["epoch_loop.state_dict"] = {"_batches_that_stepped": 5 + completed}
        assert reopen_pass({"loops": {"fit_loop": loops}, "global_step": 6}) == bool(completed)
        assert loops["epoch_loop.state_dict"]["_batches_that_stepped"] == 5
        assert progress["current"] == progress["total"] == {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        assert loops["epoch_loop.batch_progress"] == {"is_last_batch": False}


def test_a_part_of_the_batches_is_no_finished_run(
    fit: Callable[..., dict[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("run", trainer__limit_train_batches=4)["global_step"] == 4
    assert "stopped at step 4 of 12: limited by trainer.limit_train_batches or overfit" in capsys.readouterr().err
    assert finished(tmp_path / "run") is None


def test_a_finished_run_is_given_more_steps(
    fit: Callable[..., dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the very next samples, and its folder is that of the longer run."""
    begun: list[int] = []
    start = KeepState.on_train_start

    def noted(self: KeepState, trainer: L.Trainer, module: L.LightningModule) -> None:
        start(self, trainer, module)
        begun.append(trainer.datamodule.start)  # type: ignore[attr-defined]

    monkeypatch.setattr(KeepState, "on_train_start", noted)
    short = fit("run", data__steps=6)
    longer = fit("run", ckpt_path="last")
    assert begun == [0, 6]
    assert longer["global_step"] == finished(tmp_path / "run") == 12
    assert read_json(tmp_path / "run" / "metrics.json")["step"] == 12
    before, after = short["state_dict"], longer["state_dict"]
    assert any(not torch.equal(before[key], after[key]) for key in after)  # type: ignore[attr-defined,index]
    with pytest.raises(Finished, match="finished at step 12"):
        fit("run")
    assert yaml.safe_load((tmp_path / "run" / "config-fit.yaml").read_text())["data"]["init_args"]["steps"] == 12


def rows_of(folder: Path) -> list[tuple[str, str]]:
    """Step and loss of each training row."""
    rows = rows_in((folder / "metrics.csv").read_bytes())
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def test_the_steps_after_an_end_are_logged_under_their_numbers(
    fit: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    """At a constant rate, row by row those of the longer run; the evaluation of the shorter one's end stays."""
    constant = {"trainer__log_every_n_steps": 1, "model__min_lr": 1e-3, "model__warmup": 1}
    constant["model__task__image_learns"] = 1  # not a share of the length
    fit("whole", **constant)
    fit("run", data__steps=6, **constant)
    fit("run", ckpt_path="last", **constant)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")
    measured = [row["step"] for row in rows_in((tmp_path / "run" / "metrics.csv").read_bytes()) if "score" in row]
    assert measured == ["2", "5", "6", "8", "11", "12"]


def test_a_run_that_goes_on_has_the_rates_of_its_command(fit: Callable[..., dict[str, object]], tmp_path: Path) -> None:
    fit("run", data__steps=6, model__warmup=1)
    other = {"model__lr": 5e-4, "model__lr_encoders": 2e-4, "model__weight_decay": 0.3, "model__betas": "[0.8,0.9]"}
    every = {"trainer__log_every_n_steps": 1}
    checkpoint: Any = fit(
        "run", ckpt_path="last", model__warmup=1, model__min_lr=1e-6, model__stable=0, **every, **other
    )
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {5e-4, 2e-4} == set(checkpoint["lr_schedulers"][0]["base_lrs"])
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert {group["betas"] for group in groups} == {(0.8, 0.9)}
    rates = [
        row["lr-AdamW/rest"]
        for row in rows_in((tmp_path / "run" / "metrics.csv").read_bytes())
        if "lr-AdamW/rest" in row
    ]
    # A cosine of twelve steps after one of warm-up, at its sixth.
    assert float(rates[-6]) == pytest.approx(1e-6 + (5e-4 - 1e-6) * (1 + math.cos(math.pi * 5 / 11)) / 2)


def test_a_checkpoint_that_does_not_fit_leaves_the_record_of_its_run(
    fit: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    fit("run", data__steps=6)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.[jy]*")}
    with pytest.raises(UserError, match="batch"):
        fit("run", data__batch_size=6, ckpt_path="last")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.[jy]*")} == before
    fit("run", ckpt_path="last")
    assert len(read_json(tmp_path / "run" / "versions.json")["earlier"]) == 1


def test_the_best_weights_of_a_moved_run_stay(fit: Callable[..., dict[str, object]], tmp_path: Path) -> None:
    """At a rate of 0 all scores are alike: the first evaluation's weights are the best of all."""
    still = {"model__lr": 0, "model__lr_encoders": 0}
    fit("run", data__steps=6, **still)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert fit("moved", ckpt_path="last", **still)["global_step"] == 12
    assert load(tmp_path / "moved" / "best.ckpt")["global_step"] == 3


def content_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "run.lock"}


def test_a_checkpoint_of_another_run_is_not_mixed_into_a_folder(
    fit: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    fit("one", data__steps=3)
    fit("two", data__steps=3, seed_everything=1)
    before = content_of_files(tmp_path / "two")
    with pytest.raises(UserError, match="already holds a run, which did not start from /") as caught:
        fit("two", ckpt_path=tmp_path / "one" / "last.ckpt")
    assert caught.value.code == ExitCode.CANNOT_CREATE
    assert content_of_files(tmp_path / "two") == before


def test_a_run_from_another_ones_checkpoint_goes_on_from_its_own(
    fit: Callable[..., dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the same command is repeated, as a queue does after a kill: whatever has become of the first run."""
    fit("one", data__steps=3)
    begun: list[int] = []
    start, end = KeepState.on_train_start, KeepState.on_train_batch_end

    def noted(self: KeepState, trainer: L.Trainer, module: L.LightningModule) -> None:
        start(self, trainer, module)
        begun.append(trainer.global_step)

    def dies(self: KeepState, trainer: L.Trainer, *rest: object) -> None:
        end(self, trainer, *rest)  # type: ignore[arg-type]
        if trainer.global_step == 7 and len(begun) == 1:
            raise RuntimeError("dies")

    monkeypatch.setattr(KeepState, "on_train_start", noted)
    monkeypatch.setattr(KeepState, "on_train_batch_end", dies)
    again: dict[str, object] = {"ckpt_path": tmp_path / "one" / "last.ckpt", "data__steps": 9}
    with pytest.raises(RuntimeError, match="dies"):
        fit("two", **again)
    shutil.rmtree(tmp_path / "one")
    assert fit("two", **again)["global_step"] == 9
    assert begun == [3, 6]
    with pytest.raises(Finished, match="finished at step 9"):
        fit("two", **again)


def keeper(folder: Path) -> ModelCheckpoint:
    """What keeps the best of a run in this folder, with a score of 5."""
    saver = ModelCheckpoint(folder, monitor="score", mode="max")
    saver.best_model_path = saver.kth_best_model_path = str(folder / "best.ckpt")
    saver.best_model_score = saver.kth_value = torch.tensor(5.0)
    saver.best_k_models = {saver.best_model_path: torch.tensor(5.0)}
    return saver


def test_what_is_remembered_of_the_best_follows_the_folder(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    state, saver = keeper(before).state_dict(), ModelCheckpoint(after, monitor="score", mode="max")
    after.mkdir()
    (after / "best.ckpt").touch()
    follow_folder(state, after, own=True)
    saver.load_state_dict(state)
    assert saver.state_dict() == keeper(after).state_dict()


def test_of_another_run_no_best_weights_are_remembered(tmp_path: Path) -> None:
    """A run that begins from another's checkpoint, whatever lies in its folder."""
    state = keeper(tmp_path / "before").state_dict()
    (tmp_path / "best.ckpt").touch()
    follow_folder(state, tmp_path, own=False)
    assert state["best_model_path"] == ""
    assert state["dirpath"] == str(tmp_path / "before")
