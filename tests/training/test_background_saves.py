"""A training that saves in the background: what its user is told is true, and no failure is lost."""

import errno
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from guards import Build
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from torch.utils.data import DataLoader

from maskvlm.checkpoint import io as checkpoint
from maskvlm.checkpoint.io import load, save
from maskvlm.training import attempts, checkpointing
from maskvlm.training.checkpoint_io import SafeCheckpointIO
from maskvlm.training.checkpointing import KeepState, check_finite
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.launch import Stopped
from maskvlm.utils.signals import CAUGHT


class Line(L.LightningModule):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight - batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Nothing is measured."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class After(L.Callback):
    """Does something at the end of one step, before KeepState's turn."""

    def __init__(self, step: int, do: Any) -> None:
        self.step, self.do = step, do

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.do(trainer)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    yield
    CAUGHT.restore()


def fit(
    folder: Path, *callbacks: L.Callback, io: CheckpointIO | None = None, background: bool = True,
    max_steps: int = -1, limit_val_batches: int = 0, ckpt_path: Path | None = None,
) -> L.Trainer:  # fmt: skip
    """Six steps, a checkpoint after each second one, where an evaluation is due."""
    trainer = L.Trainer(
        max_epochs=1, max_steps=max_steps, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=2, limit_val_batches=limit_val_batches,
        default_root_dir=folder, plugins=[io or SafeCheckpointIO()],
        callbacks=[*callbacks, KeepState(str(folder), 2, None, background)],
    )  # fmt: skip
    batches = [DataLoader(torch.ones(count, 1)) for count in (6, 1)]
    trainer.fit(Line(), *batches, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def ended(trainer: L.Trainer) -> None:
    """Wait until all writes have ended, well or not."""
    io: Any = trainer.strategy.checkpoint_io
    for job in io.writer.pending:
        job.exception(timeout=30)


class Reserving(SafeCheckpointIO):
    """Notes what memory was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[list[tuple[int, ...]]] = []

    def reserve(self, values: Iterable[Tensor]) -> None:
        values = list(values)
        self.shapes.append([tuple(value.shape) for value in values])
        super().reserve(values)


def test_after_the_first_step_memory_is_reserved_for_weights_and_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Line, "configure_optimizers", lambda line: torch.optim.AdamW(line.parameters()))
    io = Reserving()
    fit(tmp_path, io=io)
    # The weight, its two moments, and the count of steps.
    assert [sorted(shapes) for shapes in io.shapes] == [[(), (1,), (1,), (1,)]]


@pytest.mark.parametrize("damaged", [False, True])
def test_what_a_run_goes_on_from_is_not_lost_for_a_file_that_was_passed_over(tmp_path: Path, damaged: bool) -> None:
    fit(tmp_path, max_steps=4)
    name, step = ("previous.ckpt", 2) if damaged else ("last.ckpt", 4)
    # One save: two steps on.
    fit(tmp_path, ckpt_path=tmp_path / name, max_steps=step + 2)
    steps = [load(tmp_path / each)["global_step"] for each in ("previous.ckpt", "last.ckpt")]
    assert steps == [step, step + 2]


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


def slow(monkeypatch: pytest.MonkeyPatch, fails_at: int = 0) -> None:
    """Writing takes longer than the steps; one of a step has no space."""
    write = checkpoint._write

    def wait(content: dict[str, Any], path: Path) -> Any:
        time.sleep(0.3)
        if content["global_step"] == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(content, path)

    monkeypatch.setattr(checkpoint, "_write", wait)


@pytest.mark.guard("maskvlm.training.checkpoint_io:SafeCheckpointIO.check")
def test_a_failure_is_told_at_the_end_of_the_next_step(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the look at the end of each step the next save would tell it, a step later."""
    slow(monkeypatch, fails_at=4)
    steps: list[int] = []
    looks = [After(step, lambda trainer: steps.append(trainer.global_step)) for step in range(1, 7)]
    with pytest.raises(UserError, match=r"last\.ckpt: no space left: disk full") as caught:
        fit(tmp_path, *looks, After(5, ended))
    assert caught.value.code == ExitCode.IO_ERROR
    assert steps == [1, 2, 3, 4, 5]
    assert load(tmp_path / "last.ckpt")["global_step"] == 2


@pytest.mark.guard("maskvlm.training.checkpoint_io:SafeCheckpointIO.end")
def test_a_failure_of_the_last_save_is_told_at_the_end(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, fails_at=6)
    with pytest.raises(UserError, match=r"last\.ckpt: no space left: disk full"):
        fit(tmp_path)
    assert load(tmp_path / "last.ckpt")["global_step"] == 4
    assert load(tmp_path / "previous.ckpt")["global_step"] == 2


@pytest.mark.guard("maskvlm.training.checkpoint_io:SafeCheckpointIO.finish")
def test_who_is_stopped_says_so_when_the_checkpoint_is_there(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    class Looks(Stopped):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            steps.append(load(tmp_path / "last.ckpt")["global_step"])

    slow(monkeypatch)
    monkeypatch.setattr(checkpointing, "Stopped", Looks)
    with pytest.raises(Stopped, match=r"SIGTERM: stopped after step 3; .*last\.ckpt holds it"):
        fit(tmp_path, After(3, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    assert steps == [3]


@pytest.mark.guard("maskvlm.training.checkpoint_io:SafeCheckpointIO.end")
def test_an_error_of_the_training_waits_for_what_was_saved(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: L.Trainer) -> None:
        raise ZeroDivisionError("x")

    slow(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, After(5, fail))
    assert load(tmp_path / "last.ckpt")["global_step"] == 4


@pytest.mark.parametrize(("cause", "warns"), [(ZeroDivisionError("x"), True), (OSError(errno.ENOSPC, "x"), False)])
def test_an_error_of_the_training_is_told_beside_a_failed_write(
    cause: Exception, warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a disk that is full one line is enough, whoever met it first."""

    def fail(_: L.Trainer) -> None:
        raise cause

    slow(monkeypatch, fails_at=4)
    with pytest.raises(type(cause), match="x"):
        fit(tmp_path, After(5, fail))
    line = f"warning: {tmp_path / 'last.ckpt'}: no space left: disk full"
    assert (line in capsys.readouterr().err) == warns


class Reads(L.Callback):
    """What a card of an evaluation would name by its hash."""

    def __init__(self, path: Path) -> None:
        self.path, self.steps = path, []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps.append((trainer.global_step, load(self.path)["global_step"]))


@pytest.mark.guard("maskvlm.training.checkpoint_io:SafeCheckpointIO.finish")
def test_a_run_that_goes_on_reads_its_checkpoint_when_it_is_there(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path, max_steps=2)
    slow(monkeypatch)
    reads = Reads(tmp_path / "last.ckpt")
    fit(tmp_path, reads, limit_val_batches=1, ckpt_path=tmp_path / "last.ckpt")
    assert reads.steps == [(4, 4), (6, 6)]


@pytest.mark.parametrize("background", [True, False])
def test_the_files_are_the_same_either_way(background: bool, tmp_path: Path) -> None:
    in_background: list[bool] = []
    look = After(3, lambda trainer: in_background.append(trainer.strategy.checkpoint_io.writer is not None))
    trainer = fit(tmp_path, look, background=background)
    assert in_background == [background]
    for name, step in (("last", 6), ("previous", 4)):
        content = load(tmp_path / f"{name}.ckpt")
        assert content["global_step"] == step
        expected = 1 - 0.8**step  # each step goes a fifth of the way to 1
        assert content["state_dict"]["weight"].item() == pytest.approx(expected)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert load(tmp_path / "after.ckpt")["global_step"] == 6  # there when the call returns


class Other(CheckpointIO):
    """Somebody else's."""

    def __init__(self) -> None:
        self.saved: list[int] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.saved.append(checkpoint["global_step"])

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        raise NotImplementedError

    def remove_checkpoint(self, path: Any) -> None:
        raise NotImplementedError


def test_another_checkpoint_plugin_is_left_alone(tmp_path: Path) -> None:
    other = Other()
    fit(tmp_path, io=other)
    assert other.saved == [2, 4, 6]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 998])
def test_one_value_that_is_lost_is_found(value: float, place: int, tmp_path: Path) -> None:
    """Also beside values whose sum is no number; these alone are no fault."""
    module = torch.nn.ParameterDict({"large": torch.full((100,), 3e38), "small": torch.ones(999)})
    trainer: Any = SimpleNamespace(lightning_module=module, global_step=5)
    check_finite(trainer, tmp_path)
    with torch.no_grad():
        module["small"][place] = value
    with pytest.raises(UserError, match=r"1 of 2 tensors are not finite at step 5 \(small, \.\.\.\)"):
        check_finite(trainer, tmp_path)
