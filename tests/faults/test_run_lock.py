"""One training at a time in a folder: processes that hold the lock, are killed, or sit on another machine."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from guards import HERE, Build, without

from maskvlm.checkpoint.io import save
from maskvlm.training.failure import user_line
from maskvlm.utils import lock, whole_files
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.lock import HELD, NAME, Holder, RunLock, read_holder, state
from maskvlm.utils.write_errors import writing

SRC = Path(lock.__file__).parents[2]
HOLD = """
import sys, time, os
sys.path[:0] = {paths}
from pathlib import Path
from guards import without
from maskvlm.utils.errors import UserError
from maskvlm.utils.lock import HELD
for guard in {guard}:
    context = without(*guard)  # to the end of this process
    context.__enter__()
began = time.monotonic()
try:
    HELD.take(Path({folder!r}))
except UserError as error:
    print(int(error.code), error, flush=True)
    sys.exit(int(error.code))
if {forks}:
    if not os.fork():
        time.sleep(60)  # as a data worker that outlives its parent
print("held", os.getpid(), f"{{time.monotonic() - began:.1f}} s", flush=True)
time.sleep(60)
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def hold(started: list[subprocess.Popen[str]], folder: Path, build: Build, forks: bool = False) -> tuple[int, str]:
    """A process that takes the lock and keeps it; its number and its line."""
    guard = [(build.guard, build.gives)] if build.guard else []
    code = HOLD.format(paths=[str(SRC), str(HERE.parent)], guard=guard, folder=str(folder), forks=forks)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    started.append(process)
    assert process.stdout is not None
    return process.pid, process.stdout.readline().strip()


