"""Rows 11, 12, 16 and a full /dev/shm: what happens to a data worker is one line with its cause and its sample."""

import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import ROOT, Forks, environment, small
from guards import Build

from maskvlm.data.workers import ALONE, ENDS, LARGER, NOTE, READS, At, Board, cannot_hand_over, lost_worker, uncaught
from maskvlm.training.failure import user_line
from maskvlm.training.peers import alive
from maskvlm.utils.errors import ExitCode, UserError

SAMPLE = "sample 33 (scenes (seed 0) train image 33, scene d423ee8d041a9a75)"
LOST, NAMED = "maskvlm.data.workers:lost_worker", "maskvlm.data.workers:no_memory"


def run(forks: Forks, tmp_path: Path, build: Build, fault: str, patience: float = 2) -> tuple[int | str, list[str]]:
    """Exit status and error lines of a training whose worker meets `fault`; after `patience` seconds without a batch it
    is taken for hanging."""
    words = small(tmp_path / "run", "--data.workers=2", "--data.steps=40", fault=fault)
    sooner = {"maskvlm.data.workers:PATIENCE": patience, "torch.utils.data._utils:MP_STATUS_CHECK_INTERVAL": 0.5}
    child = forks.start(words, tmp_path / "log.txt", build=build, settings=sooner)
    code = child.wait(60)
    assert not child.output_lines("Traceback")
    return code, child.output_lines("error: ")


def one_line(outcome: tuple[int | str, list[str]], *parts: str) -> None:
    """74, and one line with these parts and the sample."""
    code, lines = outcome
    assert (code, len(lines)) == (ExitCode.IO_ERROR, 1)
    assert all(part in lines[0] for part in (*parts, SAMPLE))
    assert "This is a bug" not in lines[0]


@pytest.mark.guard(LOST)
def test_a_worker_that_is_killed(forks: Forks, tmp_path: Path, build: Build) -> None:
    one_line(run(forks, tmp_path, build, "killed"), "was killed", "memory ran out")


@pytest.mark.guard(LOST)
def test_a_worker_that_ends(forks: Forks, tmp_path: Path, build: Build) -> None:
    one_line(run(forks, tmp_path, build, "exits"), "ended by itself")


@pytest.mark.guard(LOST)
def test_a_worker_that_meets_a_bus_error(forks: Forks, tmp_path: Path, build: Build) -> None:
    """The signal is what a full /dev/shm or a truncated memory-mapped file gives."""
    code, lines = run(forks, tmp_path, build, "bus error")
    assert code == ExitCode.IO_ERROR
    assert SAMPLE in lines[-1]
    assert "/dev/shm is full, or a file was truncated" in lines[-1]


@pytest.mark.guard(LOST)
def test_a_worker_that_hangs(forks: Forks, tmp_path: Path, build: Build) -> None:
    one_line(run(forks, tmp_path, build, "hangs"), "no batch arrived within 2 s", "has been at")


HANGS = """
import sys, time
import torch.utils.data._utils as utils
from guards import without
from torch.utils.data import DataLoader, Dataset
from maskvlm.data import workers

class Hangs(Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, index):
        time.sleep(1000)

workers.PATIENCE, utils.MP_STATUS_CHECK_INTERVAL = 2, 0.3
gone = without(*sys.argv[1:])
gone.__enter__()  # to the very end
try:
    next(iter(workers.noted_loader(DataLoader, Hangs(), list, 1)))
except RuntimeError as error:
    print(workers.lost_worker(str(error)), flush=True)
sys.exit(7)
"""


def test_a_strangers_name_in_a_workers_mistake_is_one_line_without_escapes() -> None:
    """As torch raises it anew: the traceback of the worker as text."""
    error = UserError("/d/a\x1b[2J\nb.png", "is damaged", "Mend it", ExitCode.IO_ERROR)
    text = "".join(traceback.format_exception(error))
    line = user_line(RuntimeError(f"Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n{text}"))
    assert line is not None
    assert line.text == "/d/a [2J b.png: is damaged. Mend it."
    assert line.code == ExitCode.IO_ERROR


def test_the_signal_is_told_where_torch_hides_it_in_the_cause() -> None:
    """torch's handler raises inside torch's own wait for a batch, which then says less than the handler."""
    message = "DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that ..."
    hidden = RuntimeError("DataLoader worker (pid(s) 5) exited unexpectedly")
    hidden.__cause__ = RuntimeError(message)
    line = user_line(hidden)
    assert line is not None
    assert "met a bus error at an unknown sample: /dev/shm is full, or a file was truncated" in line.text


@pytest.mark.guard("maskvlm.data.workers:end_workers")
def test_a_process_ends_though_a_worker_hangs(tmp_path: Path, build: Build) -> None:
    """Python waits for the process at its end, and SIGTERM is not heeded there."""
    guard = [build.guard, build.gives] if build.guard else ["maskvlm.utils.launch:requeue"]  # any other
    command = [sys.executable, "-c", HANGS.replace("    sys.exit(7)", "").rstrip() + "\n    atexit_now()", *guard]
    command[2] = HANGS
    with subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            code: int | None = process.wait(5)
        except subprocess.TimeoutExpired:
            code = None
            process.kill()
    assert line.startswith("data workers: no batch arrived within 2 s; process ")
    assert code == 7


