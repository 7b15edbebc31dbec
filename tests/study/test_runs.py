"""Making runs: several at once, what is finished is not made again, what fails costs the others nothing."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from maskvlm.study.definition import Cell
from maskvlm.study.runs import ABOUT, CARD, LOG, Runner, StudyRun, check_same_run, last_line, step_of
from maskvlm.utils.errors import ExitCode, UserError

ENDS = "import pathlib, sys; pathlib.Path(sys.argv[1], 'card.json').write_text('{}'); print('done')"
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
    return StudyRun(Cell("all", 1.0, "", (), (0, 1, 2)), seed, place, command)


def test_runs_are_made_once(tmp_path: Path) -> None:
    runs = [run(tmp_path, ENDS, seed) for seed in range(3)]
    ended = list(Runner(2).make(runs))
    assert sorted(each.run.seed for each in ended) == [0, 1, 2]
    assert {(each.code, each.said) for each in ended} == {(0, "done")}
    assert all(each.finished for each in runs)
    assert all(each.seconds is not None and each.seconds > 0 for each in runs)
    assert list(Runner(2).make(runs)) == []


def test_one_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    ended = list(Runner(1).make([run(tmp_path, FAILS, 0), run(tmp_path, ENDS, 1)]))
    assert [(each.code, each.said) for each in ended] == [(66, "error: no such thing"), (0, "done")]
    assert not (tmp_path / "all-s0" / CARD).exists()
    # made again, its time is added to what it took before
    before = run(tmp_path, FAILS, 0).seconds
    (again,) = Runner(1).make([run(tmp_path, FAILS, 0)])
    assert run(tmp_path, FAILS, 0).seconds == pytest.approx(before + again.seconds)
    assert (tmp_path / "all-s0" / LOG).read_text().count("no such thing") == 2


def test_each_has_its_part_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskvlm.study.runs.cores", lambda: 8)
    tells = "import os; print(os.environ['OMP_NUM_THREADS'])"
    assert {each.said for each in Runner(3).make([run(tmp_path, tells, seed) for seed in range(3)])} == {"2"}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_runs_save_and_begins_no_other(tmp_path: Path, signum: int) -> None:
    runs = [run(tmp_path, WAITS, seed) for seed in range(3)]

    def send() -> None:
        while not all((each.folder / "waits").exists() for each in runs[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), signum)

    threading.Thread(target=send).start()
    before = signal.getsignal(signum)
    runner = Runner(2)
    ended = list(runner.make(runs))
    assert [(each.code, each.said) for each in ended] == [(75, "saved")] * 2
    assert runner.stopping.is_set()
    assert not runs[2].folder.exists()
    assert signal.getsignal(signum) == before


def test_a_folder_of_another_run_is_not_taken(tmp_path: Path) -> None:
    list(Runner(1).make([run(tmp_path, ENDS)]))
    check_same_run(run(tmp_path, ENDS))
    check_same_run(run(tmp_path, ENDS, 5))  # not there yet
    with pytest.raises(UserError, match="holds a run of this name with other options") as error:
        check_same_run(run(tmp_path, FAILS))
    assert error.value.code == ExitCode.CANNOT_CREATE
    assert json.loads((tmp_path / "all-s0" / ABOUT).read_text())["seed"] == 0


def test_how_far_a_run_is(tmp_path: Path) -> None:
    one = run(tmp_path, ENDS)
    assert step_of(one) == 0
    one.folder.mkdir()
    (one.folder / "metrics.csv").write_text("epoch,step,loss\n0,9,1.5\n0,19,1.25\n")
    assert step_of(one) == 19
    (one.folder / "metrics.csv").write_text("epoch,step,loss\n")
    assert step_of(one) == 0
    (one.folder / LOG).write_bytes(b"first\nlast \x1b[31m\xff\n\n")
    assert last_line(one.folder / LOG) == "last  [31m\ufffd"
