"""What happens to a data worker, or to /dev/shm, is one line with its cause and its sample."""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from forks import Forks, small

from maskvlm.data import workers
from maskvlm.data.workers import ENDS, READS, At, Board, lost_worker
from maskvlm.utils.errors import ExitCode, UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults of Linux processes")
WORKERS = ("--data.workers=2", "--data.steps=40")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("killed", ExitCode.IO_ERROR, "was killed"),
        ("hangs", ExitCode.IO_ERROR, "has been at"),
        ("raises", ExitCode.OUR_BUG, "RuntimeError: something nobody thought of while reading"),
    ],
)
def test_a_fault_in_a_worker_is_one_line_with_its_sample(
    fault: str, code: int, said: str, forks: Forks, tmp_path: Path
) -> None:
    """And the command ends, though a worker may hang: Python would wait for its process."""
    sooner = {"maskvlm.data.workers:PATIENCE": 3, "torch.utils.data._utils:MP_STATUS_CHECK_INTERVAL": 0.5}
    spoil = {"sample": 33, "fault": fault}
    child = forks.start(small(tmp_path / "run", *WORKERS), tmp_path / "log.txt", settings=sooner, spoil=spoil)
    assert child.wait(180) == code
    (line,) = child.output_lines("error: ", "Traceback")
    assert said in line
    assert "sample 33" in line


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(forks: Forks, tmp_path: Path) -> None:
    """A worker that hangs in a read does not look for its parent."""
    words = small(tmp_path / "run", *WORKERS)
    child = forks.start(words, tmp_path / "log.txt", spoil={"sample": 33, "fault": "hangs"})
    until, workers = time.monotonic() + 60, list[str]()
    while len(workers) < 2 and time.monotonic() < until:
        time.sleep(0.05)
        workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    time.sleep(0.7)  # one of them hangs by now
    child.signal(signal.SIGKILL)
    assert child.wait(5) == -signal.SIGKILL
    time.sleep(0.9)
    assert len(workers) == 2
    for pid in workers:
        stat = Path(f"/proc/{pid}/stat")  # nobody may have collected it yet: then it is a zombie, Z
        assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


# ---------------------------------------------------------------------- in one process


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    """Of two workers: the first reads sample 7, the second has ended at sample 8."""
    board = Board(2)
    board.write(0, At(11, READS, 7, time.monotonic() - 50, "a.tar!7.png"))
    board.write(1, At(12, ENDS, 8, 0.0, "/dev/shm is full"))
    monkeypatch.setattr(workers, "BOARDS", [board])
    return board


@pytest.mark.parametrize(
    ("text", "said", "todo"),
    [
        ("DataLoader worker (pid 11) is killed by signal: Killed. ", "was killed at sample 7 (a.tar!7.png)", "memory"),
        ("DataLoader worker (pid 11) is killed by signal: Bus error. ", "bus error at sample 7", "data-check"),
        ("DataLoader worker (pid(s) 11) exited unexpectedly", "ended by itself at sample 7", "data.workers 0"),
        ("DataLoader worker (pid(s) 11, 12) exited unexpectedly", "/dev/shm is full (after sample 8)", "larger"),
        ("DataLoader worker (pid(s) 5) exited unexpectedly", "ended by itself at an unknown sample", "data.workers 0"),
        ("DataLoader timed out after 120 seconds", "process 11 has been at sample 7 (a.tar!7.png) for 50 s", "disk"),
    ],
)
def test_a_lost_worker_is_named_with_cause_and_sample(board: Board, text: str, said: str, todo: str) -> None:
    error = lost_worker(text)
    assert error is not None
    assert said in error.what
    assert todo in error.todo
    assert error.code == ExitCode.IO_ERROR
    assert lost_worker("shapes differ") is None


def test_an_error_of_a_sample_names_it() -> None:
    class Data(dict[int, int]):
        def __getitem__(self, index: int) -> int:
            raise MemoryError if index else KeyError(index)

    with pytest.raises(KeyError) as caught:
        workers.Noted(Data())[0]  # type: ignore[arg-type]
    assert caught.value.__notes__ == ["while reading sample 0"]
    with pytest.raises(UserError, match="no memory left at sample 1"):
        workers.Noted(Data())[1]  # type: ignore[arg-type]
    full = workers.no_memory(RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"))
    assert full is not None
    assert full.code == ExitCode.IO_ERROR


def test_shared_memory_that_is_too_small_is_found_before_workers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers prepare two batches each, and one is in use: five of each process."""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=100, f_frsize=1000))
    workers.check_shared(10_000, 2, 2)
    with pytest.raises(UserError, match="/dev/shm") as caught:
        workers.check_shared(10_001, 2, 2)
    assert caught.value.code == ExitCode.IO_ERROR
