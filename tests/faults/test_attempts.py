"""A run that dies in the same step is not tried for ever: what the side file tells. Real deaths: test_run_faults.py."""

import json
import os
from pathlib import Path

import pytest

from maskvlm.checkpoint.io import save
from maskvlm.training.attempts import NAME, Attempt, Failures, attempted, failures
from maskvlm.training.resume import newest_of
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.launch import Stopped

SAME = "run: a\n"


def dies(folder: Path, *steps: int) -> None:
    """An attempt that makes these steps and writes nothing more."""
    attempt = Attempt(folder)
    for step in steps:
        attempt.note(step)
    attempt.close()


def run_that_died(folder: Path, times: int) -> Path:
    folder.joinpath("config-fit.yaml").write_text(SAME)
    for step in (4, 8):
        save({"state_dict": {}, "global_step": step}, folder / "last.ckpt", folder / "previous.ckpt")
    for _ in range(times):
        dies(folder, 9)
    return folder


def test_deaths_in_one_step_are_counted_and_others_begin_anew(tmp_path: Path) -> None:
    assert failures(tmp_path) == Failures()
    for times in (1, 2):
        dies(tmp_path, 5, 6, 7)
        assert failures(tmp_path) == Failures(7, times) == failures(tmp_path)  # to ask changes nothing
    dies(tmp_path)  # before its first step
    assert failures(tmp_path) == Failures(7, 2)
    dies(tmp_path, 5, 6, 7, 8)
    assert failures(tmp_path) == Failures(8, 1)


def test_after_two_the_checkpoint_before_is_taken_and_four_are_the_most(tmp_path: Path) -> None:
    messages: list[str] = []
    taken = [newest_of(run_that_died(tmp_path, 1), SAME, messages.append) for _ in range(3)]
    assert taken == [str(tmp_path / f"{name}.ckpt") for name in ("last", "previous", "previous")]
    (tmp_path / "previous.ckpt").write_bytes(b"PK\x03\x04")
    assert newest_of(tmp_path, SAME, messages.append) == str(tmp_path / "last.ckpt")
    assert ["previous.ckpt" in message for message in messages] == [True, True]
    with pytest.raises(UserError, match="4 times in step 9") as caught:
        newest_of(run_that_died(tmp_path, 1), SAME, messages.append)
    assert caught.value.code == ExitCode.REFUSED
    (tmp_path / NAME).unlink()  # as the line says
    assert newest_of(tmp_path, SAME, messages.append) == str(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("error", "counted"),
    [
        (RuntimeError("x"), True),
        (UserError("a", "b", "c", ExitCode.BAD_DATA), True),
        (UserError("a", "disk full", "c", ExitCode.IO_ERROR), False),
        (Stopped("x", 15), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_is_held_against_a_run(error: BaseException, counted: bool, tmp_path: Path) -> None:
    """Not a request to stop, nor what lies in the disk."""
    dies(tmp_path, 3)
    with pytest.raises(type(error)), attempted(tmp_path):
        raise error
    assert failures(tmp_path) == (Failures(3, 1) if counted else Failures())


@pytest.mark.parametrize("content", [b"\xff", b"[]", b'{"failed_in": "x", "times": 1, "step": 2}', b"[" * 9999, None])
def test_a_damaged_side_file_says_nothing(content: bytes | None, tmp_path: Path) -> None:
    """Nor does one that never ends."""
    if content is None:
        os.symlink("/dev/zero", tmp_path / NAME)
    else:
        (tmp_path / NAME).write_bytes(content)
        assert failures(tmp_path) == Failures()
        Attempt(tmp_path).note(3)
        assert json.loads((tmp_path / NAME).read_text())["step"] == 3
        (tmp_path / NAME).unlink()
    assert failures(tmp_path) == Failures()
