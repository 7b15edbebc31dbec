"""Private parts of Lightning that resuming a run relies on; a later version may change them.

`tests/training/test_lightning_private.py` checks that the installed version has them.
"""

from collections.abc import Callable
from typing import Any

import lightning as L


def replace_signal_handlers(trainer: L.Trainer, install: Callable[[], None]) -> None:
    """Replace Lightning's own signal handlers, which communicate with other processes and save within the handler."""
    trainer._signal_connector.register_signal_handlers = install  # type: ignore[method-assign]
    # With several processes Lightning asks before every batch, which costs a broadcast and a device synchronisation.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def batches_that_stepped(trainer: L.Trainer) -> int:
    """The step under which the row of this batch is logged. In `on_train_start` of a resumed run it is still the step
    of the last logged row, as Lightning only increments it later."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def count_last_step(trainer: L.Trainer) -> None:
    """Count the last step of a complete run: Lightning counts a step only when the next one begins."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def is_accumulating(trainer: L.Trainer) -> bool:
    """Whether gradients are still being accumulated, so that no optimiser step follows this batch."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def evaluate_after_whole_steps(trainer: L.Trainer) -> None:
    """Make evaluations during training follow the last pass of a step. Lightning counts passes, and would evaluate and
    save checkpoints between two passes whose gradients are accumulated."""
    every, passes = trainer.val_check_batch, trainer.accumulate_grad_batches
    # Infinite if the length is not known, or nothing is evaluated during training.
    if isinstance(every, int):
        # The last pass of a run ends a step, however many passes that step has.
        trainer.val_check_batch = int(min(-(-every // passes) * passes, trainer.num_training_batches))


def evaluation_is_due(trainer: L.Trainer) -> bool:
    """Whether an evaluation follows this batch."""
    assert trainer.fit_loop._data_fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


def evaluate_now(trainer: L.Trainer) -> None:
    """Run an evaluation before the first step, as if it followed the last one."""
    # As the loop's own `on_advance_end` does; from the start, as a task's counts are not part of a checkpoint.
    loop, results = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    first = results._first_loop_iter
    trainer.validating, loop.restarting = True, False
    loop.run()
    trainer.training, results._first_loop_iter = True, first


def reopen_pass(checkpoint: dict[str, Any]) -> bool:
    """Let a run with steps left keep training. To Lightning the run is one epoch, which had ended when this checkpoint
    was written, so nothing would follow.

    Returns:
        Whether training had ended there: an evaluation that follows is logged under the next step.
    """
    loops = checkpoint["loops"]["fit_loop"]
    passes = loops["epoch_progress"]
    # As in a checkpoint during training: started, and neither processed nor completed.
    for count in ("processed", "completed"):
        passes["total"][count] -= passes["current"][count]
        passes["current"][count] = 0
    # Also for a checkpoint that was written at the last batch, before the epoch had ended.
    loops["epoch_loop.batch_progress"]["is_last_batch"] = False
    # During training the last step is not counted yet, as its row is logged under it; Lightning counts it on resuming.
    counts, steps = loops["epoch_loop.state_dict"], checkpoint["global_step"]
    ended = bool(counts["_batches_that_stepped"] == steps)
    counts["_batches_that_stepped"] = steps - 1
    return ended


def judge_after_evaluations(callback: L.Callback) -> None:
    """Let `ModelCheckpoint` and `EarlyStopping` act as soon as an evaluation ends, including the last one, for which
    Lightning waits until the epoch is over. A run stopped in between would resume without its best weights, as an
    evaluation that is run again belongs to no epoch. A callback with an explicit setting keeps it."""
    for name in ("_save_on_train_epoch_end", "_check_on_train_epoch_end"):
        if getattr(callback, name, True) is None:
            setattr(callback, name, False)


def log_this_step(trainer: L.Trainer) -> None:
    """Pass what this step logged to the loggers, if it is due."""
    trainer._logger_connector.update_train_step_metrics()
