"""How fast a configuration trains here: pairs per second, share of the device's peak, memory. If the steps of a run
differ in cost (`contrast_first`, `image_learns`), the mean and each kind of step are reported."""

import json
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch.utils.flop_counter import FlopCounterMode

from maskvlm.cli.lightning import LightningCommand, check_cards, run_command
from maskvlm.training.failure import process_rank
from maskvlm.training.memory_estimate import ATTENTION
from maskvlm.training.run_record import machine

WARMUP = 5  # passes that are not timed: kernels are selected, memory is reserved
STEPS = 25  # passes of a phase, with the warm-up


class PhaseSpeed(NamedTuple):
    """Speed of one process in the steps of one phase of a run.

    Attributes:
        share: fraction of the run's steps, 0 to 1.
        seconds: time per step.
        flops: operations of the forward and backward pass of a step, counted as they are executed: recomputed
            activations count too.
    """

    share: float
    seconds: float
    flops: int


class BenchSpeed(NamedTuple):
    """Speed of one process, averaged over the steps of a run. phases: one entry for each phase whose steps differ in
    cost (contrast_first, image_learns), otherwise a single one."""

    device: str
    precision: str
    pairs_per_second: float
    milliseconds: float
    flops: int
    flops_per_second: float
    peak_flops: float | None
    memory_gib: float | None
    phases: tuple[PhaseSpeed, ...]

    def __str__(self) -> str:
        use = f", {100 * self.flops_per_second / self.peak_flops:.1f} % of its peak" if self.peak_flops else ""
        memory = f", {self.memory_gib:.2f} GiB at peak" if self.memory_gib is not None else ""
        each = ", then ".join(f"{phase.share:.0%} of {1000 * phase.seconds:.0f}" for phase in self.phases)
        kinds = f" ({each})" if len(self.phases) > 1 else ""
        return (
            f"{self.device}, {self.precision}: {self.pairs_per_second:.1f} pairs/s, "
            f"{self.milliseconds:.0f} ms per step{kinds}, {self.flops_per_second / 1e12:.3f} TFLOP/s{use}{memory}"
        )


class Stopwatch(L.Callback):
    """Counts the operations of the first step and times the steps after the warm-up, in each phase of a run in turn.

    Args:
        passes: passes accumulated in a step. Whole steps are timed, as many as WARMUP and STEPS passes hold, at least
            one of each.

    Attributes:
        begins: the fractions of a run at which its phases begin.
    """

    def __init__(self, passes: int = 1) -> None:
        self.begins: tuple[float, ...] = (0.0,)
        self.passes = passes
        self.counter, self.counting = FlopCounterMode(display=False, custom_mapping=ATTENTION), ExitStack()
        self.phase, self.flops, self.started = 0, 0, 0.0
        self.phase_speeds: list[PhaseSpeed] = []
        self.speed: BenchSpeed | None = None

    @property
    def warmup_passes(self) -> int:
        """Passes of a phase that are not timed."""
        return self.passes * math.ceil(WARMUP / self.passes)

    @property
    def phase_passes(self) -> int:
        """Passes of a phase."""
        return self.warmup_passes + self.passes * math.ceil((STEPS - WARMUP) / self.passes)

    @property
    def steps(self) -> int:
        """Number of steps to run, over all phases."""
        return self.phase_passes // self.passes * len(self.begins)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # These few steps are not a whole run: each step is told which point of the run it stands for.
        task: Any = pl_module.task
        task.register_forward_pre_hook(lambda task, _: setattr(task, "run_progress", self.begins[self.phase]))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        last = self.phase_passes * len(self.begins) - 1
        self.phase, number = divmod(min(batch_idx, last), self.phase_passes)
        # Not a `with` block, as it spans two hooks. Counting slows a pass down, so the first one is not timed.
        if number == 0:
            # A block first called under the counter would not be compiled (model.compile), then or later.
            self.counting.enter_context(torch.compiler.set_stance("force_eager"))
            self.counting.enter_context(self.counter)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx >= self.phase_passes * len(self.begins):
            return
        number = batch_idx % self.phase_passes + 1
        if number == 1:
            self.counting.close()
            self.flops = self.counter.get_total_flops()
        # Kernels are queued: without this the clock would be read before they have run. Training does not synchronise
        # after each step, so the other steps do not either.
        if number in (self.warmup_passes, self.phase_passes) and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
            # The peak over all phases is read at the end.
            if batch_idx + 1 == self.warmup_passes:
                # The operation counter keeps the first step's activations alive longer than training does.
                torch.cuda.reset_peak_memory_stats(pl_module.device)
        if number == self.warmup_passes:
            self.started = time.perf_counter()
        elif number == self.phase_passes:
            timed_steps = (self.phase_passes - self.warmup_passes) / self.passes
            seconds = (time.perf_counter() - self.started) / timed_steps
            ends = (*self.begins[1:], 1.0)[self.phase]
            # Operations are counted in one pass.
            self.phase_speeds.append(PhaseSpeed(ends - self.begins[self.phase], seconds, self.passes * self.flops))
            if len(self.phase_speeds) == len(self.begins):
                pairs = len(batch.valid_B) * trainer.world_size * self.passes
                self.speed = measured(pl_module.device, str(trainer.precision), pairs, self.phase_speeds)


