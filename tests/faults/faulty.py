"""The built-in world with one image that is bad for the data worker that shows it: real faults, in a real process."""

import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from maskvlm.data.batch import Row
from maskvlm.data.scenes.source import ScenePairs, Scenes


def out_of_memory() -> None:
    """A real limit of the system, and a real allocation beyond it."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1))
    np.ones(2**30, dtype=np.uint8)


def fill_shared_memory() -> None:
    """Somebody else takes what is left of /dev/shm, when the batches before have been handed over (else the worker that
    is handing one over finds it full first, and names its own sample)."""
    time.sleep(0.8)
    with suppress(OSError), open("/dev/shm/somebody-elses", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def no_idea() -> None:
    raise RuntimeError("something nobody thought of")


FAULTS: dict[str, Callable[[], Any]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "bus error": lambda: os.kill(os.getpid(), signal.SIGBUS),
    "exits": lambda: os._exit(3),
    "hangs": lambda: time.sleep(1000),
    "memory": out_of_memory,
    "shared memory": fill_shared_memory,
    "raises": no_idea,
}


class Trap(list[str]):
    """Captions that nobody looks at in peace."""

    happens: Callable[[], Any]

    def __len__(self) -> int:
        if get_worker_info() is not None:  # the main process has learnt its words from all of them
            self.happens()
        return super().__len__()


class FaultyPairs(ScenePairs):
    """As `ScenePairs`; of image `at` the captions are a trap."""

    fault, at = "", -1

    def __getitem__(self, index: int, /) -> Row:
        row = super().__getitem__(index)
        if index == self.at:
            row["captions"] = Trap(row["captions"])
            row["captions"].happens = FAULTS[self.fault]
        return row


class Nth(list[str]):
    """Captions that are looked at so often (twice a sample) before something happens."""

    remaining, happens = 90, no_idea

    def __len__(self) -> int:
        Nth.remaining -= 1
        if Nth.remaining == 0:
            Nth.happens()
        return super().__len__()


class NthPairs(ScenePairs):
    """As `ScenePairs`, with captions that count how often they are shown in a training."""

    def __getitem__(self, index: int, /) -> Row:
        row = super().__getitem__(index)
        return Row(**{**row, "captions": Nth(row["captions"])})  # type: ignore[typeddict-item]


class InOne(Scenes):
    """As `Scenes`; in the process of this rank, which reads itself, a `fault` comes with the 45th training sample."""

    def __init__(self, rank: int, fault: str, train: int = 60, val: int = 6, test: int = 6) -> None:
        super().__init__(train, val, test)
        self.faulty, Nth.happens = os.environ.get("RANK") == str(rank), staticmethod(FAULTS[fault])

    def split(self, name: str) -> ScenePairs:
        pairs = super().split(name)
        if name == "train" and self.faulty:
            pairs.__class__ = NthPairs
        return pairs


class Faulty(Scenes):
    """As `Scenes`, with a fault at image `at` of the training split."""

    def __init__(self, fault: str, at: int, train: int = 60, val: int = 6, test: int = 6) -> None:
        super().__init__(train, val, test)
        self.fault, self.at = fault, at

    def split(self, name: str) -> ScenePairs:
        pairs = super().split(name)
        if name == "train":
            pairs.__class__ = FaultyPairs
            pairs.fault, pairs.at = self.fault, self.at  # type: ignore[attr-defined]
        return pairs
