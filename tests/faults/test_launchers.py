"""The command as it is written, under the real torchrun."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import PAIR, ROOT, environment, small

from maskvlm.checkpoint.io import load
from maskvlm.training.peers import FOLDER

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults of Linux processes")


def strike(words: list[str], folder: Path, path: Path) -> tuple[int, str]:
    """Start the command, kill its second process when there is a checkpoint; its exit status and output."""
    with path.open("wb") as log:
        started = subprocess.Popen(words, env=environment(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            until = time.monotonic() + 300
            while not (folder / "last.ckpt").exists():
                assert started.poll() is None, path.read_text()
                assert time.monotonic() < until, "no checkpoint"
                time.sleep(0.05)
            os.kill(json.loads((folder / FOLDER / "rank-1").read_text())[4], signal.SIGKILL)
            code = started.wait(180)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
    return code, path.read_text(errors="replace")


@pytest.mark.slow
def test_the_real_torchrun_restarts_what_was_killed_and_it_goes_on(tmp_path: Path) -> None:
    """`torchrun --nproc_per_node 2 -m maskvlm fit --folder X ...`; the second process is killed once."""
    folder = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*torchrun, "--max-restarts", "1", "-m", "maskvlm", *small(folder, *PAIR, "--data.steps=60")]
    code, output = strike(words, folder, tmp_path / "log.txt")
    assert code == 0, output
    facts = json.loads((folder / "versions.json").read_text())
    assert (facts["finished"]["step"], facts["processes"], len(facts["earlier"])) == (60, 2, 1)
    assert load(folder / "last.ckpt")["global_step"] == 60
    assert not (folder / FOLDER).exists()
    assert "This is a bug" not in output
