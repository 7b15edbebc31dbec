"""Of several processes one is lost, frozen, raises or stands still; the others say who, and end.

`bench/pairs.py` is the long version, at random moments.
"""

import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forks import PAIR, Forks, Pair, ends, small

from maskvlm.training import peers
from maskvlm.training.peers import Peers, blamed
from maskvlm.utils.errors import ExitCode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults of Linux processes")
ENDLESS = (*PAIR, "--data.steps=9999", "--trainer.limit_val_batches=0")


def two(forks: Forks, tmp_path: Path, *more: str, spoil: dict[str, Any] | None = None) -> Pair:
    """Two processes of one run, which have written a checkpoint."""
    pair = forks.start_two(small(tmp_path / "run", *ENDLESS, "--patience=4", *more), tmp_path, spoil=spoil)
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "last.ckpt").exists() and time.monotonic() < until:
        time.sleep(0.02)
    return pair


def errors(pair: Pair) -> list[str]:
    return [line for child in pair for line in child.output_lines("error: ", "Traceback")]


@pytest.mark.slow
def test_a_process_that_is_killed_is_named(forks: Forks, tmp_path: Path) -> None:
    pair = two(forks, tmp_path)
    pair[1].signal(signal.SIGKILL)
    assert ends(pair, 180) == [ExitCode.UNAVAILABLE, -signal.SIGKILL]
    (line,) = errors(pair)
    assert f"rank 1 ({socket.gethostname()}, process {pair[1].pid}): was lost: it was killed" in line
    assert line.endswith(f"The same command resumes from {tmp_path / 'run' / 'last.ckpt'}.")


@pytest.mark.slow
def test_the_first_process_that_is_frozen_is_named_and_ended(forks: Forks, tmp_path: Path) -> None:
    pair = two(forks, tmp_path)
    pair[0].signal(signal.SIGSTOP)
    began = time.monotonic()
    assert ends(pair, 180) == [-signal.SIGKILL, ExitCode.UNAVAILABLE]
    assert time.monotonic() - began >= 3  # the last sign of life was up to a beat before
    (line,) = errors(pair)
    assert "rank 0 (" in line
    assert "has shown no sign of life for " in line
    assert "Thread 0x" in (tmp_path / "run" / "stacks-rank1.txt").read_text()


# ---------------------------------------------------------------------- what is judged, without processes


def people(folder: Path, world: int) -> list[Peers]:
    everyone = [Peers(folder, "t", rank, world, silent=3, still=6) for rank in range(world)]
    for each in everyone:
        each.write()
    return everyone


def test_who_stands_still_is_he_that_others_wait_for(tmp_path: Path) -> None:
    first, second, third = people(tmp_path, 3)
    first.move(5, 2, "backward in batch 6")
    third.move(5, 2, "backward in batch 6")
    second.move(5, 1, "forward in batch 6")
    for look in range(7):
        assert first.judge(3, 6) is None, look
        for each in (first, second, third):
            each.write()
        first.look(first.everyone())
    lost = first.judge(3, 6)
    assert lost is not None
    assert (lost.rank, lost.code) == (1, ExitCode.UNAVAILABLE)
    assert "is stuck forward in batch 6" in str(lost)
    second.move(5, 2, "backward in batch 6")  # all at one place: nobody waits for another
    second.write()
    first.look(first.everyone())
    assert first.judge(3, 6) is None


def test_silence_is_counted_in_looks_and_ends_with_a_beat(tmp_path: Path) -> None:
    first, second = people(tmp_path, 2)
    for _ in range(3):
        first.write()
        first.look([1])
    assert first.judge(3, 6) is None  # two looks without a new record
    second.write()
    for _ in range(3):
        first.look([1])
    assert first.judge(3, 6) is None
    first.look([1])
    lost = first.judge(3, 6)
    assert lost is not None
    assert lost.rank == 1
    first.writes = False  # the file system is gone: nobody else can write either
    first.records.clear()
    for _ in range(9):
        first.look([1])
    assert first.judge(3, 6) is None


def test_how_others_ended_decides(tmp_path: Path) -> None:
    first, second, third = people(tmp_path, 3)

    def verdict() -> tuple[int | None, int] | None:
        first.look(first.everyone())
        lost = first.judge(3, 6)
        return lost and (lost.rank, int(lost.code))

    second.write(code=0)
    third.write(code=75)
    assert verdict() is None
    third.write(code=69, because=1, why="rank 1 was lost")
    assert verdict() == (1, 69)
    second.write(code=65)
    assert verdict() == (1, 65)


def test_records_of_an_earlier_start_are_cleared_and_those_of_this_one_are_kept(tmp_path: Path) -> None:
    people(tmp_path, 3)
    later = Peers(tmp_path, "u", 0, 2, 3, 6)
    later.write()
    later.clear()
    assert [path.name for path in (tmp_path / peers.FOLDER).iterdir()] == ["rank-0"]
    later.remove()
    assert not tmp_path.exists()  # nothing else was in it


def test_a_broken_connection_is_the_fault_of_who_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = RuntimeError("gloo: Connection closed by peer")
    assert blamed(broken) is None  # alone
    first, second = people(tmp_path, 2)
    monkeypatch.setattr(peers, "CURRENT", [first])
    assert blamed(RuntimeError("shapes differ")) is None
    assert blamed(ValueError("gloo")) is None
    second.write(code=70)
    lost = blamed(broken)
    assert lost is not None
    assert (lost.rank, lost.code) == (1, 70)
