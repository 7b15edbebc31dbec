"""A training that saves in the background: what its user is told is true, and no failure is lost."""

import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from training.small_runs import At, Line

from maskvlm.checkpoint import io as checkpoint
from maskvlm.checkpoint.io import load, save
from maskvlm.training import attempts, checkpointing
from maskvlm.training.checkpoint_io import SafeCheckpointIO
from maskvlm.training.checkpointing import KeepState, check_finite
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.launch import Stopped
from maskvlm.utils.signals import CAUGHT


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    yield
    CAUGHT.restore()


def fit(
    folder: Path, *callbacks: L.Callback, background: bool = True, ckpt_path: Path | None = None, **settings: Any
) -> L.Trainer:
    """Six passes, a checkpoint after each second step, where an evaluation is due."""
    settings = {"val_check_interval": 2, "limit_val_batches": 0} | settings
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, default_root_dir=folder, plugins=[SafeCheckpointIO()],
        callbacks=[*callbacks, KeepState(str(folder), 2, None, background)], **settings,
    )  # fmt: skip
    batches = [DataLoader(torch.ones(count, 1)) for count in (6, 1)]
    trainer.fit(Line(), *batches, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def steps_of(folder: Path) -> list[int]:
    return [load(folder / f"{name}.ckpt")["global_step"] for name in ("previous", "last")]


def ended(trainer: L.Trainer) -> None:
    """Wait until all writes have ended, well or not."""
    io: Any = trainer.strategy.checkpoint_io
    for job in io.writer.pending:
        job.exception(timeout=30)


def slow(monkeypatch: pytest.MonkeyPatch, fails_at: int = 0) -> None:
    """Writing takes longer than the steps; one of a step has no space."""
    write = checkpoint._write

    def wait(content: dict[str, Any], path: Path) -> Any:
        time.sleep(0.2)
        if content["global_step"] == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(content, path)

    monkeypatch.setattr(checkpoint, "_write", wait)


@pytest.mark.parametrize("background", [True, False])
def test_the_files_are_the_same_either_way(background: bool, tmp_path: Path) -> None:
    writers: list[Any] = []

    def look(trainer: Any) -> None:
        writers.append(trainer.strategy.checkpoint_io.writer)

    trainer = fit(tmp_path, At(look, 3), background=background)
    assert (writers[0] is not None) == background
    for name, step in (("last", 6), ("previous", 4)):
        content = load(tmp_path / f"{name}.ckpt")
        assert content["global_step"] == step
        expected = 1 - 0.8**step  # each step goes a fifth of the way to 1
        assert content["state_dict"]["weight"].item() == pytest.approx(expected)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert load(tmp_path / "after.ckpt")["global_step"] == 6  # there when the call returns


@pytest.mark.parametrize("damaged", [False, True])
def test_what_a_run_goes_on_from_is_not_lost_for_a_file_that_was_passed_over(tmp_path: Path, damaged: bool) -> None:
    fit(tmp_path, max_steps=4)
    name, step = ("previous.ckpt", 2) if damaged else ("last.ckpt", 4)
    # One save: two steps on.
    fit(tmp_path, ckpt_path=tmp_path / name, max_steps=step + 2)
    assert steps_of(tmp_path) == [step, step + 2]


def test_a_death_in_the_evaluation_that_a_run_goes_on_with_is_counted(tmp_path: Path) -> None:
    """Before its first step: else it would be tried for ever."""
    fit(tmp_path, max_steps=2)
    content = load(tmp_path / "last.ckpt")
    keep_state = next(state for name, state in content["callbacks"].items() if "KeepState" in name)
    keep_state["unmeasured"] = True
    save(content, tmp_path / "last.ckpt")
    noted: list[Any] = []

    class Dies(L.Callback):
        def on_validation_start(self, *_: Any) -> None:
            noted.append(json.loads((tmp_path / attempts.NAME).read_text())["step"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Dies(), ckpt_path=tmp_path / "last.ckpt", limit_val_batches=1)
    assert noted == [2]


@pytest.mark.parametrize(("fails_at", "made", "kept"), [(4, 5, 2), (6, 6, 4)])
def test_a_failure_is_told_at_the_end_of_the_next_step(
    fails_at: int, made: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the look at the end of each step the next save would tell it, a step later. Of the last save it is told
    at the end."""
    slow(monkeypatch, fails_at)
    steps: list[int] = []
    looks = At(lambda trainer: steps.append(trainer.global_step), *range(1, 7))
    with pytest.raises(UserError, match=r"last\.ckpt: no space left: disk full") as caught:
        fit(tmp_path, looks, At(ended, 5))
    assert caught.value.code == ExitCode.IO_ERROR
    assert steps[-1] == made
    assert load(tmp_path / "last.ckpt")["global_step"] == kept


def test_who_is_stopped_says_so_when_the_checkpoint_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    class Looks(Stopped):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            steps.append(load(tmp_path / "last.ckpt")["global_step"])

    slow(monkeypatch)
    monkeypatch.setattr(checkpointing, "Stopped", Looks)
    with pytest.raises(Stopped, match=r"SIGTERM: stopped after step 3; .*last\.ckpt holds it"):
        fit(tmp_path, At(lambda _: os.kill(os.getpid(), signal.SIGTERM), 3))
    assert steps == [3]


@pytest.mark.parametrize(("value", "place"), [(float("nan"), 0), (float("inf"), 998), (-float("inf"), 17)])
def test_one_value_that_is_lost_is_found(value: float, place: int, tmp_path: Path) -> None:
    """Also beside values whose sum is no number; these alone are no fault."""
    module = torch.nn.ParameterDict({"large": torch.full((100,), 3e38), "small": torch.ones(999)})
    trainer: Any = SimpleNamespace(lightning_module=module, global_step=5)
    check_finite(trainer, tmp_path)
    with torch.no_grad():
        module["small"][place] = value
    with pytest.raises(UserError, match=r"1 of 2 tensors are not finite at step 5 \(small, \.\.\.\)"):
        check_finite(trainer, tmp_path)