@pytest.mark.guard("maskvlm.utils.lock:flock", gives="True")
def test_the_second_is_told_who_the_first_is(
    build: Build, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    pid, line = hold(started, tmp_path, build)
    assert line.startswith(f"held {pid} ")
    _, line = hold(started, tmp_path, build)
    assert line.startswith(f"73 {tmp_path}: another process is training here (process {pid} on ")
    _, line = hold(started, tmp_path / "another", build)
    assert line.startswith("held ")


@pytest.mark.guard("maskvlm.utils.lock:RunLock._leave_behind")
def test_a_killed_holder_is_gone_at_once_though_its_children_live(
    build: Build, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    pid, line = hold(started, tmp_path, build, forks=True)
    assert line.startswith(f"held {pid} ")
    os.kill(pid, signal.SIGKILL)
    _, line = hold(started, tmp_path, build)
    assert line.startswith("held ")
    assert float(line.split()[2]) < 1.0


def test_a_copy_locks_nothing(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    hold(started, tmp_path / "run", Build())
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert hold(started, tmp_path / "copy", Build())[1].startswith("held ")


def test_a_lock_that_was_let_go_is_free_and_says_nothing(tmp_path: Path) -> None:
    HELD.take(tmp_path)
    assert read_holder(tmp_path / NAME) is not None
    HELD.release()
    assert read_holder(tmp_path / NAME) is None
    HELD.take(tmp_path)
    HELD.take(tmp_path / "next")  # one at a time
    assert read_holder(tmp_path / NAME) is None
    HELD.release()


# ------------------------------------------------------------------ machines whose locks do not see each other


def test_it_is_let_go_in_the_middle_of_a_beat(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow file system; the beat then neither fails nor writes into a file that is closed."""
    slow, failed = threading.Event(), list[object]()

    def read(path: Path) -> Holder | None:
        holder = read_holder(path)
        slow.set()
        time.sleep(0.3)
        return holder

    monkeypatch.setattr(lock, "read_holder", read)
    monkeypatch.setattr(threading, "excepthook", failed.append)
    HELD.take(tmp_path)
    assert slow.wait(5)
    HELD.release()
    time.sleep(0.5)
    assert failed == []
    assert not [thread for thread in threading.enumerate() if thread.name == "run.lock"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "WATCH", 0.4)


def elsewhere(folder: Path, **facts: object) -> Holder:
    """States that another machine trains here; its lock is not seen."""
    (folder / NAME).touch()
    inode = (folder / NAME).stat().st_ino
    holder = Holder("far", 17, "another boot", inode)._replace(**facts)
    handle = os.open(folder / NAME, os.O_RDWR)
    state(handle, holder)
    os.close(handle)
    return holder


@pytest.mark.guard("maskvlm.utils.lock:beats", gives="False")
def test_a_holder_elsewhere_that_gives_signs_of_life_is_believed(build: Build, tmp_path: Path, quick: None) -> None:
    elsewhere(tmp_path)
    end = threading.Event()

    def live() -> None:
        beat = 1
        while not end.wait(0.1):
            elsewhere(tmp_path, beat=(beat := beat + 1))

    thread = threading.Thread(target=live)
    thread.start()
    mine = RunLock()
    try:
        with pytest.raises(UserError) as caught:
            mine.take(tmp_path)
    finally:
        end.set()
        thread.join()
        mine.release()
    assert caught.value.code == ExitCode.CANNOT_CREATE
    assert caught.value.what == "another process is training here (process 17 on far)"


def test_a_silent_holder_elsewhere_is_taken_for_dead(tmp_path: Path, quick: None) -> None:
    elsewhere(tmp_path)
    messages: list[str] = []
    mine = RunLock()
    mine.take(tmp_path, messages.append)
    assert messages == [f"{tmp_path}: process 17 on far trained here and gave no sign of life for 0 s: taken over"]
    mine.release()


def test_a_holder_that_withdraws_while_it_is_watched_is_no_silent_one(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(tmp_path)

    def ends(path: Path, holder: Holder) -> bool:
        path.unlink()
        return False

    monkeypatch.setattr("maskvlm.utils.lock.beats", ends)
    messages: list[str] = []
    mine = RunLock()
    mine.take(tmp_path, messages.append)
    assert messages == []
    assert (tmp_path / NAME).exists()  # held by a file that others find
    mine.release()


def test_without_locks_of_the_kernel_signs_of_life_decide(tmp_path: Path, quick: None) -> None:
    """As on a file system that has none: the kernel's answer is replaced, as no such file system is at hand."""
    first, second = RunLock(), RunLock()
    with without("maskvlm.utils.lock:flock", "None"):
        first.take(tmp_path)
        with pytest.raises(UserError, match=f"another process is training here .process {os.getpid()} on "):
            second.take(tmp_path)
        first.release()
        second.take(tmp_path)
    second.release()


def test_a_statement_of_a_copied_file_is_not_watched(
    tmp_path: Path, started: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied from another machine, with its lock file."""
    elsewhere(tmp_path, inode=1)
    began = time.monotonic()
    mine = RunLock()
    mine.take(tmp_path)
    mine.release()
    assert time.monotonic() - began < 1


@pytest.mark.guard("maskvlm.utils.lock:RunLock.check")
def test_who_was_taken_for_dead_and_wakes_stops(build: Build, tmp_path: Path, quick: None) -> None:
    mine = RunLock()
    mine.take(tmp_path)
    elsewhere(tmp_path)
    until = time.monotonic() + 5
    while mine.rival is None and time.monotonic() < until:
        time.sleep(0.02)
    with pytest.raises(UserError, match=r"another process is training here \(process 17 on far\)"):
        mine.check()
    mine.release()
    assert read_holder(tmp_path / NAME) == elsewhere(tmp_path)  # the other's statement stays


@pytest.mark.parametrize("content", [b"", b"\xff" * 600, b"[]", b"{}", json.dumps({"pid": 1e400}).encode(), b"[" * 512])
def test_a_damaged_lock_file_says_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(content)
    assert read_holder(tmp_path / NAME) is None
    mine = RunLock()
    mine.take(tmp_path)
    mine.release()


def test_a_file_that_was_withdrawn_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process opened it before, and got the lock of a file that nobody finds any more: it takes the new one."""
    first, second, third = RunLock(), RunLock(), RunLock()
    first.take(tmp_path)
    opened: list[int] = []
    original = os.open

    def late(path: Any, flags: int, mode: int = 0o777) -> int:
        handle = original(path, flags, mode)
        if not opened and path == tmp_path / NAME:
            first.withdraw()
        opened.append(handle)
        return handle

    monkeypatch.setattr(os, "open", late)
    second.take(tmp_path)
    monkeypatch.setattr(os, "open", original)
    assert len(opened) >= 2
    with pytest.raises(UserError, match="another process is training here"):
        third.take(tmp_path)
    second.withdraw()
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_is_gone_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised from itself, this error once had a chain of causes without an end."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UserError, match=r"checkpoints/x: cannot be made \(No such file") as raised:
        RunLock().take(Path("checkpoints/x"))
    assert raised.value.code == ExitCode.CANNOT_CREATE
    error = OSError(0, "of itself")
    error.__cause__ = error
    assert user_line(error) is None


def write_a_text(folder: Path) -> None:
    whole_files.write_text(folder / "x", "")


def write_within(folder: Path) -> None:
    with writing(folder):
        os.open(folder / "x", os.O_RDONLY)  # not there: no line tells what that means for an output


def write_a_checkpoint(folder: Path) -> None:
    save({}, folder / "x.ckpt")


@pytest.mark.parametrize("write", [write_a_text, write_within, write_a_checkpoint])
def test_an_error_without_a_line_of_its_own_is_no_cause_of_itself(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(error: Exception) -> Callable[..., None]:
        def fail(*_: object, **__: object) -> None:
            raise error

        return fail

    monkeypatch.setattr(whole_files, "whole_file", fails(OSError(errno.EINVAL, "strange")))
    monkeypatch.setattr(torch, "save", fails(RuntimeError("torch's own")))
    with pytest.raises((OSError, RuntimeError)) as raised:
        write(tmp_path)
    assert raised.value.__cause__ is None
