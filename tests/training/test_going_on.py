"""A run that ended with steps left, or is given more of them, or whose folder was moved, trains on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from training.small_runs import logged

from maskvlm.training.checkpointing import follow_folder
from maskvlm.training.lightning_private import reopen_pass
from maskvlm.training.resume import finished
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.launch import Finished
from maskvlm.utils.whole_files import read_json

Fit = Callable[..., dict[str, Any]]
SHORT = {"data__steps": 4, "trainer__val_check_interval": 2}


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


@pytest.mark.slow
def test_a_finished_run_is_given_more_steps(fit: Fit, tmp_path: Path) -> None:
    """At a constant rate each row is that of the longer run; the evaluation of the shorter one's end stays."""
    constant = {"model__min_lr": 1e-3, "model__warmup": 1}
    constant["model__task__image_learns"] = 1  # not a share of the length
    fit("whole", **SHORT, **constant)
    fit("run", **SHORT | {"data__steps": 2}, **constant)
    fit("run", ckpt_path="last", **SHORT, **constant)
    assert finished(tmp_path / "run") == read_json(tmp_path / "run" / "metrics.json")["step"] == 4
    rows, expected = (logged(tmp_path / name, "train/loss") for name in ("run", "whole"))
    assert rows == expected
    assert [step for step, _ in rows] == [0, 1, 2, 3]
    assert [step for step, _ in logged(tmp_path / "run", "score")] == [1, 2, 3, 4]
    with pytest.raises(Finished, match="finished at step 4"):
        fit("run", **SHORT, **constant)
    assert yaml.safe_load((tmp_path / "run" / "config-fit.yaml").read_text())["data"]["init_args"]["steps"] == 4


def content_of(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """The files of a run but its lock."""
    return {p.name: p.read_bytes() for p in folder.glob(pattern) if p.is_file() and p.name != "run.lock"}


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_not_mixed_into_a_folder(fit: Fit, tmp_path: Path) -> None:
    fit("one", **SHORT)
    fit("two", **SHORT, seed_everything=1)
    before = content_of(tmp_path / "two")
    with pytest.raises(UserError, match="already holds a run, which did not start from /") as caught:
        fit("two", **SHORT, ckpt_path=tmp_path / "one" / "last.ckpt")
    assert caught.value.code == ExitCode.CANNOT_CREATE
    assert content_of(tmp_path / "two") == before


def keeper(folder: Path) -> ModelCheckpoint:
    """What keeps the best of a run in this folder, with a score of 5."""
    saver = ModelCheckpoint(folder, monitor="score", mode="max")
    saver.best_model_path = saver.kth_best_model_path = str(folder / "best.ckpt")
    saver.best_model_score = saver.kth_value = torch.tensor(5.0)
    saver.best_k_models = {saver.best_model_path: torch.tensor(5.0)}
    return saver


def test_what_is_remembered_of_the_best_follows_the_folder(tmp_path: Path) -> None:
    """Of another run nothing is remembered, whatever lies in the folder of the one that begins from it."""
    before, after = tmp_path / "before", tmp_path / "after"
    state, foreign = keeper(before).state_dict(), keeper(before).state_dict()
    after.mkdir()
    (after / "best.ckpt").touch()
    follow_folder(state, after, own=True)
    saver = ModelCheckpoint(after, monitor="score", mode="max")
    saver.load_state_dict(state)
    assert saver.state_dict() == keeper(after).state_dict()
    follow_folder(foreign, after, own=False)
    assert (foreign["best_model_path"], foreign["dirpath"]) == ("", str(before))
