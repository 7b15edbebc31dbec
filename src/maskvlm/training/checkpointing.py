"""Writes a run's checkpoints, periodically and when the system asks it to stop; `resume.py` finds them again.

The same command resumes from the newest intact checkpoint and arrives at the same losses and weights, bit for bit on a
CPU, as an uninterrupted run: the position in the data is the number of batches consumed (`data/sampler.py`), random
numbers depend on (seed, batch) alone (`lit.py`), and an evaluation that was due or in progress is run again.
"""

import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from maskvlm.config.compose import same_command
from maskvlm.training.attempts import Attempt
from maskvlm.training.checkpoint_io import SafeCheckpointIO
from maskvlm.training.csv_log import RunLog
from maskvlm.training.lightning_private import (
    batches_that_stepped,
    count_last_step,
    evaluate_after_whole_steps,
    evaluate_now,
    evaluation_is_due,
    is_accumulating,
    log_this_step,
    reopen_pass,
    replace_signal_handlers,
)
from maskvlm.training.resume import LAST, PREVIOUS
from maskvlm.training.run_record import foreign_origin
from maskvlm.training.sharding import is_sharded, own_part
from maskvlm.utils.distributed import shared_count
from maskvlm.utils.errors import ExitCode, UserError, check_counts, check_least
from maskvlm.utils.launch import Stopped
from maskvlm.utils.lock import HELD
from maskvlm.utils.signals import CAUGHT, Agreement
from maskvlm.utils.write_errors import is_output_error

GO_ON, SAVE, STOP = 0, 1, 2  # requests of a process; all processes follow the largest


