"""`bench/pairs.py`, its short version: something happens to one of two processes at a random moment."""

import subprocess
import sys

import pytest
from forks import ROOT, environment


@pytest.mark.skipif(sys.platform != "linux", reason="counts orphans as Linux does")
def test_ten_trials_end_as_they_should() -> None:
    """Two of each kind, with data workers and without. 200 trials are the long version; how it fails without what it
    tests is in test_processes.py, guard by guard."""
    command = [sys.executable, str(ROOT / "bench" / "pairs.py"), "--trials", "10", "--patience", "5"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 10 wrong" in done.stdout
