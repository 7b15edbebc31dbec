"""Skips harmful steps: those with a loss or gradient that is not finite, or a loss that spikes.

The decision is made on the device, before the update: the fused optimiser gets a flag (`found_inf`, as from a gradient
scaler) which, if set, makes it leave weights and moments unchanged, bit for bit. No step waits for the device: a GPU's
verdicts are copied to the host and read a few steps later. All processes decide alike by construction, since the norm
is that of averaged gradients, and the loss is averaged here.

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
from maskvlm.utils.errors import ExitCode, UserError, check_counts

WINDOW = 128  # latest losses with which a new one is compared
LEAST = 8  # losses needed before the first comparison
FAR = 20.0  # standard deviations, estimated from the median distance to the median
LATE = 4  # steps between a GPU's verdict and reading it
MOST_LISTED = 1000
REASONS = ("", "its loss is not finite", "a gradient is not finite", "its loss shot up")
LOSS, GRADIENT, SPIKE = 1, 2, 3
HOW_ON = "Check the samples in bad_samples.json; lower model.lr, or start --from an earlier checkpoint"
SAMPLES = "skipped_steps"  # the key in bad_samples.json


class LossWindow:
    """The latest losses, on their device. Those of skipped steps are left out.

    A loss is a spike if it is above the median by more than FAR standard deviations and by more than the first losses
    of the run: the loss at the start of a run is never a spike, however small its losses have become.
    """

    def __init__(self) -> None:
        self.losses_W = torch.full((WINDOW,), float("nan"), dtype=torch.float32)
        self.first = torch.tensor(float("nan"), dtype=torch.float32)
        self.place = 0

    def limit(self, device: torch.device) -> Tensor:
        """The largest healthy loss; NaN while fewer than LEAST losses are known."""
        if self.losses_W.device != device:
            self.losses_W, self.first = self.losses_W.to(device), self.first.to(device)
        # [W] -> scalars, which stay on the device.
        middle, count = median(self.losses_W)
        spread, _ = median((self.losses_W - middle).abs())
        self.first = torch.where(self.first.isnan() & (count >= LEAST), middle.abs(), self.first)
        # 1.4826 turns the median distance into a standard deviation (of a normal distribution). `maximum` propagates
        # NaN: while there is no first loss, nothing is above the limit.
        return middle + torch.maximum(FAR * 1.4826 * spread, self.first)

    def take(self, loss: Tensor, verdict: Tensor) -> None:
        """Add the loss of a step; that of a skipped step takes up a slot but is ignored."""
        # A ring buffer: the oldest loss is overwritten.
        self.losses_W[self.place % WINDOW] = torch.where(verdict == 0, loss, float("nan"))
        self.place += 1

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses_W.tolist(), "first": float(self.first), "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses_W = torch.tensor(state["losses"], dtype=torch.float32)
        self.first, self.place = torch.tensor(state["first"], dtype=torch.float32), state["place"]


def median(values_W: Tensor) -> tuple[Tensor, Tensor]:
    """The lower median of the values that are not NaN, and their count; without waiting for the device."""
    sorted_W = values_W.sort().values  # NaN comes last
    count = (~values_W.isnan()).sum()
    return sorted_W.gather(0, ((count - 1) // 2).clamp(min=0)[None])[0], count


def verdict_of(loss: Tensor, norm: Tensor, limit: Tensor) -> Tensor:
    """Why a step must be skipped, as an index into REASONS; 0 if it is fine. All are scalars on one device."""
    spike = torch.where(loss > limit, SPIKE, 0)
    return torch.where(loss.isfinite(), torch.where(norm.isfinite(), spike, GRADIENT), LOSS)


class Verdict(NamedTuple):
    """Verdict on one step. facts: verdict, loss, limit, and each weighted term of the loss, in the order of `terms`.
    ready: waits until they have arrived on the host. rows: row numbers and image ids of each pass."""

    step: int
    facts: Tensor
    ready: Callable[[], object]
    rows: list[tuple[Tensor, Tensor]]
    terms: tuple[str, ...]


class StepGuard(Callback):
    """Skips harmful steps, lists their samples in `bad_samples.json`, and ends the run after too many in a row.

    Args:
        stop_after: number of skipped steps in a row after which the run ends.
    """

    def __init__(self, stop_after: int = 10) -> None:
        check_counts(1, {"trainer.callbacks.stop_after": stop_after})
        self.stop_after = stop_after
        self.window = LossWindow()
        self.in_a_row, self.steps, self.listed = 0, 0, 0
        self.skipped: list[dict[str, Any]] = []
        self.pending: deque[Verdict] = deque()
        self.losses: list[Tensor] = []
        self.weighted: list[Tensor] = []
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.step = 0
        self.terms: tuple[str, ...] | None = None  # the terms summed in the losses of the window
        self.trainer: L.Trainer | None = None

    # ------------------------------------------------------------------ state in a checkpoint

    def state_dict(self) -> dict[str, Any]:
        if self.trainer is not None:
            self.settle(0)
        counts = {"in_a_row": self.in_a_row, "steps": self.steps, "listed": self.listed}
        known = {} if self.terms is None else {"terms": list(self.terms)}  # the state of an older run has none
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
        """Entry of `bad_samples.json`; empty if no step was skipped."""
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
        """Record the loss of one pass as it enters the gradients: its share if passes are accumulated. If its terms
        change, earlier sums are no longer comparable."""
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
        """Let the coming update through, or turn it into a no-op.

        Args:
            optimizer: a fused one, or any if gradients are scaled.
            norm: norm of all gradients, averaged over processes.
            scaled: True in float16: the GradScaler handles gradient overflow, and because it synchronises with the
                device anyway, the skip is decided on the host.
        """
        # Shares of accumulated passes add up to the loss of the step, which is then averaged over processes.
        loss = torch.stack(self.losses).sum()
        # Terms are not divided: with accumulated passes it is their means that add up to the loss.
        weighted_S = torch.stack(self.weighted).mean(0) if self.weighted else loss.new_zeros(0)
        loss, weighted_S = shared_count(torch.cat([loss[None], weighted_S])).tensor_split([1])
        loss = loss[0]
        norm = torch.zeros_like(loss) if scaled else norm.to(loss)
        # The limit first, so that a loss is not compared with a window that contains it.
        limit = self.window.limit(loss.device)
        verdict = verdict_of(loss, norm, limit)
        self.window.take(loss, verdict)
        if not scaled:
            # torch's fused AdamW reads this attribute: 1 leaves weights, moments and its step count unchanged.
            optimizer.found_inf = (verdict > 0).float()  # type: ignore[attr-defined]
        elif int(verdict) > 0:
            optimizer.zero_grad(set_to_none=True)  # a parameter without gradient is not updated
        facts, ready = copy_to_host(torch.cat([torch.stack([verdict.float(), loss, limit]), weighted_S]))
        # A third-party module may list its terms without their values.
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
        """Read all but the latest `late` verdicts. All processes read the same ones at the same time.

        Raises:
            UserError: too many steps in a row were skipped (65).
        """
        while len(self.pending) > late:
            verdict = self.pending.popleft()
            # On a GPU the copy is `late` steps old, so there is hardly any wait.
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
        # Now, as the run may not reach its end.
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
    """Note in the run's folder that it has diverged, and return the error that ends it."""
    if trainer.is_global_zero:
        note_divergence(folder_of(trainer), step)
    return UserError(folder_of(trainer), what, HOW_ON, ExitCode.BAD_DATA)


