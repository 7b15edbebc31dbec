"""Whole commands that meet faults, as their user sees them: exit status, lines, what is left in the run's folder.

Rows 1 to 7, 15, 17 to 22 and 63 of the matrix; `apart.py` starts the commands. That each guard is what holds its row
is tested beside it: test_run_lock.py, test_step_guard.py, test_attempts.py, test_outputs.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
Outcomes = dict[str, Any]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What all scenarios found; one process runs them, as importing takes longer than most of them."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(Path(__file__).with_name("apart.py")), str(tmp_path_factory.mktemp("apart"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    scenarios: Outcomes = json.loads(done.stdout)
    return scenarios


def test_of_two_commands_one_trains_and_one_says_so(outcomes: Outcomes) -> None:
    two = outcomes["two"]
    assert two["codes"] == [0, 73]
    assert two["said"].count("\n") == 1
    assert two["said"].startswith("error: ")
    assert f"run: another process is training here (process {two['first']} on " in two["said"]
    assert two["steps"] == [*range(60)]


def test_a_killed_runs_folder_and_a_copy_of_a_living_one_are_free_at_once(outcomes: Outcomes) -> None:
    """The killed one had data workers, which are copies of it."""
    assert outcomes["killed"] == {"codes": [75, 75], "alive": True}


def test_one_bad_batch_costs_one_step(outcomes: Outcomes) -> None:
    """Row 63."""
    bad = outcomes["one_bad_batch"]
    assert bad["code"] == 0
    assert len(bad["said"]) == 1
    assert bad["said"][0].startswith("warning: step 10 skipped: its loss is not finite (nan); 8 samples, listed in ")
    assert bad["finite"]
    assert bad["listed"]["count"] == 1
    samples = bad["listed"]["steps"][0]["samples"]
    assert len({one["index"] for one in samples}) == 8
    for one in samples:
        assert one["origin"] == f"scenes (seed 0) train image {one['index']}"
        assert one["image_id"].startswith("scene ")


@pytest.mark.parametrize(("kind", "reason"), [("nan", "its loss is not finite"), ("spike", "its loss shot up")])
def test_what_one_process_meets_is_skipped_by_all(kind: str, reason: str, outcomes: Outcomes) -> None:
    """Also the samples of the other processes are listed: nobody knows yet which of the batch it was."""
    pair = outcomes["in_one_process_of_two"][kind]
    assert pair["codes"] == [0, 0]
    assert pair["finite"]
    (step,) = pair["listed"]["steps"]
    assert (pair["listed"]["count"], step["step"]) == (1, 10)
    assert step["reason"].startswith(reason)
    alone = outcomes["one_bad_batch"]["listed"]["steps"][0]["samples"]
    assert step["samples"] == alone  # the same global batch


def test_a_step_that_always_dies_is_not_tried_for_ever(outcomes: Outcomes) -> None:
    """Row 15."""
    always = outcomes["crashing"]["always"]
    assert always["codes"] == [70, 70, 70, 70, 77]
    (line,) = always["said"][-1]
    assert "always: the run died 4 times in step 11. " in line
    assert "delete" in line


def test_after_two_failures_it_goes_on_from_the_checkpoint_before(outcomes: Outcomes) -> None:
    from_last = outcomes["crashing"]["from_last"]
    assert from_last["codes"] == [70, 70, 0]
    assert "died 2 times in step 11; resuming from previous.ckpt" in from_last["said"][2][0]
    assert from_last["steps"] == [*range(12)]


def test_two_signals_are_one_and_a_third_ends_it_at_once(outcomes: Outcomes) -> None:
    """Row 7. The checkpoint that was there stays whole."""
    signals = outcomes["signals"]
    assert signals["codes"] == [75, -15]
    assert signals["then"] >= signals["step"] > 8


def test_a_damaged_record_of_the_settings_is_one_line(outcomes: Outcomes) -> None:
    assert outcomes["damaged"]["stopped"] == 75
    for code, lines in outcomes["damaged"]["config"]:
        assert code == 65
        (line,) = lines
        assert "config-fit.yaml: damaged (" in line
        assert "--ckpt_path last" in line


def test_without_a_whole_checkpoint_nothing_begins_anew(outcomes: Outcomes) -> None:
    """Row 22."""
    code, lines = outcomes["damaged"]["all torn"]
    assert code == 77
    assert "all 2 checkpoints are damaged" in lines[-1]


def test_damaged_records_and_a_torn_checkpoint_do_not_stop_a_run(outcomes: Outcomes) -> None:
    """Rows 19 and 21. The files that inform are damaged before it goes on, versions.json once more while it runs."""
    code, lines = outcomes["damaged"]["records"]
    assert code == 0
    assert "last.ckpt: truncated" in lines[0]
    assert "resuming after step " in lines[1]
    assert lines[1].endswith("previous.ckpt)")
    assert len(lines) == 2
    assert outcomes["damaged"]["finished"] == 40


@pytest.mark.parametrize(
    ("when", "code", "what"),
    [
        ("from the start", 73, "cannot be written (Read-only file system)"),
        ("read-only", 73, "cannot be written (Read-only file system)"),
        ("full", 74, "no space left: disk full ("),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_line(when: str, code: int, what: str, outcomes: Outcomes) -> None:
    """Rows 17 and 18."""
    if "unwritable" not in outcomes:
        pytest.skip("needs root, to mount a read-only and a full file system")
    case = outcomes["unwritable"][when]
    assert case["code"] == code
    (line,) = case["said"]
    assert line.startswith("error: ")
    assert what in line
    if when == "from the start":
        assert case["left"] == []
    else:
        assert case["step"] >= 4
        assert "crash.txt" not in case["left"]
