"""Rows 8, 9, 10, 13, 14: of several processes one is lost, frozen, raises or stands still; the others say who, and end.

`bench/pairs.py` is the long version, at random moments.
"""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import PAIR, Child, Forks, elastic, small
from guards import Build
from jsonargparse import Namespace

from maskvlm.cli.lightning import check_cards
from maskvlm.training import peers, process_watch
from maskvlm.training.failure import FIRST, failed_first
from maskvlm.training.peers import Peers, blamed
from maskvlm.utils.errors import ExitCode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults of Linux processes")
ENDLESS = (*PAIR, "--data.steps=9999", "--trainer.limit_val_batches=0", "--patience=4")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two(forks: Forks, tmp_path: Path, build: Build | None = None, fault: str = "", *more: str) -> list[Child]:
    """Two processes of one run, which have written a checkpoint; the second one may have a fault."""
    run, port = tmp_path / "run", free_port()
    words = small(run, *ENDLESS, *more)
    if fault:
        words = [word for word in words if not word.startswith("--data.source")]
        words += ["--data.source=faulty.InOne", "--data.source.rank=1", f"--data.source.fault={fault}"]
    started = [forks.start(words, tmp_path / f"rank{n}.txt", elastic(n, port), build) for n in (0, 1)]
    until = time.monotonic() + 60
    while not (run / "last.ckpt").exists() and time.monotonic() < until:
        time.sleep(0.02)
    return started


def ends(children: list[Child], seconds: float) -> list[int | str]:
    """Exit statuses; `hangs` of one that lives for longer."""
    until = time.monotonic() + seconds
    return [child.wait(max(0.1, until - time.monotonic())) for child in children]


@pytest.mark.guard("maskvlm.training.peers:blamed")
def test_a_process_that_is_killed_is_named(forks: Forks, tmp_path: Path, build: Build) -> None:
    one_is_killed(forks, tmp_path, build, 1)


def test_the_first_process_that_is_killed_is_named(forks: Forks, tmp_path: Path) -> None:
    one_is_killed(forks, tmp_path, Build(), 0)


def one_is_killed(forks: Forks, tmp_path: Path, build: Build, whom: int) -> None:
    started = two(forks, tmp_path, build)
    pid = started[whom].pid
    started[whom].signal(signal.SIGKILL)
    codes, other = ends(started, 15), started[1 - whom]
    assert codes[whom] == -signal.SIGKILL
    assert codes[1 - whom] == ExitCode.UNAVAILABLE
    lines = other.output_lines("error: ")
    assert len(lines) == 1
    assert f"rank {whom} ({socket.gethostname()}, process {pid}): was lost: it was killed" in lines[0]
    assert lines[0].endswith(f"The same command resumes from {tmp_path / 'run' / 'last.ckpt'}.")


@pytest.mark.guard("maskvlm.training.process_watch:watch")
def test_a_process_that_is_frozen_is_named_and_ended(forks: Forks, tmp_path: Path, build: Build) -> None:
    one_is_frozen(forks, tmp_path, build, 1)


def test_the_first_process_that_is_frozen_is_named_and_ended(forks: Forks, tmp_path: Path) -> None:
    one_is_frozen(forks, tmp_path, Build(), 0)


def one_is_frozen(forks: Forks, tmp_path: Path, build: Build, whom: int) -> None:
    started = two(forks, tmp_path, build)
    started[whom].signal(signal.SIGSTOP)
    began = time.monotonic()
    codes = ends(started, 30)
    assert codes[whom] == -signal.SIGKILL
    assert codes[1 - whom] == ExitCode.UNAVAILABLE
    assert time.monotonic() - began >= 3  # the last sign of life was up to a beat before
    lines = started[1 - whom].output_lines("error: ")
    assert len(lines) == 1
    assert f"rank {whom} (" in lines[0]
    assert "has shown no sign of life for " in lines[0]
    assert "Thread 0x" in (tmp_path / "run" / f"stacks-rank{1 - whom}.txt").read_text()


def test_processes_that_sleep_together_go_on(forks: Forks, tmp_path: Path) -> None:
    """As a laptop does that is closed: longer than the time after which one alone is taken for frozen."""
    started = two(forks, tmp_path)
    for child in started:
        child.signal(signal.SIGSTOP)
    time.sleep(6)
    for child in started:
        child.signal(signal.SIGCONT)
    time.sleep(1.5)
    for child in started:
        child.signal(signal.SIGTERM)
    assert ends(started, 20) == [ExitCode.REQUEUE] * 2
    assert not (tmp_path / "run" / peers.FOLDER).exists()


@pytest.mark.guard("maskvlm.training.peers:leave")
def test_a_process_that_raises_is_the_cause(forks: Forks, tmp_path: Path, build: Build) -> None:
    """The other one ends with its status, and the cause is told once."""
    started = two(forks, tmp_path, build, "raises")
    codes = ends(started, 15)
    assert codes == [ExitCode.OUR_BUG] * 2
    assert started[0].output_lines("error: ", "[rank 0] ") == ["[rank 0] see rank 1"]
    lines = started[1].output_lines("error: ", "[rank 1] ")
    assert len(lines) == 1
    assert lines[0].startswith("error: [rank 1] ")
    assert "faulty.py:" in lines[0]  # of code that is not the project's, file and line
    assert "RuntimeError: something nobody thought of" in lines[0]


