"""Progress of a training run: each loss beside its chance level, speed, time left; and a warning when a loss stays at
that level past warm-up.

Losses are smoothed on the device and read every `log_every_n_steps`, so that other steps do not wait for the device.
"""

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from maskvlm.data.batch import Batch
from maskvlm.objectives.pretraining_losses import PretrainingLoss
from maskvlm.reporting.meters import (
    LossMeter,
    Readings,
    StepSpeed,
    ThroughputMeter,
    TimeLeft,
    duration,
    number,
    reading_interval,
)
from maskvlm.training.run_record import folder_of
from maskvlm.utils.status_bar import StatusBar

log = logging.getLogger(__name__)

LEGEND = "each loss stands beside its chance level: loss/chance; data wait: share of the time spent waiting for images"


def status_line(
    readings: Readings, speed: StepSpeed | None, seconds_left: float | None, width: int | None = None
) -> str:
    """`itc 2.31/4.16  itm 0.520/0.637  78 pairs/s  data wait 4 %  3:20 left`.

    Args:
        width: available characters. If the line does not fit, the chance levels are dropped, then the data wait, the
            speed and the time left. None: no limit.
    """
    levels = {name: f"/{number(level)}" for name, level in readings.levels.items()}
    losses = [f"{name} {number(loss)}{levels.get(name, '')}" for name, loss in readings.losses.items()]
    bare = [f"{name} {number(loss)}" for name, loss in readings.losses.items()]
    speeds = [] if speed is None else [f"{number(speed.pairs_per_second)} pairs/s"]
    wait = [] if speed is None else [f"data wait {100 * speed.data_wait:.0f} %"]
    end = [] if seconds_left is None else [f"{duration(seconds_left)} left"]
    lines = ["  ".join([*losses, *speeds, *wait, *end])]
    shorter = ([*bare, *speeds, *wait, *end], [*bare, *speeds, *end], [*bare, *end], bare)
    lines += [" ".join(way) for way in shorter]
    return next((line for line in lines if width is None or len(line) <= width), lines[-1])


