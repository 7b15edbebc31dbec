"""Making runs: several at once, what is finished is not made again, what fails costs the others nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from maskvlm.study.definition import Cell
from maskvlm.study.runs import ABOUT, LOG, Runner, StudyRun, check_same_run
from maskvlm.utils.errors import ExitCode, UserError

ENDS = """
import pathlib, sys
place = pathlib.Path(sys.argv[1])
place.joinpath("metrics.json").write_text('{"a": 1.5}')
place.joinpath("versions.json").write_text('{"finished": {"step": 3}}')
print("done")
"""
FAILS = "import sys; print('error: no such thing', file=sys.stderr); sys.exit(66)"
WAITS = """
import pathlib, signal, sys, time
def end(*_):
    print("saved"); sys.exit(75)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1], "waits").touch()
time.sleep(60)
"""


def run(folder: Path, code: str, seed: int = 0) -> StudyRun:
    place = folder / f"all-s{seed}"
    command = (sys.executable, "-c", code, str(place))
    return StudyRun(Cell("all", 1.0, "", (), (0, 1, 2), ("pretrain",)), seed, place, command)


def test_runs_are_made_once(tmp_path: Path) -> None:
    runs = [run(tmp_path, ENDS, seed) for seed in range(3)]
    ended = list(Runner(2).make(runs))
    assert sorted(each.run.seed for each in ended) == [0, 1, 2]
    assert {(each.code, each.last_line) for each in ended} == {(0, "done")}
    assert all(each.finished for each in runs)
    assert all(each.seconds is not None and each.seconds > 0 for each in runs)
    assert list(Runner(2).make(runs)) == []


def test_one_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    ended = list(Runner(1).make([run(tmp_path, FAILS, 0), run(tmp_path, ENDS, 1)]))
    assert [(each.code, each.last_line) for each in ended] == [(66, "error: no such thing"), (0, "done")]
    assert ended[0].why == "exit status 66: error: no such thing"
    assert not run(tmp_path, FAILS).finished
    # made again, its time is added to what it took before
    before = run(tmp_path, FAILS, 0).seconds
    (again,) = Runner(1).make([run(tmp_path, FAILS, 0)])
    assert run(tmp_path, FAILS, 0).seconds == pytest.approx(before + again.seconds)
    assert (tmp_path / "all-s0" / LOG).read_text().count("no such thing") == 2


def test_a_signal_lets_the_runs_save_and_begins_no_other(tmp_path: Path) -> None:
    runs = [run(tmp_path, WAITS, seed) for seed in range(3)]

    def send() -> None:
        while not all((each.folder / "waits").exists() for each in runs[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    before = signal.getsignal(signal.SIGTERM)
    runner = Runner(2)
    ended = list(runner.make(runs))
    assert [(each.code, each.last_line, each.why) for each in ended] == [(75, "saved", "stopped and saved")] * 2
    assert runner.stopping.is_set()
    assert not runs[2].folder.exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_waits_for_the_one_that_it_starts_from(tmp_path: Path) -> None:
    first = [run(tmp_path / "first", ENDS, 0), run(tmp_path / "first", FAILS, 1)]
    others = [run(tmp_path / "other", ENDS, each.seed)._replace(start=each) for each in first]
    assert [each.waits_for for each in others] == ["all-s0", "all-s1"]
    ended = list(Runner(4).make([*others, *first]))
    assert {each.run.folder for each in ended[:2]} == {each.folder for each in first}
    assert {(each.run.seed, each.code) for each in ended[2:]} == {(0, 0), (1, ExitCode.MISSING_INPUT)}
    assert not others[1].folder.exists()
    (reason,) = (each.why for each in ended[2:] if each.code)
    assert reason == "exit status 66: all-s1, which it starts from, is not finished"
    assert others[0].waits_for is None


def test_a_folder_of_another_run_is_not_taken(tmp_path: Path) -> None:
    list(Runner(1).make([run(tmp_path, ENDS)]))
    check_same_run(run(tmp_path, ENDS))
    check_same_run(run(tmp_path, ENDS, 5))  # not there yet
    one = run(tmp_path, ENDS)
    check_same_run(one._replace(command=(*one.command[:3], "where=gpu1", *one.command[3:])))  # another machine
    with pytest.raises(UserError, match="other options"):
        check_same_run(run(tmp_path, FAILS))
    assert json.loads((tmp_path / "all-s0" / ABOUT).read_text())["seed"] == 0


KILLED = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
from maskvlm.study.runs import Runner, StudyRun
from maskvlm.study.definition import Cell
code = {code!r}
run = StudyRun(Cell("all", 1.0, "", (), (0,), ("pretrain",)), 0, Path("all-s0"), (sys.executable, "-c", code, "all-s0"))
list(Runner(1).make([run]))
"""
CHILD = (
    "import sys; sys.path[:0] = {path!r}; from maskvlm.utils.launch import end_with_study; end_with_study()\n" + WAITS
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_the_runs_of_a_study_that_is_killed_save_and_end(tmp_path: Path) -> None:
    """Else they would train on, and the study, begun again, would find their folders taken."""
    path = [str(Path(__file__).resolve().parents[2] / "src")]
    code = KILLED.format(path=path, code=CHILD.format(path=path))
    study = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    until = time.monotonic() + 60
    while not (tmp_path / "all-s0" / "waits").exists() and time.monotonic() < until:
        time.sleep(0.05)
    study.kill()
    study.wait()
    while "saved" not in (tmp_path / "all-s0" / LOG).read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert "saved" in (tmp_path / "all-s0" / LOG).read_text()
