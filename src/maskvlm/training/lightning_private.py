"""Private parts of Lightning that a run which goes on needs: a later version may have others.

`tests/training/test_lightning_private.py` holds that the installed version has them.
"""

from collections.abc import Callable
from typing import Any

import lightning as L


def replace_signal_handlers(trainer: L.Trainer, install: Callable[[], None]) -> None:
    """Handlers in the place of Lightning's own, which speak to other processes and save within the handler."""
    trainer._signal_connector.register_signal_handlers = install  # type: ignore[method-assign]
    # Of several processes Lightning asks before every batch: a broadcast, and a wait for the device.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def batches_that_stepped(trainer: L.Trainer) -> int:
    """The step under which the row of this batch is logged. In `on_train_start` of a run that goes on it is still the
    step of the last row that was logged, as Lightning counts on later."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def count_last_step(trainer: L.Trainer) -> None:
    """Count the last step of a run that is complete: Lightning counts a step only when the next one begins."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def is_accumulating(trainer: L.Trainer) -> bool:
    """Whether the optimiser makes no step after this batch."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def evaluate_after_whole_steps(trainer: L.Trainer) -> None:
    """Evaluations along the way follow the last pass of a step: Lightning counts passes, and would evaluate, and keep
    checkpoints, between two passes whose gradients are added up."""
    every, passes = trainer.val_check_batch, trainer.accumulate_grad_batches
    # Infinite where the length is not known, or nothing is evaluated on the way.
    if isinstance(every, int):
        # The last pass of a run ends a step, however many passes that has.
        trainer.val_check_batch = int(min(-(-every // passes) * passes, trainer.num_training_batches))


def evaluation_is_due(trainer: L.Trainer) -> bool:
    """Whether an evaluation follows this batch."""
    assert trainer.fit_loop._data_fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


def evaluate_now(trainer: L.Trainer) -> None:
    """Make an evaluation before the first step, as if it followed the last one."""
    # As the loop's own `on_advance_end` does it; begun anew, as what a task has counted is in no checkpoint.
    loop, results = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    first = results._first_loop_iter
    trainer.validating, loop.restarting = True, False
    loop.run()
    trainer.training, results._first_loop_iter = True, first


def reopen_pass(checkpoint: dict[str, Any]) -> bool:
    """Let a run of which steps are left train on: to Lightning it is one pass over the data, which had ended when this
    checkpoint was written, and nothing would follow it.

    Returns:
        whether training had ended there: an evaluation that follows is logged under the step that comes next.
    """
    loops = checkpoint["loops"]["fit_loop"]
    passes = loops["epoch_progress"]
    # As in a checkpoint along the way: begun, and neither processed nor completed.
    for count in ("processed", "completed"):
        passes["total"][count] -= passes["current"][count]
        passes["current"][count] = 0
    # Also of one that was written at the last batch, before the pass had ended.
    loops["epoch_loop.batch_progress"]["is_last_batch"] = False
    # Along the way the last step is not counted yet, as its row is logged under it; Lightning does so when it goes on.
    counts, steps = loops["epoch_loop.state_dict"], checkpoint["global_step"]
    ended = bool(counts["_batches_that_stepped"] == steps)
    counts["_batches_that_stepped"] = steps - 1
    return ended


def judge_after_evaluations(callback: L.Callback) -> None:
    """Let `ModelCheckpoint` and `EarlyStopping` judge an evaluation when it ends, also the one at the end of the pass,
    for which Lightning waits until the pass is over: a run that is stopped in between would go on without its best
    weights, as an evaluation that is made again belongs to no pass. One that was told when to judge keeps to that."""
    for name in ("_save_on_train_epoch_end", "_check_on_train_epoch_end"):
        if getattr(callback, name, True) is None:
            setattr(callback, name, False)


def log_this_step(trainer: L.Trainer) -> None:
    """Hand what this step logged to the loggers, if it is its turn."""
    trainer._logger_connector.update_train_step_metrics()
