"""How fast a configuration trains here: pairs per second, share of the device's peak, memory."""

import json
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch.utils.flop_counter import FlopCounterMode

from maskvlm.cli.lightning import LightningCommand, check_cards, run_command
from maskvlm.training.failure import process_rank
from maskvlm.training.run_record import machine

WARMUP = 5  # steps that are not timed: kernels are chosen, memory is reserved
STEPS = 25


class BenchSpeed(NamedTuple):
    """Of one process. Operations are counted in the forward and backward pass of a step as they are carried out, so
    recomputed activations count too. contrast_first: share of the steps that are cheaper; the first of them was
    counted. image_learns: share of the steps in which the image encoder learns, of which the first was counted; the
    others are cheaper."""

    device: str
    precision: str
    pairs_per_second: float
    milliseconds: float
    flops: int
    flops_per_second: float
    peak_flops: float | None
    memory_gib: float | None
    contrast_first: float = 0.0
    image_learns: float = 1.0

    def __str__(self) -> str:
        use = f", {100 * self.flops_per_second / self.peak_flops:.1f} % of its peak" if self.peak_flops else ""
        memory = f", {self.memory_gib:.2f} GiB at most" if self.memory_gib is not None else ""
        # What was counted is a step of contrast alone; what was timed are both kinds.
        work = f", {self.flops_per_second / 1e12:.3f} TFLOP/s{use}"
        if self.contrast_first:
            work = f", {self.contrast_first:.0%} of the steps contrast alone (model.task.contrast_first)"
        elif self.image_learns < 1:
            work = f", the image encoder learning in {self.image_learns:.0%} of the steps (model.task.image_learns)"
        return (
            f"{self.device}, {self.precision}: {self.pairs_per_second:.1f} pairs/s, "
            f"{self.milliseconds:.0f} ms a step{work}{memory}"
        )


class Stopwatch(L.Callback):
    """Counts the operations of the first step and times those after the warm-up."""

    def __init__(self) -> None:
        self.counter, self.counting = FlopCounterMode(display=False), ExitStack()
        self.flops, self.started = 0, 0.0
        self.speed: BenchSpeed | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not a `with` block, as it spans two hooks. Counting slows a step down: the first one is not timed.
        if batch_idx == 0:
            # A block that is called while something counts would never be compiled (model.compile), later neither.
            self.counting.enter_context(torch.compiler.set_stance("force_eager"))
            self.counting.enter_context(self.counter)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.counting.close()
            self.flops = self.counter.get_total_flops()
        # Kernels are queued: without this the clock would be read before they have run. At no other step, as training
        # does not wait after each.
        if batch_idx + 1 in (WARMUP, STEPS) and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
            if batch_idx + 1 == WARMUP:
                # What counts operations keeps the first step's activations alive longer than training does.
                torch.cuda.reset_peak_memory_stats(pl_module.device)
        if batch_idx + 1 == WARMUP:
            self.started = time.perf_counter()
        elif batch_idx + 1 == STEPS:
            seconds = (time.perf_counter() - self.started) / (STEPS - WARMUP)
            pairs = len(batch.valid_B) * trainer.world_size
            speed = measured(pl_module.device, str(trainer.precision), pairs, seconds, self.flops)
            task = getattr(pl_module, "task", None)
            first, learns = getattr(task, "contrast_first", 0.0), getattr(task, "image_learns", 1.0)
            self.speed = speed._replace(contrast_first=first, image_learns=learns)


def measured(device: torch.device, precision: str, pairs: int, seconds: float, flops: int) -> BenchSpeed:
    """The speed of one step of `seconds`."""
    cuda = device.type == "cuda"
    kind = torch.bfloat16 if "bf16" in precision else torch.float32
    return BenchSpeed(
        torch.cuda.get_device_name(device) if cuda else machine()["processor"],
        precision,
        pairs / seconds,
        1000 * seconds,
        flops,
        flops / seconds,
        get_available_flops(device, kind) if cuda else None,
        torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None,
    )


class Bench(LightningCommand):
    """A few steps of fit: no evaluation, no folder, no checkpoint."""

    # Not the base class's, which takes the folder and its lock.
    def before_instantiate_classes(self) -> None:
        trainer, data = self.settings.trainer, self.settings.data.init_args
        check_cards(trainer)
        trainer.logger, trainer.callbacks, trainer.limit_val_batches = False, [], 0
        trainer.enable_checkpointing = trainer.enable_progress_bar = False
        data.steps, data.epochs = STEPS, None
        self.save_config_callback = None

    def after_fit(self) -> None:
        """Nothing is kept."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self.stopwatch = Stopwatch()
        return super().instantiate_trainer(callbacks=[self.stopwatch], **kwargs)


def bench(arguments: list[str], allowed: Iterable[str] = ()) -> str:
    """Time a few training steps of a configuration; returns the line that says how fast they were, or JSON (--json)."""
    words = [word for word in arguments if word != "--json"]
    speed = run_command(Bench, ["fit", *words], allowed).stopwatch.speed
    if process_rank() != 0 or speed is None:
        return ""
    return json.dumps(speed._asdict()) if words != arguments else str(speed)
