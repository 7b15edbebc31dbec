"""A step that would do harm is not made: a loss or a gradient that is not finite, a loss that shoots up.

Decided before the update, on the device: the fused optimiser is handed a flag (`found_inf`, as a gradient scaler hands
it), and with it set leaves weights and moments as they are, to the bit. No step waits for the device to be judged: a
GPU's verdicts are copied aside and read a few steps later. All processes decide alike by construction: the norm is that
of gradients that are averaged already, the loss is averaged here.

Shapes: W losses of the window, S losses of a step.
"""

import math
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from maskvlm.training.run_record import folder_of, note_divergence, write_bad_samples
from maskvlm.utils.distributed import gather_objects, shared_count
from maskvlm.utils.errors import ExitCode, UserError, check_least

WINDOW = 128  # latest losses that a new one is held against
LEAST = 8  # losses before the first is
FAR = 20.0  # standard deviations, estimated from the median distance to the median
LATE = 4  # steps between a GPU's verdict and our reading it
MOST_LISTED = 1000
REASONS = ("", "its loss is not finite", "a gradient is not finite", "its loss shot up")
LOSS, GRADIENT, SPIKE = 1, 2, 3
HOW_ON = "Check the samples in bad_samples.json; lower model.lr, or start --from an earlier checkpoint"
SAMPLES = "skipped_steps"  # the key in bad_samples.json


class LossWindow:
    """The latest losses, on their device. Those of skipped steps are left out.

    A loss shoots up when it lies above the median by more than FAR standard deviations and by more than the first
    losses of the run: what a run began with is never a spike, however small its losses have become.
    """

    def __init__(self) -> None:
        self.losses_W = torch.full((WINDOW,), float("nan"), dtype=torch.float32)
        self.first = torch.tensor(float("nan"), dtype=torch.float32)
        self.place = 0

    def limit(self, device: torch.device) -> Tensor:
        """The largest healthy loss; not a number while fewer than LEAST are known."""
        if self.losses_W.device != device:
            self.losses_W, self.first = self.losses_W.to(device), self.first.to(device)
        # [W] -> single numbers, which stay on the device.
        middle, count = median(self.losses_W)
        spread, _ = median((self.losses_W - middle).abs())
        self.first = torch.where(self.first.isnan() & (count >= LEAST), middle.abs(), self.first)
        # 1.4826 turns the median distance into a standard deviation (of a normal distribution). `maximum` hands on NaN:
        # while there is no first loss, nothing lies above the limit.
        return middle + torch.maximum(FAR * 1.4826 * spread, self.first)

    def take(self, loss: Tensor, verdict: Tensor) -> None:
        """Note the loss of a step that was made; a skipped one takes a place and says nothing."""
        # A ring: the oldest loss gives way.
        self.losses_W[self.place % WINDOW] = torch.where(verdict == 0, loss, float("nan"))
        self.place += 1

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses_W.tolist(), "first": float(self.first), "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses_W = torch.tensor(state["losses"], dtype=torch.float32)
        self.first, self.place = torch.tensor(state["first"], dtype=torch.float32), state["place"]


