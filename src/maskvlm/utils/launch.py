"""How a training ends after a signal, or after the end of its study; nothing here imports torch."""

import ctypes
import os
import signal
import subprocess
import sys
import time

STUDY = "MASKVLM_STUDY"
"""Environment variable set for runs of a study: the study's process id. Their options come from a file, and do not
count as typed."""
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Stopped(Exception):
    """A training that stopped early in an orderly way: its checkpoint is written, and the same command resumes from it.

    Args:
        text: one line for the user.
        signum: the signal that asked for it.
    """

    def __init__(self, text: str, signum: int) -> None:
        super().__init__(text)
        self.text, self.signum = text, signum


class Finished(Exception):
    """There is nothing to do: the run is finished. Args: the line for the user."""


def end_with_study() -> None:
    """Let the system ask a run of a study to save and stop when the study's process is killed. Otherwise the run would
    keep training, and the study, started again, would find its folder in use."""
    if sys.platform == "linux" and os.environ.get(STUDY) == str(os.getppid()):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def leave_after_parent(seconds: float = 30.0) -> None:
    """In a process started by Lightning, wait at most `seconds` for the first process to end.

    Lightning kills the first process when one that it started ends with a nonzero status.
    """
    # A process whose parent has ended gets another parent, so the parent's process id changes.
    parent, until = os.getppid(), time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < until:
        time.sleep(0.02)


def requeue() -> str | None:
    """Requeue this SLURM job and return what happened; None outside SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    # A task of a job array is named by the array and its index.
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        why = " ".join(done.stderr.split()) if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    return f"job {job} could not be queued again ({why})" if why else f"job {job} is queued again"
