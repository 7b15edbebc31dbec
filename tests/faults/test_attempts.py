"""A run that dies in the same step is not tried for ever: what the side file tells, after real deaths too."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from guards import Build
from training.test_early_stop import SMALL

from maskvlm.checkpoint.io import save
from maskvlm.cli.lightning import LightningCommand, run_command
from maskvlm.training import attempts
from maskvlm.training.attempts import NAME, Attempt, Failures, attempted, failures
from maskvlm.training.resume import newest_of
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.launch import Stopped

SRC = Path(attempts.__file__).parents[2]
DIES = """
import os, signal, sys
sys.path.insert(0, {src!r})
from pathlib import Path
from maskvlm.training.attempts import Attempt
attempt = Attempt(Path({folder!r}))
for step in {steps}:
    attempt.note(step)
os.kill(os.getpid(), signal.SIGKILL)
"""
SAME = "run: a\n"


def dies(folder: Path, *steps: int) -> None:
    """A process that makes these steps and is killed in the last."""
    code = DIES.format(src=str(SRC), folder=str(folder), steps=[*steps])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_deaths_in_one_step_are_counted_and_others_begin_anew(tmp_path: Path) -> None:
    assert failures(tmp_path) == Failures()
    for times in (1, 2):
        dies(tmp_path, 5, 6, 7)
        assert failures(tmp_path) == Failures(7, times) == failures(tmp_path)  # to ask changes nothing
    dies(tmp_path)  # before its first step
    assert failures(tmp_path) == Failures(7, 2)
    dies(tmp_path, 5, 6, 7, 8)
    assert failures(tmp_path) == Failures(8, 1)


def run_that_died(folder: Path, times: int) -> Path:
    folder.joinpath("config-fit.yaml").write_text(SAME)
    for step in (4, 8):
        save({"state_dict": {}, "global_step": step}, folder / "last.ckpt", folder / "previous.ckpt")
    for _ in range(times):
        attempt = Attempt(folder)
        attempt.note(9)
        attempt.close()
    return folder


@pytest.mark.guard("maskvlm.training.attempts:check_attempts", gives="failures(args[0])")
def test_four_are_the_most(build: Build, tmp_path: Path) -> None:
    folder, messages = run_that_died(tmp_path, 4), []
    with pytest.raises(UserError) as caught:
        newest_of(folder, SAME, messages.append)
    assert caught.value.code == ExitCode.REFUSED
    assert caught.value.what == "the run died 4 times in step 9"
    (folder / NAME).unlink()  # as the line says
    assert newest_of(folder, SAME, messages.append) == str(folder / "last.ckpt")


@pytest.mark.parametrize("words", [["validate", "--ckpt_path", "x.ckpt"], ["fit", "--trainer.fast_dev_run=true"]])
def test_what_ends_an_evaluation_or_a_trial_leaves_the_count_of_the_training(
    words: list[str], stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder of a training, as of one that is stopped by Ctrl-C: it has made no attempt."""
    monkeypatch.chdir(SRC.parent)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("before_fit", "before_validate"):
        monkeypatch.setattr(LightningCommand, name, interrupted)
    folder = run_that_died(tmp_path, 3)
    options = [f"--{key}={value}" for key, value in SMALL.items()]
    with pytest.raises(KeyboardInterrupt):
        run_command(LightningCommand, [words[0], "--folder", str(folder), *stack(WHERE="cpu"), *options, *words[1:]])
    assert failures(folder) == Failures(9, 3)


@pytest.mark.guard("maskvlm.training.resume:whole", gives="False")
def test_after_two_the_checkpoint_before_is_taken(build: Build, tmp_path: Path) -> None:
    messages: list[str] = []
    assert newest_of(run_that_died(tmp_path, 1), SAME, messages.append) == str(tmp_path / "last.ckpt")
    assert not messages
    assert newest_of(run_that_died(tmp_path, 1), SAME, messages.append) == str(tmp_path / "previous.ckpt")
    (tmp_path / "previous.ckpt").write_bytes(b"PK\x03\x04")
    assert newest_of(tmp_path, SAME, messages.append) == str(tmp_path / "last.ckpt")
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("error", "counted"),
    [
        (RuntimeError("x"), True),
        (torch.OutOfMemoryError("x"), True),
        (UserError("a", "b", "c", ExitCode.BAD_DATA), True),
        (FileNotFoundError(2, "x"), True),
        (UserError("a", "disk full", "c", ExitCode.IO_ERROR), False),
        (OSError(28, "x"), False),
        (Stopped("x", 15), False),
        (KeyboardInterrupt(), False),
        (SystemExit(1), False),
    ],
)
def test_what_is_held_against_a_run(error: BaseException, counted: bool, tmp_path: Path) -> None:
    """Not a request to stop, nor what lies in the disk."""
    attempt = Attempt(tmp_path)
    attempt.note(3)
    with pytest.raises(type(error)), attempted(tmp_path):
        raise error
    attempt.close()
    assert failures(tmp_path) == (Failures(3, 1) if counted else Failures())


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"failed_in": "x", "times": 1, "step": 2}', b"[" * 9999])
def test_a_damaged_side_file_says_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(content)
    assert failures(tmp_path) == Failures()
    Attempt(tmp_path).note(3)
    assert json.loads((tmp_path / NAME).read_text())["step"] == 3


def test_a_full_disk_costs_the_note_and_not_the_run(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        attempt = Attempt(tmp_path)
        attempt.note(3)
        attempt.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failures(tmp_path) == Failures()


def test_of_a_side_file_as_much_as_a_note_is_read(tmp_path: Path) -> None:
    """Not what never ends."""
    os.symlink("/dev/zero", tmp_path / NAME)
    assert failures(tmp_path) == Failures()