class KeepState(Checkpoint):
    """Keeps `last.ckpt` and the one before it, `previous.ckpt`, so that a lost process or file costs only minutes.

    A checkpoint is written at a fixed interval of steps or minutes, before and after each evaluation during training,
    and on SIGTERM, SIGUSR1 or Ctrl-C, after which the run ends with `Stopped`. Between two steps all processes agree on
    what to do.

    Args:
        folder: the run's folder.
        steps: optimiser steps between two checkpoints; None disables this rule.
        minutes: minutes between two checkpoints, by the clock of the first process; None disables this rule.
        background: keep training while a checkpoint is written, from a snapshot in host memory. There are at most two
            snapshots, each as large as the checkpoint, or up to twice as large for a GPU's state, as torch rounds
            pinned memory up to powers of two. Set to False if that memory is not available.
    """

    def __init__(
        self, folder: str, steps: int | None = 500, minutes: float | None = 10.0, background: bool = True
    ) -> None:
        check_counts(1, {"trainer.callbacks.steps": steps})
        check_least(0, {"trainer.callbacks.minutes": minutes})
        self.folder, self.steps, self.minutes, self.background = Path(folder), steps, minutes, background
        self.io = SafeCheckpointIO()  # the trainer's own, once that is known
        self.unmeasured = False  # an evaluation is due at this step and not yet done
        self.saved_at = time.monotonic()
        self.agree = lambda wish: wish
        self.shared_batches = 0
        self.ended = False  # training had ended at the step from which this run resumes
        self.passed_over = False  # the run resumes from a checkpoint other than last.ckpt, which must be kept
        self.reserved = False  # memory for the first snapshot was requested
        self.stops = False  # the run has been asked to stop
        self.attempt: Attempt | None = None
        self.restores_signals = True  # as soon as training ends, since the script continues

    # ------------------------------------------------------------------ state in a checkpoint

    def state_dict(self) -> dict[str, Any]:
        return {"unmeasured": self.unmeasured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.unmeasured = bool(state_dict["unmeasured"])

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Only for training: an evaluation reads the weights and resumes nothing."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        # Given more steps than before, or ended by a time limit. The length is only known with this project's data.
        if checkpoint["global_step"] < getattr(trainer.datamodule, "total_steps", 0):  # type: ignore[attr-defined]
            self.ended = reopen_pass(checkpoint)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            # A run with more patience than before keeps training; Lightning would restore the old value.
            if isinstance(callback, EarlyStopping) and callback.state_key in checkpoint["callbacks"]:
                checkpoint["callbacks"][callback.state_key]["patience"] = callback.patience
        for keeper in trainer.checkpoint_callbacks:
            if isinstance(keeper, ModelCheckpoint) and keeper.state_key in checkpoint["callbacks"]:
                own = foreign_origin(str(trainer.ckpt_path), self.folder) is None
                follow_folder(checkpoint["callbacks"][keeper.state_key], Path(str(keeper.dirpath)), own)

    # ------------------------------------------------------------------ start

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            todo = "Use Trainer(plugins=[SafeCheckpointIO()]), from maskvlm.training.checkpoint_io"
            raise UserError("KeepState", "the trainer does not write the checkpoints that this callback keeps", todo)
        replace_signal_handlers(trainer, CAUGHT.install)
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")  # it resumes exactly

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The process group exists by now; before that, and in a standalone evaluation, a process agrees with itself.
        self.agree, self.saved_at, self.stops = Agreement(), time.monotonic(), False
        # A strategy with its own checkpoint IO is left alone.
        if isinstance(trainer.strategy.checkpoint_io, SafeCheckpointIO):
            self.io = trainer.strategy.checkpoint_io
            if self.background:
                self.io.begin()
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.attempt = Attempt(self.folder)
        self.passed_over = bool(trainer.ckpt_path) and Path(str(trainer.ckpt_path)) != self.folder / LAST
        for logger in trainer.loggers:
            if isinstance(logger, RunLog) and trainer.is_global_zero and trainer.ckpt_path:
                # Rows logged after the checkpoint will be logged again.
                logger.forget(batches_that_stepped(trainer), self.unmeasured, self.ended)
        evaluate_after_whole_steps(trainer)
        # A checkpoint does not record that the run was ending, only for how long the score has not improved.
        if any(ended_by_score(callback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.should_stop = True
        if trainer.ckpt_path and trainer.is_global_zero:
            print(f"resuming after step {trainer.global_step} ({trainer.ckpt_path})", flush=True)
        if self.unmeasured:  # it was due when the checkpoint was written; Lightning would skip it
            if self.attempt is not None:  # so that an evaluation that kills the process is recorded too
                self.attempt.note(trainer.global_step)
            evaluate_now(trainer)
        # No steps are left: the end of the run is logged under the last one.
        if trainer.ckpt_path and trainer.fit_loop.done:
            count_last_step(trainer)

    # ------------------------------------------------------------------ between two steps

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.attempt is not None:
            # Before the step, so that one that kills the process is recorded.
            self.attempt.note(trainer.global_step + 1)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        try:
            self.on_train_end(trainer, pl_module)
        except Exception as error:  # reported in addition to what ends the run, not instead of it
            # If that is also a file that could not be written, one line says it all.
            written = isinstance(exception, UserError) and exception.code in (ExitCode.CANNOT_CREATE, ExitCode.IO_ERROR)
            if not written and not is_output_error(exception):
                print(f"warning: {error}", file=sys.stderr, flush=True)
        finally:
            self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and self.restores_signals:
            CAUGHT.restore()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.attempt is not None:
            self.attempt.close()
            self.attempt = None
        self.io.end()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # Between two accumulated passes no checkpoint is complete, as gradients are not saved. Anything that wants to
        # stop the run there, such as `trainer.max_time`, waits for the end of the step.
        self.stops |= trainer.should_stop
        trainer.should_stop = self.stops and not is_accumulating(trainer)
        if is_accumulating(trainer):
            return
        if not self.reserved and trainer.is_global_zero:
            # Now, because the first step creates the optimiser's state.
            self.reserved = True
            self.io.reserve(state_of(trainer))
        # Before the checkpoint is written, as it is part of its content.
        self.unmeasured = evaluation_is_due(trainer)
        # In every step of every process: if one left it out, the others would wait for it.
        agreed = self.agree(self._wish(trainer))
        if agreed or self.unmeasured or (self.steps and trainer.global_step % self.steps == 0):
            self.save(trainer)
        if agreed == STOP:
            raise self._stopped(trainer)

    def _wish(self, trainer: L.Trainer) -> int:
        HELD.check()
        self.io.check()
        if CAUGHT.count:
            return STOP
        # The first process's clock decides for all.
        late = self.minutes is not None and time.monotonic() - self.saved_at >= 60 * self.minutes
        return SAVE if late and trainer.is_global_zero else GO_ON

    def save(self, trainer: L.Trainer) -> None:
        """Write `last.ckpt`; the existing one becomes `previous.ckpt`, except in the first save of a run that resumed
        from another checkpoint. When saving in the background, this happens after the call returns.

        The row of this step is logged first, because a run that resumes from here does not repeat the step.

        Raises:
            UserError: a weight is not finite, or a write has failed; the existing files are unchanged.
        """
        check_finite(trainer, self.folder)
        if trainer.state.fn == TrainerFn.FITTING and trainer.training:
            log_this_step(trainer)
        previous = None if self.passed_over else self.folder / PREVIOUS
        trainer.save_checkpoint(self.folder / LAST, storage_options=previous)
        self.passed_over = False
        self.saved_at = time.monotonic()

    def _stopped(self, trainer: L.Trainer) -> Stopped:
        # No process exits before the file is written: torchrun ends the others when one does.
        self.io.finish()
        trainer.strategy.barrier("KeepState")
        signum = CAUGHT.last or int(signal.SIGTERM)  # another process got it
        name, path = signal.Signals(signum).name, self.folder / LAST
        how = same_command(self.folder)
        text = f"{name}: stopped after step {trainer.global_step}; {path} holds it: {how} resumes from there"
        return Stopped(text, signum)

    # ------------------------------------------------------------------ evaluation

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Processes evaluate different numbers of batches and can agree only while all of them have one.
        # The minimum over all processes, taken as the maximum of the negatives.
        self.shared_batches = -self.agree(-int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The checkpoint was written before the evaluation began."""
        if batch_idx < self.shared_batches and self.agree(STOP if CAUGHT.count else GO_ON) == STOP:
            raise self._stopped(trainer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.unmeasured = False
            if trainer.ckpt_path:  # the report of this evaluation names that file by its hash
                self.io.finish()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Checkpoint callbacks run last, in the configuration's order: the best checkpoint is written by now.
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.save(trainer)


def follow_folder(state: dict[str, Any], folder: Path, own: bool) -> None:
    """Update the paths in the state of `ModelCheckpoint` after a run's folder was moved. It stores full paths, and
    would start over in another folder, where the first score, however low, replaces the best weights.

    Args:
        state: of the callback, changed in place.
        folder: where the run's checkpoints are now.
        own: the state comes from this folder. A run that starts from another run's checkpoint has no best weights yet.
    """
    before = state.get("dirpath")
    if not before or Path(before) == folder:
        return
    here = {path: folder / Path(path).name for path in state.get("best_k_models", {})}
    best = here.get(state.get("best_model_path", ""))
    if not own or best is None or not best.exists():
        state["best_model_path"] = ""
        return
    state["dirpath"], state["best_model_path"] = str(folder), str(best)
    state["best_k_models"] = {str(here[path]): score for path, score in state["best_k_models"].items()}
    worst = state.get("kth_best_model_path", "")
    state["kth_best_model_path"] = str(here.get(worst, worst))


def ended_by_score(callback: Any) -> str | None:
    """Why an `EarlyStopping` has ended the run; None if it has not, or for any other callback."""
    if not isinstance(callback, EarlyStopping):
        return None
    if callback.wait_count >= max(1, callback.patience):
        return f"the {callback.monitor} no longer {'rose' if callback.mode == 'max' else 'fell'}"
    if callback.stopping_reason == EarlyStoppingReason.STOPPING_THRESHOLD:
        return f"the {callback.monitor} reached {callback.stopping_threshold}"
    return None


def state_of(trainer: L.Trainer) -> list[Tensor]:
    """The large tensors of a checkpoint: weights and optimiser state. Empty if they are sharded, as they are then
    gathered before they are saved."""
    weights = list(trainer.lightning_module.state_dict().values())
    if any(is_sharded(value) for value in weights):
        return []
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return [*weights, *moments]


def check_finite(trainer: L.Trainer, folder: Path) -> None:
    """Check the weights before they are written.

    Raises:
        UserError: some weights are infinite or NaN.
    """
    named = list(trainer.lightning_module.named_parameters())
    own = [own_part(value.detach()) for _, value in named]
    # With sharded weights each process sees only its own part: the mean is 1 if every process's part is finite. Whole
    # weights are the same everywhere, and after a run Lightning has moved them to the CPU, where NCCL cannot be used.
    of_all = shared_count if any(is_sharded(value) for _, value in named) else lambda flag_N: flag_N
    # A sum is finite only if every value is; on a CPU it costs a seventh of checking each one with `isfinite`.
    sums_N = torch.stack([value.sum(dtype=torch.float32) for value in own])
    if bool((of_all(sums_N.isfinite().float()) == 1).all()):  # one synchronisation, however many tensors
        return
    # The sum of finite values may overflow.
    finite_N = of_all(torch.stack([value.isfinite().all() for value in own]).float()) == 1
    if lost := [name for (name, _), finite in zip(named, finite_N.tolist(), strict=True) if not finite]:
        what = f"{len(lost)} of {len(named)} tensors are not finite at step {trainer.global_step} ({lost[0]}, ...)"
        todo = f"Lower model.lr or warm up longer; {LAST} is of an earlier step, and whole"
        raise UserError(folder, f"the training has diverged: {what}", todo)