def measured(device: torch.device, precision: str, pairs: int, phases: Sequence[PhaseSpeed]) -> BenchSpeed:
    """The speed of a run with these kinds of steps."""
    cuda = device.type == "cuda"
    seconds = sum(phase.share * phase.seconds for phase in phases)
    flops = round(sum(phase.share * phase.flops for phase in phases))
    kind = torch.bfloat16 if "bf16" in precision else torch.float16 if precision.startswith("16") else torch.float32
    return BenchSpeed(
        torch.cuda.get_device_name(device) if cuda else machine()["processor"],
        precision,
        pairs / seconds,
        1000 * seconds,
        flops,
        flops / seconds,
        get_available_flops(device, kind) if cuda else None,
        torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None,
        tuple(phases),
    )


class Bench(LightningCommand):
    """A few steps of `fit` without evaluation, run folder or checkpoint."""

    # Does not call the base class, which takes the folder and its lock.
    def before_instantiate_classes(self) -> None:
        trainer, data = self.settings.trainer, self.settings.data.init_args
        check_cards(trainer)
        trainer.logger, trainer.callbacks, trainer.limit_val_batches = False, [], 0
        trainer.enable_checkpointing = trainer.enable_progress_bar = False
        data.steps, data.epochs = STEPS, None
        # The outputs of frozen blocks are cached on disk from the first pass on. The reported cost of a step must not
        # depend on whether they are cached already, so here every step computes them.
        image = self.settings.get("model.backbone.init_args.image.init_args")
        if image is not None and "feature_cache" in image:
            image.feature_cache = None
        self.save_config_callback = None

    def before_fit(self) -> None:
        """Run the same number of steps in each phase."""
        super().before_fit()
        share = self.model.task.training_phases(self.model.backbone).share
        self.stopwatch.begins = (0.0, share) if share else (0.0,)
        self.datamodule.steps = self.stopwatch.steps

    def after_fit(self) -> None:
        """Keeps nothing."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self.stopwatch = Stopwatch(self.settings.trainer.accumulate_grad_batches)
        return super().instantiate_trainer(callbacks=[self.stopwatch], **kwargs)


def bench(arguments: list[str], allowed: Iterable[str] = ()) -> str:
    """Time a few training steps of a configuration; returns a line with their speed, or JSON (--json)."""
    words = [word for word in arguments if word != "--json"]
    speed = run_command(Bench, ["fit", *words], allowed).stopwatch.speed
    if process_rank() != 0 or speed is None:
        return ""
    return json.dumps(speed._asdict()) if words != arguments else str(speed)