def to_blame(reason: int, weighted: dict[str, float]) -> str:
    """Which terms of a step's loss made it spike or not finite, in words; "" if the loss has a single term, or if a
    gradient is the reason."""
    if reason == LOSS:
        lost = [name for name, value in weighted.items() if not math.isfinite(value)]
        return "of " + ", ".join(lost) if len(weighted) > 1 and lost else ""
    if reason == SPIKE and len(weighted) > 1:
        name = max(weighted, key=lambda name: weighted[name])
        return f"most of it {name}, {weighted[name]:.3g}"
    return ""


def copy_to_host(facts: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """A copy that the host can read, and a function that waits for it but not for later work on the device."""
    if facts.device.type != "cuda":
        return facts, lambda: None
    # Only a copy to pinned memory is asynchronous; the event tells when it is complete.
    copy = torch.empty(facts.shape, dtype=facts.dtype, pin_memory=True)
    copy.copy_(facts, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event.synchronize


def samples_of(trainer: L.Trainer, rows: list[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """The samples of the given rows: position in the training split, image id, origin. A streamed split has no rows by
    position: there the id is the hash in the batch, as 16 hex digits."""
    split = getattr(trainer.datamodule, "splits", {}).get("train")  # type: ignore[attr-defined]
    samples = []
    for index_B, ids in rows:
        # [B] or [B, P] -> the first image of each. A hash is signed in a tensor but unsigned as hex digits.
        for index, hashed in zip(index_B.tolist(), ids.reshape(len(ids), -1)[:, 0].tolist(), strict=True):
            row: Any = {}
            with suppress(Exception):  # the row itself may be the problem, or may be unavailable
                row = split[index] if split is not None else {}
            name = row.get("image_id") or ", ".join(row.get("image_ids", [])) or f"{hashed % 2**64:016x}"
            samples.append({"index": index, "image_id": str(name), "origin": str(row.get("origin", ""))})
    return samples
