"""One training at a time in a folder: processes that hold the lock, are killed, or sit on another machine."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskvlm.utils import lock
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.lock import HELD, NAME, Holder, RunLock, read_holder, state

SRC = Path(lock.__file__).parents[2]
HOLD = """
import sys, time, os
sys.path.insert(0, {src!r})
from pathlib import Path
from maskvlm.utils.lock import HELD
HELD.take(Path({folder!r}))
if not os.fork():
    time.sleep(60)  # as a data worker that outlives its parent
print("held", flush=True)
time.sleep(60)
"""
IN_USE = "another process is training here"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of `tmp_path`, and has a child."""
    code = HOLD.format(src=str(SRC), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def mine() -> Iterator[RunLock]:
    own = RunLock()
    yield own
    own.release()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "WATCH", 0.4)


def refused(own: RunLock, folder: Path, named: str) -> None:
    with pytest.raises(UserError, match=f"{IN_USE} .{named}") as caught:
        own.take(folder)
    assert caught.value.code == ExitCode.CANNOT_CREATE


def test_a_process_holds_its_folder_until_it_is_killed(
    holder: subprocess.Popen[str], mine: RunLock, tmp_path: Path
) -> None:
    """Then it is free at once, though its child lives; a copy of the folder is free at any time."""
    refused(mine, tmp_path, f"process {holder.pid} on ")
    shutil.copytree(tmp_path, tmp_path.parent / "copy")
    mine.take(tmp_path.parent / "copy")
    holder.kill()
    holder.wait()
    began = time.monotonic()
    mine.take(tmp_path)
    assert time.monotonic() - began < 1.5


# ------------------------------------------------------------------ machines whose locks do not see each other


def elsewhere(folder: Path, **facts: object) -> Holder:
    """States that another machine trains here; its lock is not seen."""
    (folder / NAME).touch()
    inode = (folder / NAME).stat().st_ino
    holder = Holder("far", 17, "another boot", inode)._replace(**facts)
    handle = os.open(folder / NAME, os.O_RDWR)
    state(handle, holder)
    os.close(handle)
    return holder


def test_a_silent_holder_elsewhere_is_taken_for_dead(mine: RunLock, tmp_path: Path, quick: None) -> None:
    elsewhere(tmp_path)
    messages: list[str] = []
    mine.take(tmp_path, messages.append)
    assert len(messages) == 1
    assert "process 17 on far" in messages[0]


def test_without_locks_of_the_kernel_signs_of_life_decide(
    mine: RunLock, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that has none: the kernel's answer is replaced, as no such file system is at hand."""
    monkeypatch.setattr(lock, "flock", lambda handle: None)
    HELD.take(tmp_path)
    refused(mine, tmp_path, f"process {os.getpid()} on ")
    HELD.release()
    mine.take(tmp_path)


def test_who_was_taken_for_dead_and_wakes_stops(mine: RunLock, tmp_path: Path, quick: None) -> None:
    mine.take(tmp_path)
    other = elsewhere(tmp_path)
    until = time.monotonic() + 5
    while mine.rival is None and time.monotonic() < until:
        time.sleep(0.02)
    with pytest.raises(UserError, match=f"{IN_USE} .process 17 on far"):
        mine.check()
    mine.release()
    assert read_holder(tmp_path / NAME) == other  # the other's statement stays
