"""How a training ends that a signal has stopped, or whose study has ended; nothing here imports torch."""

import ctypes
import os
import signal
import subprocess
import sys
import time

STUDY = "MASKVLM_STUDY"
"""Environment variable of a run that a study makes: the study's process. Its options are then a file's, not typed."""
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Stopped(Exception):
    """A training that ended early and whole: its checkpoint is written, the same command goes on from it.

    Args:
        text: one line for the user.
        signum: what asked for it.
    """

    def __init__(self, text: str, signum: int) -> None:
        super().__init__(text)
        self.text, self.signum = text, signum


class Finished(Exception):
    """There is nothing to do: the run has come to its end. Args: the line for the user."""


def end_with_study() -> None:
    """Let the system ask a run of a study to save and to end when the study's process is killed. Otherwise the run
    would train on, and the study, started again, would find its folder taken."""
    if sys.platform == "linux" and os.environ.get(STUDY) == str(os.getppid()):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def leave_after_parent(seconds: float = 30.0) -> None:
    """Wait, in a process that Lightning started, until the first process has ended, at most `seconds`.

    Lightning kills the first process when one that it started ends with another status than 0.
    """
    # A process whose parent has ended gets another one, so that the number changes.
    parent, until = os.getppid(), time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < until:
        time.sleep(0.02)


def requeue() -> str | None:
    """Queue this SLURM job again; says what happened, None outside of SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    # A task of an array is named by the array and its place in it.
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        why = " ".join(done.stderr.split()) if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    return f"job {job} could not be queued again ({why})" if why else f"job {job} is queued again"
