"""What the system asks of a training: to end (SIGTERM), to make room and come back (SIGUSR1, SLURM's warning), Ctrl-C.

A handler only notes the signal. What is to be done is decided between two steps, by all processes together: a handler
that saves or speaks to other processes is what makes trainings hang (of 24 two-process trials of the stock stack 7).
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
"""The signal of this number ends the process before the step does, as soon as the main thread is in Python, where alone
handlers run. A process that stays in C code is ended by SIGKILL alone."""


class Caught:
    """The signals of this process, noted while a training runs."""

    def __init__(self) -> None:
        self.last, self.count = 0, 0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Note signals from now on; only the main thread can do this."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self.last, self.count = 0, 0
        self._before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}

    def restore(self) -> None:
        """Restore the handlers that were there before `install`."""
        for signum, handler in self._before.items():
            # None stands for a handler that C code has set, which Python cannot set again.
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
        self.last, self.count = 0, 0  # what was asked of this training is not asked of the next

    def _note(self, signum: int, frame: FrameType | None) -> None:
        impatient = signum == self.last == signal.SIGINT
        self.last, self.count = signum, self.count + 1
        if signum == signal.SIGINT and not impatient and rank() == 0:
            # A handler may run in the middle of a print: this one goes past Python's buffers.
            again = "Ctrl-C again ends it now, losing everything since its last checkpoint"
            with suppress(OSError):
                os.write(sys.stderr.fileno(), f"\nstopping: saving the run first; {again}\n".encode())
        # A second Ctrl-C in a row: its user is at the terminal, and does not wait for the end of the step.
        if impatient:
            raise KeyboardInterrupt
        # Whoever asks so often does not wait for the end of the step: the system's own action ends the process.
        if self.count >= PATIENCE:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


CAUGHT = Caught()


class Agreement:
    """The largest wish of all processes, by one exchange of a number between their processors: no device waits."""

    def __init__(self) -> None:
        on_cpu = world_size() == 1 or "gloo" in dist.get_backend()
        # NCCL exchanges tensors on devices alone. To make a group is collective: all processes come here together.
        self.group = None if on_cpu else dist.new_group(backend="gloo")

    def __call__(self, wish: int) -> int:
        if world_size() == 1:
            return wish
        shared = torch.tensor([wish])
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.group)
        return int(shared.item())


def end_with_parent(worker: int) -> None:
    """Let the system end this data worker with the process it works for: one left alone would wait for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for each in SIGNALS:  # the main process decides what they mean
        signal.signal(each, signal.SIG_IGN)
