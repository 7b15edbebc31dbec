"""Whole commands that meet faults, as their user sees them: exit status, lines, what is left in the run's folder.

Each is a real process. What decides each of them is tested in-process in test_run_lock.py, test_step_guard.py,
test_attempts.py, test_outputs.py and tests/checkpoint.
"""

import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import PAIR, Child, Forks, ends, small

from maskvlm.checkpoint.io import load
from maskvlm.training.csv_log import rows_in

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="faults of Linux processes")]
UNMEASURED = "--trainer.limit_val_batches=0"


def words(run: Path, steps: int, *more: str) -> list[str]:
    return small(run, f"--data.steps={steps}", UNMEASURED, *more)


def trained(run: Path) -> list[int]:
    """Steps in metrics.csv that have a loss."""
    if not (run / "metrics.csv").is_file():
        return []
    rows = rows_in((run / "metrics.csv").read_bytes())
    return [int(row["step"]) for row in rows if "train/loss" in row and row.get("step", "").isdigit()]


def until(there: Callable[[], object], child: Child) -> None:
    """Wait for something; three minutes at most."""
    end = time.monotonic() + 180
    while not there():
        assert time.monotonic() < end, child.log.read_text()
        time.sleep(0.01)


def after(run: Path, step: int, child: Child) -> None:
    """Wait until the training has logged this step."""
    until(lambda: max(trained(run), default=-1) >= step, child)


def test_what_one_process_meets_is_skipped_by_all(forks: Forks, tmp_path: Path) -> None:
    """Also the samples of the other process are listed: nobody knows yet which of the batch it was."""
    run = tmp_path / "run"
    pair = forks.start_two(words(run, 12, *PAIR), tmp_path, spoil={"step": 9, "of_rank": 1, "factor": math.nan})
    assert ends(pair, 180) == [0, 0]
    assert all(bool(value.isfinite().all()) for value in load(run / "last.ckpt")["state_dict"].values())
    listed = json.loads((run / "bad_samples.json").read_text())["skipped_steps"]
    (step,) = listed["steps"]
    assert (listed["count"], step["step"]) == (1, 10)
    assert step["reason"].startswith("its loss is not finite")
    assert len({one["index"] for one in step["samples"]}) == 8
    for one in step["samples"]:
        assert one["origin"] == f"scenes (seed 0) train image {one['index']}"


def test_two_signals_are_one_and_a_third_ends_it_at_once(forks: Forks, tmp_path: Path) -> None:
    """The checkpoint that was there stays whole."""
    run = tmp_path / "run"

    def strike(child: Child, times: int) -> None:
        for _ in range(times):
            child.signal(signal.SIGTERM)
            time.sleep(0.05)  # sooner, the system would make one of them

    first = forks.start(words(run, 400), tmp_path / "first.txt")
    after(run, 10, first)
    strike(first, 2)
    assert first.wait(180) == 75
    step = load(run / "last.ckpt")["global_step"]
    assert step > 8
    again = forks.start(words(run, 400), tmp_path / "again.txt", spoil={"step": step + 6, "fault": "late"})
    after(run, step + 5, again)
    strike(again, 3)
    assert again.wait(180) == -signal.SIGTERM
    assert load(run / "last.ckpt")["global_step"] >= step


def test_damaged_records_and_a_torn_checkpoint_do_not_stop_a_run(forks: Forks, tmp_path: Path) -> None:
    """The files that inform are damaged before it goes on. Without any whole checkpoint it does not begin anew."""
    run = tmp_path / "run"
    stopped = forks.start(words(run, 40), tmp_path / "stopped.txt")
    after(run, 10, stopped)
    stopped.signal(signal.SIGTERM)
    assert stopped.wait(180) == 75
    whole = {path.name: path.read_bytes() for path in run.glob("*.ckpt")}
    for name, content in whole.items():
        (run / name).write_bytes(content[:-100])
    assert forks.start(words(run, 40), tmp_path / "torn.txt").wait(180) == 77
    (run / "previous.ckpt").write_bytes(whole["previous.ckpt"])
    for name in ("versions.json", "provenance.json", "metrics.json", "bad_samples.json", "attempts.json", "run.lock"):
        (run / name).write_bytes(b"\xff{[")
    (run / "metrics.csv").write_bytes(b'step,train/loss\nnan,1\n1e400,2\nx,\x00\n"' + b"z" * 200_000 + b"\n2,1.5\n")
    last = forks.start(words(run, 40), tmp_path / "last.txt")
    assert last.wait(180) == 0
    assert any("last.ckpt: truncated" in line for line in last.output_lines("warning"))
    assert any("previous.ckpt" in line for line in last.output_lines("resuming after step"))
    assert json.loads((run / "versions.json").read_text())["finished"]["step"] == 40
