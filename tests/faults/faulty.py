"""Real faults, in a real process: a training step or the reading of a sample goes wrong."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info

from maskvlm.data.batch import Row
from maskvlm.data.scenes.source import ScenePairs
from maskvlm.training.lit import LitModel
from maskvlm.utils.distributed import rank


def no_idea() -> None:
    raise RuntimeError("something nobody thought of")


FAULTS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(1000),
    "late": lambda: time.sleep(1),
    "raises": no_idea,
}


def spoil(fault: str = "none", step: int = -1, sample: int = -1, of_rank: int = 0, factor: float = 1.0) -> None:
    """From now on this fault comes with a training step of one process, whose loss may be multiplied too, or with a
    sample that a data worker reads."""
    train, read = LitModel.training_step, ScenePairs.__getitem__

    def spoiled_step(self: LitModel, batch: Any, batch_idx: int) -> Any:
        loss = train(self, batch, batch_idx)
        if batch_idx != step or rank() != of_rank:
            return loss
        FAULTS[fault]()
        return loss * factor

    def spoiled_read(self: ScenePairs, index: int, /) -> Row:
        if index == sample and get_worker_info() is not None:
            FAULTS[fault]()
        return read(self, index)

    LitModel.training_step = spoiled_step  # type: ignore[method-assign]
    ScenePairs.__getitem__ = spoiled_read  # type: ignore[method-assign]