def median(values_W: Tensor) -> tuple[Tensor, Tensor]:
    """The lower median of the values that are numbers, and how many they are; no host waits for it."""
    sorted_W = values_W.sort().values  # what is not a number comes last
    count = (~values_W.isnan()).sum()
    return sorted_W.gather(0, ((count - 1) // 2).clamp(min=0)[None])[0], count


def verdict_of(loss: Tensor, norm: Tensor, limit: Tensor) -> Tensor:
    """Why a step must not be made, as a place in REASONS; 0 where it may. All are single numbers on one device."""
    spike = torch.where(loss > limit, SPIKE, 0)
    return torch.where(loss.isfinite(), torch.where(norm.isfinite(), spike, GRADIENT), LOSS)


class Verdict(NamedTuple):
    """Verdict on one step. facts: verdict, loss, limit, and each weighted term of the loss, in the order of `terms`;
    ready: waits until they have arrived on the host. rows: row numbers and image ids of each pass."""

    step: int
    facts: Tensor
    ready: Callable[[], object]
    rows: list[tuple[Tensor, Tensor]]
    terms: tuple[str, ...]


class StepGuard(Callback):
    """Skips steps that would do harm, lists their samples in `bad_samples.json`, ends the run after too many in a row.

    Args:
        stop_after: skipped steps in a row, after which the run ends.
    """

    def __init__(self, stop_after: int = 10) -> None:
        check_least(1, {"trainer.callbacks.stop_after": stop_after})
        self.stop_after = stop_after
        self.window = LossWindow()
        self.in_a_row, self.steps, self.listed = 0, 0, 0
        self.skipped: list[dict[str, Any]] = []
        self.pending: deque[Verdict] = deque()
        self.losses: list[Tensor] = []
        self.weighted: list[Tensor] = []
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.step = 0
        self.terms: tuple[str, ...] | None = None  # whose sum the losses of the window are
        self.trainer: L.Trainer | None = None

    # ------------------------------------------------------------------ what a checkpoint tells

    def state_dict(self) -> dict[str, Any]:
        if self.trainer is not None:
            self.settle(0)
        counts = {"in_a_row": self.in_a_row, "steps": self.steps, "listed": self.listed}
        known = {} if self.terms is None else {"terms": list(self.terms)}  # a state of an older run has none
        skipped = [dict(one) for one in self.skipped]
        return {"window": self.window.state_dict(), "skipped": skipped, **counts, **known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.window.load_state_dict(state_dict["window"])
        terms = state_dict.get("terms")
        self.terms = None if terms is None else tuple(terms)
        self.skipped = [dict(one) for one in state_dict["skipped"]]
        self.in_a_row, self.steps, self.listed = (state_dict[key] for key in ("in_a_row", "steps", "listed"))

    @property
    def skipped_steps(self) -> dict[str, Any]:
        """Entry of `bad_samples.json`; empty where no step was skipped."""
        return {SAMPLES: {"count": self.steps, "steps": self.skipped}} if self.steps else {}

    # ------------------------------------------------------------------ a step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trainer, self.losses, self.weighted, self.rows = trainer, [], [], []
        self.pending.clear()
        pl_module.guard = self  # type: ignore[assignment]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # A pair has one image, an example P of them.
        ids = batch.image_id_B if hasattr(batch, "image_id_B") else batch.image_id_BP
        self.rows.append((batch.index_B, ids))
        self.step = trainer.global_step + 1

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """The loss of one pass, as it goes into the gradients: its share where passes are accumulated. Where another
        term joins it, earlier sums say nothing of it."""
        terms = getattr(pl_module, "terms", None)
        if self.terms is not None and terms != self.terms:
            self.window = LossWindow()
        self.terms = terms
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.losses.append(loss.detach().float() / (scaler.get_scale() if scaler is not None else 1.0))
        weighted_S: Tensor | None = getattr(pl_module, "weighted_S", None)
        if terms is not None and weighted_S is not None:
            self.weighted.append(weighted_S.float())

    def judge(self, optimizer: Optimizer, norm: Tensor, scaled: bool) -> None:
        """Let the coming update pass, or make it change nothing.

        Args:
            optimizer: a fused one, or any where gradients are scaled.
            norm: of all gradients, averaged over processes.
            scaled: True in float16: the GradScaler handles gradient overflow, and because it synchronises with the
                device anyway, the skip is decided on the host.
        """
        # Shares of accumulated passes add up to the loss of the step, then processes are averaged.
        loss = torch.stack(self.losses).sum()
        # Terms come whole: of accumulated passes their mean is what adds up to the loss.
        weighted_S = torch.stack(self.weighted).mean(0) if self.weighted else loss.new_zeros(0)
        loss, weighted_S = shared_count(torch.cat([loss[None], weighted_S])).tensor_split([1])
        loss = loss[0]
        norm = torch.zeros_like(loss) if scaled else norm.to(loss)
        # The limit first: a loss is not held against a window that holds it.
        limit = self.window.limit(loss.device)
        verdict = verdict_of(loss, norm, limit)
        self.window.take(loss, verdict)
        if not scaled:
            # torch's fused AdamW reads this attribute: 1 leaves weights, moments and its count of steps as they are.
            optimizer.found_inf = (verdict > 0).float()  # type: ignore[attr-defined]
        elif int(verdict) > 0:
            optimizer.zero_grad(set_to_none=True)  # a parameter without gradient is left as it is
        facts, ready = copy_to_host(torch.cat([torch.stack([verdict.float(), loss, limit]), weighted_S]))
        # A module of somebody else's may tell its terms without their values.
        terms = (self.terms or ()) if self.weighted else ()
        self.pending.append(Verdict(self.step, facts, ready, self.rows, terms))
        self.losses, self.weighted, self.rows = [], [], []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.settle(LATE if pl_module.device.type == "cuda" else 0)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        pl_module.guard = None  # type: ignore[assignment]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.settle(0)
        pl_module.guard = None  # type: ignore[assignment]
        if self.steps and self.steps == trainer.global_step:
            raise diverged(trainer, self.steps, f"all {self.steps} steps were skipped: nothing was learned")

    # ------------------------------------------------------------------ afterwards

    def settle(self, late: int) -> None:
        """Read the verdicts but for the latest `late`. All processes read the same at the same time.

        Raises:
            UserError: too many steps in a row were skipped (65).
        """
        while len(self.pending) > late:
            verdict = self.pending.popleft()
            # Of a GPU the copy is as old as `late` steps, so that hardly anything is waited for.
            verdict.ready()
            reason, loss, limit, *weighted = verdict.facts.tolist()
            self.in_a_row = self.in_a_row + 1 if reason else 0
            if reason:
                blamed = to_blame(int(reason), dict(zip(verdict.terms, weighted, strict=True)))
                self._tell(verdict, REASONS[int(reason)], loss, limit, blamed)

    def _tell(self, verdict: Verdict, reason: str, loss: float, limit: float, blamed: str) -> None:
        trainer = self.trainer
        assert trainer is not None
        healthy = f", healthy up to {limit:.3g}" if reason == REASONS[SPIKE] else ""
        description = f"{reason} ({loss:.3g}{healthy}{f'; {blamed}' if blamed else ''})"
        # A collective: all processes read this verdict at the same time.
        samples = [one for part in gather_objects(samples_of(trainer, verdict.rows)) for one in part]  # type: ignore[attr-defined]
        self.steps += 1
        listed = samples[: max(0, MOST_LISTED - self.listed)]
        self.listed += len(listed)
        if listed:
            self.skipped.append({"step": verdict.step, "reason": description, "samples": listed})
        # Now, not at the end of the run, which it may not reach.
        path = write_bad_samples(trainer)
        if trainer.is_global_zero:
            message = f"step {verdict.step} skipped: {description}; {len(samples)} samples, listed in {path}"
            print(f"warning: {message}", file=sys.stderr, flush=True)
        self._check_row(reason, verdict.step)

    def _check_row(self, reason: str, step: int) -> None:
        if self.in_a_row < self.stop_after:
            return
        assert self.trainer is not None
        what = f"{self.in_a_row} steps in a row were skipped up to step {step}, the last as {reason}"
        raise diverged(self.trainer, step, what)


def diverged(trainer: L.Trainer, step: int, what: str) -> UserError:
    """Note in the run's folder that it has diverged; returns the error that ends it."""
    if trainer.is_global_zero:
        note_divergence(folder_of(trainer), step)
    return UserError(folder_of(trainer), what, HOW_ON, ExitCode.BAD_DATA)


def to_blame(reason: int, weighted: dict[str, float]) -> str:
    """Which terms of a step's loss made it a spike or not finite, in words; "" where the loss has one term alone, or
    where a gradient is the reason."""
    if reason == LOSS:
        lost = [name for name, value in weighted.items() if not math.isfinite(value)]
        return "of " + ", ".join(lost) if len(weighted) > 1 and lost else ""
    if reason == SPIKE and len(weighted) > 1:
        name = max(weighted, key=lambda name: weighted[name])
        return f"most of it {name}, {weighted[name]:.3g}"
    return ""


def copy_to_host(facts: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """A copy where the host can read it, and what waits for it. What follows on the device is not waited for."""
    if facts.device.type != "cuda":
        return facts, lambda: None
    # Into pinned memory alone a copy runs beside the host; the event tells when it is whole.
    copy = torch.empty(facts.shape, dtype=facts.dtype, pin_memory=True)
    copy.copy_(facts, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event.synchronize


def samples_of(trainer: L.Trainer, rows: list[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """Which samples these are: position in the training split, id of the image, origin. A streamed split has no rows
    by position: there the id is the hash that a batch holds, as 16 hex digits."""
    split = getattr(trainer.datamodule, "splits", {}).get("train")  # type: ignore[attr-defined]
    samples = []
    for index_B, ids in rows:
        # [B] or [B, P] -> the first image of each. A hash is signed in a tensor and unsigned as hex digits.
        for index, hashed in zip(index_B.tolist(), ids.reshape(len(ids), -1)[:, 0].tolist(), strict=True):
            row: Any = {}
            with suppress(Exception):  # the row itself may be what is wrong, or cannot be asked for
                row = split[index] if split is not None else {}
            name = row.get("image_id") or ", ".join(row.get("image_ids", [])) or f"{hashed % 2**64:016x}"
            samples.append({"index": index, "image_id": str(name), "origin": str(row.get("origin", ""))})
    return samples
