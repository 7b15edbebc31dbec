"""D12: the command as it is written, under the real torchrun, Lightning's own launcher, and srun.

Debian's srun is tried by hand; here a stand-in sets what srun sets for two tasks.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import PAIR, ROOT, environment, small
from guards import Build
from torch.distributed.run import get_args_parser

from maskvlm.checkpoint.io import load
from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.cli.slurm import batch_script
from maskvlm.training.peers import FOLDER
from maskvlm.utils.errors import ExitCode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults of Linux processes")
SHORT = (*PAIR, "--data.steps=6", "--trainer.val_check_interval=3")
ENDLESS = (*PAIR, "--data.steps=9999", "--trainer.limit_val_batches=0")


def torchrun(*words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]


def finished(folder: Path, step: int) -> None:
    """Two processes came to the run's end, and left what one leaves."""
    facts = json.loads((folder / "versions.json").read_text())
    assert (facts["finished"]["step"], facts["processes"]) == (step, 2)
    assert load(folder / "last.ckpt")["global_step"] == step
    assert not (folder / FOLDER).exists()


def pid_of(rank: int, folder: Path) -> int:
    """The number of a process of a run that has written a checkpoint."""
    until = time.monotonic() + 90
    while not (folder / "last.ckpt").exists():
        assert time.monotonic() < until, "no checkpoint"
        time.sleep(0.05)
    return int(json.loads((folder / FOLDER / f"rank-{rank}").read_text())[4])


def strike(words: list[str], folder: Path, whom: int, path: Path) -> tuple[int, str]:
    """Start the command, kill one of its processes when there is a checkpoint; its exit status and output."""
    with path.open("wb") as log:
        started = subprocess.Popen(words, env=environment(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            os.kill(pid_of(whom, folder), signal.SIGKILL)
            code = started.wait(90)
            until = time.monotonic() + 15
            while alive_in(started.pid) and time.monotonic() < until:
                time.sleep(0.1)
            assert not alive_in(started.pid), "processes are left over"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
    return code, path.read_text(errors="replace")


def alive_in(group: int) -> bool:
    """Whether a process of this group lives."""
    stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return any(stat[2] == str(group) and stat[0] not in "ZX" for stat in stats)


def test_the_real_torchrun_restarts_what_was_killed_and_it_goes_on(tmp_path: Path) -> None:
    """`torchrun --nproc_per_node 2 -m maskvlm fit --folder X ...`; the second process is killed once."""
    folder = tmp_path / "run"
    words = torchrun("--max-restarts", "1", "-m", "maskvlm", *small(folder, *PAIR, "--data.steps=60"))
    code, output = strike(words, folder, 1, tmp_path / "log.txt")
    assert code == 0, output
    finished(folder, 60)
    assert len(json.loads((folder / "versions.json").read_text())["earlier"]) == 1
    assert output.count("error: rank 1 (") + output.count("error: [rank 0] rank 1 (") <= 1
    assert "This is a bug" not in output


def test_torchrun_takes_none_of_our_options_for_its_own(tmp_path: Path) -> None:
    """Every option of fit, and those of the command line itself. Fails with `--run`."""
    command = run_command(Parsed, ["fit", *small(tmp_path / "run")[1:]])
    parser = command._parser("fit")
    ours = {word for action in parser._actions for word in action.option_strings} - {"--run", "-h", "--help"}
    ours |= {"-c", "--config", "--debug", "--allow-import", "--out", "--print_config", "--ckpt_path", "--from"}
    assert {"--folder", "--from", "--patience", "--trainer.devices"} <= ours
    for option in sorted(ours):
        words = ["--nproc_per_node", "2", "-m", "maskvlm", "fit", option, "x", f"{option}=x"]
        arguments = get_args_parser().parse_args(words)
        assert (arguments.training_script, arguments.training_script_args) == ("maskvlm", words[4:]), option


@pytest.mark.guard("maskvlm.training.peers:blamed")
def test_lightnings_own_launcher_says_who_was_lost(tmp_path: Path, build: Build) -> None:
    folder = tmp_path / "run"
    code, output = strike(build.command(*small(folder, *ENDLESS)), folder, 1, tmp_path / "log.txt")
    assert code == ExitCode.UNAVAILABLE
    assert output.count("error: ") == 1
    assert "rank 1 (" in output
    assert "was lost: it was killed" in output


SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
while words and words[0].startswith("-"):
    words.pop(0)
both = os.environ | dict(SLURM_JOB_ID="4217", SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2", SLURM_NNODES="1",
    SLURM_NODEID="0", SLURM_NODELIST="localhost", SLURM_STEP_ID="0", SLURM_JOB_NAME="run", MASTER_PORT="{port}")
tasks = [subprocess.Popen(words, env=both | dict(SLURM_PROCID=str(n), SLURM_LOCALID=str(n))) for n in (0, 1)]
sys.exit(max(task.wait() for task in tasks))
"""


def test_the_batch_script_runs_under_srun(tmp_path: Path) -> None:
    """The script that `submit` writes, as sbatch would start it, with a stand-in for srun that sets what srun sets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder, srun = tmp_path / "run", tmp_path / "srun"
    srun.write_text(SRUN.format(python=sys.executable, port=port))
    srun.chmod(0o755)
    words = small(folder, *SHORT)[1:]
    script = batch_script(run_command(Parsed, ["fit", *words]).settings, ["fit", *words])
    more = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "1"}
    command = ["bash", "-c", script.replace("export PYTHONPATH=src\n", "")]
    done = subprocess.run(command, env=environment() | more, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    finished(folder, 6)