def test_a_main_thread_that_stands_still_is_named(forks: Forks, tmp_path: Path) -> None:
    """The process lives, and shows it; nine tenths of the process group's own time limit are its time."""
    strategy = "{class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {timeout: '0:00:07'}}"
    started = two(forks, tmp_path, None, "hangs", f"--trainer.strategy={strategy}")
    codes = ends(started, 30)
    assert codes == [ExitCode.UNAVAILABLE] * 2
    lines = [line for child in started for line in child.output_lines("error: ")]
    assert len(lines) == 1
    assert "rank 1 (" in lines[0]
    assert "is stuck after batch " in lines[0]
    assert "in <lambda>" in (tmp_path / "run" / "stacks-rank1.txt").read_text()


@pytest.mark.guard("maskvlm.training.process_watch:port_error")
def test_a_port_that_is_taken(forks: Forks, tmp_path: Path, build: Build) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        words = small(tmp_path / "run", *ENDLESS)
        started = [forks.start(words, tmp_path / f"rank{n}.txt", elastic(n, port), build) for n in (0, 1)]
        codes = ends(started, 30)
    assert codes == [ExitCode.UNAVAILABLE] * 2
    assert (
        started[0]
        .output_lines("error: ")[0]
        .startswith(f"error: port {port}: is taken on 127.0.0.1 by another program. ")
    )


@pytest.mark.parametrize("old_text", ["", "0 69\n"])
def test_who_meets_late_hears_of_a_process_that_failed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], old_text: str
) -> None:
    """Rank 0 may have ended before rank 1 looks for the first time; the file of an earlier job does not count."""

    class Ended(Exception):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(process_watch, "BEAT", 0.01)
    monkeypatch.setattr("os._exit", end)
    monkeypatch.setenv("RANK", "1")
    if old_text:
        (tmp_path / FIRST).write_text(old_text)
        os.utime(tmp_path / FIRST, (1e9, 1e9))
    monkeypatch.setattr(process_watch, "EARLIER", [failed_first(tmp_path)])  # as this process starts
    met = threading.Event()
    threading.Timer(0.3, met.set).start()
    process_watch.wait_for_others(tmp_path, met)  # until all have met: nobody has failed
    met.clear()
    (tmp_path / FIRST).write_text("0 69\n")  # the same words as the earlier job's
    with pytest.raises(Ended) as ended:
        process_watch.wait_for_others(tmp_path, met)
    assert ended.value.args == (ExitCode.UNAVAILABLE,)
    assert capsys.readouterr().err == "[rank 1] see rank 0\n"


@pytest.mark.guard("maskvlm.cli.lightning:check_cards")
def test_fewer_cards_than_asked_for(forks: Forks, tmp_path: Path, build: Build) -> None:
    words = small(tmp_path / "run", "--trainer.accelerator=gpu", "--trainer.devices=999")
    child = forks.start(words, tmp_path / "log.txt", build=build)
    assert child.wait(30) == ExitCode.UNAVAILABLE
    assert child.output_lines("error: ")[0].startswith("error: trainer.devices: found ")
    assert child.output_lines("error: ")[0].endswith(
        "of 999 GPUs. Use where=cpu (--trainer.accelerator cpu) or fewer devices."
    )


def test_a_card_whose_cuda_does_not_start_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As under a driver that is too old: a run that chooses by itself would use the processor without a word."""
    (tmp_path / "nvidia-smi").write_text("")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for built, accelerator, warned in (("12.8", "auto", True), ("12.8", "cpu", False), (None, "auto", False)):
        monkeypatch.setattr(torch.version, "cuda", built)
        check_cards(Namespace(accelerator=accelerator, devices="auto"))
        assert ("CUDA cannot be initialised" in capsys.readouterr().err) == warned


# ---------------------------------------------------------------------- what is judged, without processes


def people(folder: Path, world: int, **changes: Any) -> list[Peers]:
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
    elsewhere = second.read(1)
    assert elsewhere is not None
    for _ in range(3):
        first.write()
        first.look([1])
    assert first.judge(3, 6) is None  # two looks without a new record
    second.write()
    first.look([1])
    for _ in range(2):
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
    second.write(code=0)
    third.write(code=75)
    first.look(first.everyone())
    assert first.judge(3, 6) is None
    third.write(code=69, because=1, why="rank 1 was lost")
    first.look(first.everyone())
    lost = first.judge(3, 6)
    assert lost is not None
    assert (lost.rank, lost.code, lost.what) == (1, 69, "rank 1 was lost")
    second.write(code=65)
    first.look(first.everyone())
    lost = first.judge(3, 6)
    assert lost is not None
    assert (lost.rank, lost.code) == (1, 65)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '["t", 1]', "null", "[" * 999, '["t", 1, "h", "w", -1, 1, [0, 0], ""]']
)
def test_a_record_that_is_half_there_is_none(tmp_path: Path, content: str) -> None:
    first, second = people(tmp_path, 2)
    second.path(1).write_text(content)
    assert first.read(1) is None
    first.look(first.everyone())
    assert first.judge(3, 6) is None


def test_records_of_an_earlier_start_are_cleared_and_those_of_this_one_are_kept(tmp_path: Path) -> None:
    people(tmp_path, 3)
    later = Peers(tmp_path, "u", 0, 2, 3, 6)
    later.write()
    later.clear()
    assert [path.name for path in (tmp_path / peers.FOLDER).iterdir()] == ["rank-0"]
    later.remove()
    assert not tmp_path.exists()  # nothing else was in it


def test_an_error_of_ones_own_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert blamed(RuntimeError("gloo: Connection closed by peer")) is None  # alone
    first, _ = people(tmp_path, 2)
    monkeypatch.setattr(peers, "CURRENT", [first])
    assert blamed(RuntimeError("shapes differ")) is None
    assert blamed(ValueError("shapes differ")) is None
