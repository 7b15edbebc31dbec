"""Signals to a training: to end (SIGTERM), to make room and be requeued (SIGUSR1, SLURM's warning), and Ctrl-C.

A handler only records the signal. All processes together decide what to do between two steps: handlers that save or
communicate with other processes make trainings hang (7 of 24 two-process trials of the stock stack).
"""

import ctypes
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from maskvlm.utils.distributed import rank, world_size
from maskvlm.utils.launch import PR_SET_PDEATHSIG

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PATIENCE = 3
"""This many signals end the process without waiting for the end of the step, as soon as the main thread is in Python,
the only place where handlers run. A process that stays in C code can only be ended with SIGKILL."""


class Caught:
    """Records the signals to this process while a training runs."""

    def __init__(self) -> None:
        self.last, self.count = 0, 0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Record signals from now on; only the main thread can do this."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self.last, self.count = 0, 0
        self._before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}

    def restore(self, ending: bool = False) -> None:
        """Restore the handlers that were there before `install`.

        Args:
            ending: the training was stopped and is saved, and its process ends. From now on SIGTERM and SIGUSR1 are
                ignored: one that arrives late must not change the exit status, which asks to be started again.
        """
        for signum, handler in self._before.items():
            if ending and signum != signal.SIGINT:
                handler = signal.SIG_IGN
            # None stands for a handler set by C code, which Python cannot set again.
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
        self.last, self.count = 0, 0  # signals to this training do not apply to the next

    def _note(self, signum: int, frame: FrameType | None) -> None:
        impatient = signum == self.last == signal.SIGINT
        self.last, self.count = signum, self.count + 1
        if signum == signal.SIGINT and not impatient and rank() == 0:
            # A handler may run in the middle of a print, so this one bypasses Python's buffers.
            again = "Ctrl-C again ends it now, losing everything since its last checkpoint"
            with suppress(OSError):
                os.write(sys.stderr.fileno(), f"\nstopping: saving the run first; {again}\n".encode())
        # A second Ctrl-C in a row: the user is at the terminal and does not want to wait for the end of the step.
        if impatient:
            raise KeyboardInterrupt
        # After so many signals, do not wait for the end of the step: the system's default action ends the process.
        if self.count >= PATIENCE:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


CAUGHT = Caught()


class Agreement:
    """The largest request of all processes, by exchanging one number between CPUs: no device waits."""

    def __init__(self) -> None:
        on_cpu = world_size() == 1 or "gloo" in dist.get_backend()
        # NCCL only exchanges tensors on GPUs. Creating a group is collective: all processes get here together.
        self.group = None if on_cpu else dist.new_group(backend="gloo")

    def __call__(self, wish: int) -> int:
        if world_size() == 1:
            return wish
        shared = torch.tensor([wish])
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.group)
        return int(shared.item())


def end_with_parent(worker: int) -> None:
    """Let the system end this data worker together with its main process: on its own it would wait forever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for each in SIGNALS:  # the main process handles them
        signal.signal(each, signal.SIG_IGN)
