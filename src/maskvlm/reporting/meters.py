"""Meters of a training run: smoothed losses, their chance levels, throughput, time left."""

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor

from maskvlm.data.batch import Batch

NOT_LOSSES = {"train/loss", "train/pairs_per_second", "train/data_wait"}
"""Keys under `train/` that are not terms of the task."""


class RunningMeans:
    """Exponential running means, kept on the device of the values.

    Args:
        decay: weight of the past relative to the newest value, from 0 to below 1; 0.97 looks back about 30 values.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}  # 1 + decay + decay^2 + ...: divisors of the sums

    def take(self, values: Mapping[str, Tensor | float]) -> None:
        """Add a value for each name. If the set of names changes, all means are reset."""
        if values.keys() != self.sums.keys():
            self.sums = {name: torch.zeros(()) for name in values}
            self.weights = {name: torch.zeros(()) for name in values}
        for name, value in values.items():
            value = torch.as_tensor(value).detach().float()
            finite = value.isfinite()
            # A value that is not finite has no weight and leaves the past unchanged: it affects only its own step.
            for totals, new in ((self.sums, value.nan_to_num()), (self.weights, torch.ones_like(value))):
                before = totals[name].to(value.device)
                totals[name] = torch.where(finite, self.decay * before + new, before)

    def read(self) -> dict[str, float]:
        """The means so far, copied to the host at once; NaN if no value was finite."""
        if not self.sums:
            return {}
        # One copy for all names, as each copy waits for the device. 0 / 0 is NaN.
        means = torch.stack(list(self.sums.values())) / torch.stack(list(self.weights.values()))
        return dict(zip(self.sums, means.tolist(), strict=True))


class Readings(NamedTuple):
    """losses: smoothed losses of the task's terms. levels: chance levels of those that have one."""

    losses: dict[str, float]
    levels: dict[str, float]


class LossMeter:
    """Tracks the terms that the module logs as `train/<name>`, and the task's chance levels."""

    def __init__(self, decay: float = 0.97) -> None:
        # Levels are added at each reading, losses at each step: the shorter memory covers about as many steps or more.
        self.losses, self.levels = RunningMeans(decay), RunningMeans(0.8)

    def take(self, trainer: L.Trainer) -> None:
        """Add the terms of this step, without waiting for the device."""
        # Tensors, still on the device of the step.
        logged = trainer.callback_metrics
        names = [name for name in logged if name.startswith("train/") and name not in NOT_LOSSES]
        self.losses.take({name.removeprefix("train/"): logged[name] for name in names})

    def read(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch) -> Readings:
        """The smoothed losses and levels; waits for the device. The level of contrast is for the pairs of one pass."""
        task = getattr(pl_module, "task", None)
        # Other processes have the same number of pairs per pass.
        self.levels.take(task.chance_levels(len(batch.valid_B) * trainer.world_size) if task else {})
        return Readings(self.losses.read(), self.levels.read())


class StepSpeed(NamedTuple):
    """pairs_per_second: over all processes. data_wait: share of the time spent waiting for a batch, 0 to 1."""

    pairs_per_second: float
    data_wait: float


class ThroughputMeter:
    """Measures where the time of training goes. Time that a checkpoint blocks training counts as work; validation is
    excluded.

    Args:
        now: clock, in seconds from any start.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.began: float | None = None
        self.ended: float | None = None
        self.saved = False
        self.reset()

    def reset(self) -> None:
        """Restart counting."""
        self.waited = self.worked = 0.0
        self.pairs = 0

    def batch_starts(self) -> None:
        """A batch has arrived."""
        self.began = self.now()
        # Not after an interruption, which is not waiting.
        if self.ended is not None and self.saved:
            self.worked += self.began - self.ended
        elif self.ended is not None:
            self.waited += self.began - self.ended
        self.saved = False

    def batch_ends(self, pairs: int) -> None:
        """The step of the batch is done. pairs: number of its pairs over all processes."""
        self.ended = self.now()
        if self.began is not None:
            self.worked += self.ended - self.began
            self.pairs += pairs

    def saves(self) -> None:
        """A checkpoint is saved before the next batch."""
        self.saved = True

    def interrupt(self) -> None:
        """Something else happens before the next batch."""
        self.ended = None

    def read(self) -> StepSpeed:
        """The speed since the last call."""
        total = self.waited + self.worked
        speed = StepSpeed(self.pairs / total, self.waited / total) if total else StepSpeed(0.0, 0.0)
        self.reset()
        return speed


class TimeLeft:
    """Time left, from the pace since the first step seen, which is excluded because it compiles and fills caches.
    Evaluations in between count. The pace restarts when `kind` changes, because such steps have another cost."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.first: tuple[float, int] | None = None
        self.kind: object = None

    def seconds(self, step: int, total: float, kind: object = None) -> float | None:
        """Seconds left; None if unknown. kind: kind of the step, such as the names of its losses."""
        if self.first is None or kind != self.kind:
            self.first, self.kind = (self.now(), step), kind
        began, first = self.first
        # Unknown after a single step, and for a run without an end.
        if step == first or math.isinf(total):
            return None
        return (self.now() - began) / (step - first) * max(0.0, total - step)


def reading_interval(trainer: L.Trainer) -> int:
    """Steps between two readings from the device; Lightning's default if the run logs nothing."""
    return trainer.log_every_n_steps or 50  # type: ignore[attr-defined]


def number(value: float) -> str:
    """Format with three significant digits: 4.16, 0.637, 0.0985, 123; from a thousand on as an integer: 5,200."""
    # `#` keeps trailing zeros (4.10), and a point after 123.
    return f"{value:,.0f}" if abs(value) >= 999.5 and math.isfinite(value) else f"{value:#.3g}".rstrip(".")


def duration(seconds: float) -> str:
    """Format a duration: 45 s is 0:45, one hour and five minutes is 1:05:00, more than a day is 2 d 03:00."""
    # Rounded once, before it is split: 59.6 s is 1:00.
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