class TrainingProgress(ProgressBar):
    """One line: step, losses beside their chance levels, pairs per second, data-wait share, time left.

    On a terminal it is a bar; elsewhere (a log file, CI, SLURM) a plain line is printed at intervals. Also logs
    `train/pairs_per_second`, `train/data_wait` (0 to 1) and `level/<loss>`.

    Args:
        seconds: minimum time between plain lines, which come at multiples of trainer.log_every_n_steps.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.console = Console()
        self.enabled = True
        self.bar: StatusBar | None = None
        self.losses, self.clock, self.time_left = LossMeter(), ThroughputMeter(), TimeLeft()
        self.step, self.total, self.status, self.printed = 0, math.inf, "", -math.inf
        self.alone = False  # evaluating outside a training run
        self.estimated = False  # whether the time that the run takes has been told

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        self.console.print(*args, **kwargs)

    # ------------------------------------------------------------------ training

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """In the first line of a run, print what it will do."""
        if self.enabled:
            data, task = trainer.datamodule, type(pl_module.task).__name__  # type: ignore[attr-defined]
            what = f"{task}: {data.total_steps:,} steps of {data.batch_size} on {trainer.strategy.root_device}"
            self._say(f"{what}, then an evaluation and a page of pictures in {folder_of(trainer)}")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.losses, self.clock, self.time_left = LossMeter(), ThroughputMeter(), TimeLeft()
        # The loaders exist by now; otherwise reading this would create them.
        self.total = float(trainer.estimated_stepping_batches)
        self.step, self.status, self.printed = trainer.global_step, "", -math.inf
        self.estimated = False
        if self.enabled:
            self._say(LEGEND)
        # A run without an end has no bar to fill.
        self._open(self._step_of, None if math.isinf(self.total) else self.total)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.clock.batch_starts()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        self.losses.take(trainer)
        stepped = trainer.global_step != self.step  # with accumulation not every batch is a step
        self.step = trainer.global_step
        due = stepped and (self.step % reading_interval(trainer) == 0 or self.step == self.total)
        readings = self.losses.read(trainer, pl_module, batch) if due else None  # waits for the device, so
        self.clock.batch_ends(len(batch.valid_B) * trainer.world_size)  # the clock stops after it
        seconds_left = self.time_left.seconds(self.step, self.total, getattr(pl_module, "terms", None))
        if readings is not None:
            self._tell(pl_module, readings, self.clock.read(), seconds_left)
        self._show(self._step_of, self.step, self.status)

    def _tell(
        self, pl_module: L.LightningModule, readings: Readings, speed: StepSpeed, seconds_left: float | None
    ) -> None:
        logged = {f"level/{name}": level for name, level in readings.levels.items()}
        logged |= {"train/pairs_per_second": speed.pairs_per_second, "train/data_wait": speed.data_wait}
        # Only the first process gets here: no other one logs or waits.
        pl_module.log_dict(logged, batch_size=1, rank_zero_only=True)
        if self.enabled and seconds_left is not None and not self.estimated:
            self._say(f"on this machine these steps take about {duration(seconds_left)}")
            self.estimated = True
        room = None if self.bar is None else self.bar.room(self._step_of)
        self.status = status_line(readings, speed, seconds_left, room)
        if self._plain and (time.monotonic() - self.printed >= self.seconds or self.step == self.total):
            self.printed = time.monotonic()
            self._say(f"{self._step_of}  {self.status}")

    @property
    def _step_of(self) -> str:
        return f"step {self.step}" + ("" if math.isinf(self.total) else f"/{self.total:.0f}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.clock.saves()

    # ------------------------------------------------------------------ evaluation

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.alone = trainer.state.fn != TrainerFn.FITTING
        if self.alone:
            batches = sum(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)
            self._open("evaluating", None if math.isinf(batches) else batches)
            if self._plain:
                self._say(f"evaluating: {batches} batch{'es' * (batches != 1)}")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.alone:
            self._show("evaluating", batch_idx + 1, f"batch {batch_idx + 1}")
        elif not trainer.sanity_checking:
            self._show(self._step_of, self.step, f"evaluating: batch {batch_idx + 1}")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._show("evaluating" if self.alone else self._step_of, None, "computing metrics")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.alone:
            self._show("evaluated", None, "")
            self._close()
        elif not trainer.sanity_checking:
            self.clock.interrupt()
            self._show(self._step_of, self.step, self.status)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    # ------------------------------------------------------------------ the line

    @property
    def _plain(self) -> bool:
        return self.enabled and not self.console.is_terminal

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _open(self, name: str, total: float | None) -> None:
        # Not in a log file, which a bar would fill; there, lines are printed.
        if self.enabled and self.console.is_terminal:
            self.bar = StatusBar(name, total, self.console)

    def _show(self, name: str, done: int | None, words: str) -> None:
        if self.bar is not None:
            self.bar.show(done, words, name, now=done is None)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


LEAST_PATIENCE = 50
"""Number of steps for which even a healthy matching loss stays at its level, so that a trial run does not warn."""


class StuckLoss(Callback):
    """Warns, once per loss, if nothing is learned from it: it has no gradient, or it stays at its chance level past
    warm-up.

    Args:
        share: fraction of the level above which a loss counts as being at it.
        patience: how long it must have been there, counted from the end of warm-up at the earliest: a fraction of the
            run's steps, but at least 50 steps; or, from 1 on, a number of steps. The default is a quarter, as matching
            stays at its level for a while.
        warmup: like patience; by default the module's own.
    """

    def __init__(self, share: float = 0.98, patience: float = 0.25, warmup: float | None = None) -> None:
        self.share, self.patience, self.warmup = share, patience, warmup
        self.losses = LossMeter()
        self.since: dict[str, int] = {}
        self.lowest: dict[str, float] = {}  # lowest value of each; a further fall restarts its time
        self.warned: set[str] = set()
        self.step = -1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        self.losses.take(trainer)
        for name, there in getattr(pl_module, "has_gradient", {}).items():
            if not there and name not in self.warned:
                self.warned.add(name)
                log.warning("%s", no_gradient_line(name))
        step = trainer.global_step
        # Once per step, not at every pass of an accumulated step.
        if step != self.step and step % reading_interval(trainer) == 0:
            self.step = step
            total = float(trainer.estimated_stepping_batches)
            warmup = getattr(pl_module, "warmup", 0) if self.warmup is None else self.warmup
            # Little is learned during warm-up, so a loss at its level means nothing then.
            if step > steps_of(warmup, total):
                patience = steps_of(self.patience, total)
                patience = max(patience, LEAST_PATIENCE) if self.patience < 1 else patience
                hints = getattr(getattr(pl_module, "task", None), "stuck_hints", {})
                self.look(step, patience, self.losses.read(trainer, pl_module, batch), hints)

    def look(self, step: int, patience: float, readings: Readings, hints: Mapping[str, str]) -> None:
        """Track which losses are at their level, and warn about those that have been there for too long.

        Args:
            hints: for each loss, what that means and where to look.
        """
        for name, loss in readings.losses.items():
            level = readings.levels.get(name, 0.0)
            # Falling below its level restarts the count; so does still coming down from far above.
            lowest = self.lowest.setdefault(name, loss)
            if level <= 0 or loss < self.share * level or loss < self.share * lowest:
                self.since.pop(name, None)
                self.lowest[name] = loss
            elif step - self.since.setdefault(name, step) >= patience and name not in self.warned:
                self.warned.add(name)
                hint = hints.get(name, PretrainingLoss.stuck_hint)
                log.warning("%s", stuck_line(name, loss, level, self.since[name], step, hint))


def no_gradient_line(name: str) -> str:
    """One-line warning about a loss that is logged but trains nothing."""
    todo = "compute it from the step's tensors without detach, item or no_grad, and do not freeze its inputs"
    return f"warning: {name} has no gradient, so nothing is learned from it; {todo}"


def stuck_line(name: str, loss: float, level: float, since: int, step: int, hint: str) -> str:
    """One-line warning about a loss that stays at its chance level."""
    return (
        f"warning: {name} has stayed at {number(loss)} since step {since} (now step {step}); "
        f"its chance level is {number(level)}, {hint}"
    )


def steps_of(amount: float, total: float) -> float:
    """The number of steps: `amount` itself from 1 on, a fraction of `total` below 1."""
    return amount if amount >= 1 else amount * total
