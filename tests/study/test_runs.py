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

from maskvlm.study import runs as runs_module
from maskvlm.study.definition import Cell
from maskvlm.study.runs import ABOUT, LOG, Runner, StudyRun, check_same_run, last_line, on_signals, step_of
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


def test_a_folder_that_cannot_be_written_is_the_failure_of_its_run_alone(tmp_path: Path) -> None:
    """Fails where the others are made without a line, and the error ends the study."""
    broken, other = run(tmp_path, ENDS, 0), run(tmp_path, ENDS, 1)
    broken.folder.parent.mkdir(parents=True, exist_ok=True)
    broken.folder.write_text("a file")
    ended = {each.run.seed: each for each in Runner(1).make([broken, other])}
    assert ended[0].code == ExitCode.CANNOT_CREATE
    assert str(broken.folder) in ended[0].why
    assert ended[1].code == 0


def test_a_time_that_cannot_be_noted_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the run is no longer waited for: another would begin beside it."""
    note, calls = StudyRun.note, list[float]()

    def noted(self: StudyRun, seconds: float) -> None:
        calls.append(seconds)
        if len(calls) == 2:
            raise OSError("disk full")
        note(self, seconds)

    monkeypatch.setattr(StudyRun, "note", noted)
    monkeypatch.setattr(runs_module, "TICK", 0.05)
    (ended,) = Runner(1).make([run(tmp_path, "import time; time.sleep(0.5)", 0)])
    assert ended.code == 0
    assert len(calls) > 2


def test_only_what_was_timed_from_its_beginning_has_hours(tmp_path: Path) -> None:
    """Fails where the last minute of a run that was made otherwise is taken for all of it."""
    begun, new = run(tmp_path, ENDS, 0), run(tmp_path, ENDS, 1)
    begun.folder.mkdir()
    (begun.folder / "last.ckpt").touch()
    assert len(list(Runner(1).make([begun, new]))) == 2
    assert begun.seconds is None
    assert new.seconds is not None


DIVERGES = """
import pathlib, sys
pathlib.Path(sys.argv[1], "versions.json").write_text('{"diverged": {"step": 77}}')
sys.exit(65)
"""


def test_a_run_that_diverged_is_told_and_not_made_again(tmp_path: Path) -> None:
    """Nor what would start from it."""
    one = run(tmp_path, DIVERGES)
    other = run(tmp_path / "other", ENDS)._replace(start=one)
    (ended,) = Runner(1).make([one, other])
    assert ended.code == ExitCode.BAD_DATA
    assert ended.why.startswith(f"diverged at step 77; not repeated as long as {one.folder} exists: ")
    assert list(Runner(1).make([one, other])) == []
    assert not one.finished
    assert other.lost == "starts from all-s0, which diverged at step 77"


def test_each_has_its_part_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskvlm.study.runs.cores", lambda: 8)
    tells = "import os; print(os.environ['OMP_NUM_THREADS'])"
    assert {each.last_line for each in Runner(3).make([run(tmp_path, tells, seed) for seed in range(3)])} == {"2"}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_runs_save_and_begins_no_other(tmp_path: Path, signum: int) -> None:
    runs = [run(tmp_path, WAITS, seed) for seed in range(3)]

    def send() -> None:
        while not all((each.folder / "waits").exists() for each in runs[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), signum)

    # the tests themselves may run under nohup, which ignores SIGHUP
    outer = signal.signal(signum, signal.default_int_handler)
    threading.Thread(target=send).start()
    before = signal.getsignal(signum)
    runner = Runner(2)
    ended = list(runner.make(runs))
    assert [(each.code, each.last_line, each.why) for each in ended] == [(75, "saved", "stopped and saved")] * 2
    assert runner.stopping.is_set()
    assert not runs[2].folder.exists()
    assert signal.getsignal(signum) == before
    signal.signal(signum, outer)


def test_under_nohup_a_closed_terminal_ends_no_study() -> None:
    stopped: list[bool] = []
    outer = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_signals(lambda: stopped.append(True)):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, outer)
    assert stopped == [True]


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
    with pytest.raises(UserError, match="holds a run with this name and other options") as error:
        check_same_run(run(tmp_path, FAILS))
    assert error.value.code == ExitCode.CANNOT_CREATE
    assert json.loads((tmp_path / "all-s0" / ABOUT).read_text())["seed"] == 0


def test_how_far_a_run_is(tmp_path: Path) -> None:
    one = run(tmp_path, ENDS)
    assert step_of(one) == 0
    one.folder.mkdir()
    (one.folder / "metrics.csv").write_text("epoch,step,loss\n0,9,1.5\n0,19,1.25\n")
    assert step_of(one) == 19
    (one.folder / "metrics.csv").write_text('epoch,"lr-AdamW/encoders, late",step,loss\n0,0.5,29,1.5\n0,0.5')
    assert step_of(one) == 29  # a row is being written; a name holds a comma
    (one.folder / "metrics.csv").write_text("epoch,step,loss\n")
    assert step_of(one) == 0
    (one.folder / LOG).write_bytes(b"first\nlast \x1b[31m\xff\n\n")
    assert last_line(one.folder / LOG) == "last  [31m\ufffd"


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


def test_what_a_run_may_import_is_what_the_study_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKVLM_ALLOW_IMPORT", "acme")
    tells = "import os; print(os.environ['MASKVLM_ALLOW_IMPORT'], os.environ['MASKVLM_STUDY'])"
    (ended,) = Runner(1, ["kiwi", "acme"]).make([run(tmp_path, tells)])
    assert ended.last_line == f"acme,kiwi {os.getpid()}"


def test_a_run_that_was_killed_says_by_what(tmp_path: Path) -> None:
    kills = "import os; os.kill(os.getpid(), 9)"
    (ended,) = Runner(1).make([run(tmp_path, kills)])
    assert (ended.code, ended.why) == (-9, "ended by SIGKILL")


@pytest.mark.parametrize("text", ["{", "", "[]", '{"a"'])
def test_files_that_cannot_be_read_cost_no_page(tmp_path: Path, text: str) -> None:
    one = run(tmp_path, ENDS)
    list(Runner(1).make([one]))
    (one.folder / ABOUT).write_text(text)
    assert one.finished
    assert one.seconds is None
    check_same_run(one)
    (one.folder / "metrics.json").write_text(text)
    assert not one.finished
    assert one.metrics is None


def test_another_machine_is_no_other_run(tmp_path: Path) -> None:
    one = run(tmp_path, ENDS)
    moved = one._replace(command=(*one.command[:3], "where=gpu1", *one.command[3:]))
    list(Runner(1).make([one]))
    check_same_run(moved)