@pytest.mark.guard(NAMED)
def test_a_worker_without_memory(forks: Forks, tmp_path: Path, build: Build) -> None:
    one_line(run(forks, tmp_path, build, "memory"), "no memory left", "Unable to allocate 1.00 GiB")


def test_a_bug_in_a_worker_names_the_sample(forks: Forks, tmp_path: Path) -> None:
    code, lines = run(forks, tmp_path, Build(), "raises")
    assert code == ExitCode.OUR_BUG
    assert f"RuntimeError: something nobody thought of while reading {SAMPLE}. This is a bug" in lines[0]


def test_the_board_holds_what_a_worker_says() -> None:
    board = Board(2)
    first, second = At(1, 1, 2**40, 2.5, "é" * 400), At(3, 0, -1, 0.0, "")
    board.write(0, first)
    board.write(1, first)
    board.write(1, second)
    read = board.read()
    assert read[0][:4] == first[:4]
    assert "é" * 200 in read[0].text
    assert read[1] == second
    assert (str(first._replace(text="x")), str(second)) == (f"sample {2**40} (x)", "a sample")


# ---------------------------------------------------------------------- /dev/shm


@pytest.fixture(scope="module")
def confined() -> Iterator[Forks]:
    """Commands in a namespace of their own, whose /dev/shm holds 20 MB."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs unshare -m (root on Linux) to mount a small /dev/shm")
    script = 'mount -t tmpfs -o size=20m tmpfs /dev/shm && exec "$@"'
    with Forks("unshare", "-m", "sh", "-c", script, "sh") as fork_server:
        yield fork_server


@pytest.mark.guard("maskvlm.data.workers:check_shared")
def test_shared_memory_that_is_too_small_is_found_before_workers_start(
    confined: Forks, tmp_path: Path, build: Build
) -> None:
    words = small(tmp_path / "run", "--data.workers=2", "--data.steps=1", "--data.batch_size=1024")
    child = confined.start(words, tmp_path / "log.txt", build=build)
    assert child.wait(60) == ExitCode.IO_ERROR
    message = "error: /dev/shm: 21.0 MB are free, 1 x 2 data workers prepare 35.4 MB. Lower data.workers"
    assert child.output_lines("error: ")[0].startswith(message)


@pytest.mark.guard(NAMED)
def test_shared_memory_that_is_full_in_mid_run(confined: Forks, tmp_path: Path, build: Build) -> None:
    # A busy machine takes a while to fill it.
    code, lines = run(confined, tmp_path, build, "shared memory", patience=20)
    assert code == ExitCode.IO_ERROR
    assert lines[0].startswith(f"error: /dev/shm: is full at {SAMPLE}. Lower data.workers")


@pytest.mark.parametrize(
    ("why", "what", "todo"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1>", "/dev/shm is full", LARGER),
        ("Too many open files", "it could not pass on a batch: Too many open files", ALONE),
    ],
)
def test_a_batch_that_cannot_be_handed_over(why: str, what: str, todo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More room in /dev/shm is advised where that is what is missing."""
    board = Board(1)
    monkeypatch.setattr("maskvlm.data.workers.BOARDS", [board])
    for name, value in {"board": board, "worker": 0, "now": At(0, READS, 5, 0.0, "")}.items():
        monkeypatch.setattr(NOTE, name, value)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as caught:
        cannot_hand_over(RuntimeError(why), None)
    assert caught.value.code == ExitCode.IO_ERROR
    error = lost_worker(f"DataLoader worker (pid(s) {os.getpid()}) exited unexpectedly")
    assert error is not None
    assert (error.what, error.todo) == (f"{what} (after sample 5)", todo)


def test_of_two_workers_the_one_that_says_why_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(2)
    board.write(0, At(11, READS, 7, 0.0, ""))
    board.write(1, At(12, ENDS, 8, 0.0, "/dev/shm is full"))
    monkeypatch.setattr("maskvlm.data.workers.BOARDS", [board])
    error = lost_worker("DataLoader worker (pid(s) 11, 12) exited unexpectedly")
    assert error is not None
    assert error.what == "/dev/shm is full (after sample 8)"


@pytest.mark.parametrize(
    ("error", "reported"), [(ConnectionResetError(104, "reset"), False), (EOFError(), False), (KeyError("x"), True)]
)
def test_a_thread_that_hands_over_to_nobody_says_nothing(
    error: Exception, reported: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    uncaught(type(error), error, None)
    assert ("KeyError" in capsys.readouterr().err) == reported


# ---------------------------------------------------------------------- orphans


@pytest.mark.guard("maskvlm.utils.signals:end_with_parent")
def test_workers_end_with_a_process_that_is_killed(forks: Forks, tmp_path: Path, build: Build) -> None:
    """In less than a second; a worker that hangs in a read does not look for its parent."""
    words = small(tmp_path / "run", "--data.workers=2", "--data.steps=40", fault="hangs")
    child = forks.start(words, tmp_path / "log.txt", build=build)
    until, workers = time.monotonic() + 30, list[int]()
    while len(workers) < 2 and time.monotonic() < until:
        time.sleep(0.05)
        workers = [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
    time.sleep(0.7)  # one of them hangs by now
    child.signal(signal.SIGKILL)
    assert child.wait(5) == -signal.SIGKILL
    time.sleep(0.9)
    survivors = [pid for pid in workers if alive(pid)]
    for pid in survivors:
        os.kill(pid, signal.SIGKILL)
    assert len(workers) == 2
    assert survivors == []


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults of Linux processes")
