"""The length of a run: steps or passes, given in the data's keys or in the trainer's, and what has to fit in it."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from jsonargparse import Namespace

from maskvlm.config.given_options import options
from maskvlm.utils.errors import UserError


def refuse_two_lengths(arguments: list[str]) -> None:
    """Raises UserError where the command line gives both steps and passes, neither of them null."""
    values = {option.key: option.value for option in options(arguments)}
    both = [key for key in ("data.steps", "data.epochs") if values.get(key, "null") != "null"]
    if len(both) == 2:
        raise UserError(f"--{both[1]}", f"beside --{both[0]}", "Give one of the two")


def one_length(arguments: list[str]) -> list[str]:
    """The arguments; where steps or passes are typed, the other one, which a file may set, is cleared. So a
    configuration that is printed has one length, too."""
    values = {option.key: option.value for option in options(arguments)}
    for key, other in (("data.steps", "data.epochs"), ("data.epochs", "data.steps")):
        if values.get(key, "null") != "null" and other not in values:
            return [*arguments, f"--{other}=null"]
    return arguments


def set_length(settings: Namespace, typed: Collection[str] = ()) -> None:
    """`trainer.max_steps` and `trainer.max_epochs` as the data's `steps` and `epochs`, which the sample order, the
    learning rate and the progress follow: a run that the trainer alone cut short would end at a high rate.

    Args:
        typed: keys that the command line gives, of which none may be beaten by another without a word.

    Raises:
        UserError: two of them are given, or a number of passes below 1.
    """
    # The same length in the data's keys and in the trainer's.
    beside = [key for key in ("data.steps", "data.epochs") if key in typed]
    length = [key for key in ("trainer.max_steps", "trainer.max_epochs") if key in typed]
    if beside and length:
        raise UserError(f"--{length[0]}", f"beside --{beside[0]}", "Give one of the two")
    trainer, data = settings.trainer, settings.data.get("init_args") or Namespace()
    passes = 1 if trainer.max_epochs is None else trainer.max_epochs
    if "steps" not in data or trainer.fast_dev_run:  # a data module of somebody else's, or a trial
        return
    if trainer.max_steps > 0 and passes != 1:
        raise UserError("trainer.max_steps", f"beside {passes} trainer.max_epochs", "Give one of the two")
    if passes < 1:
        what, todo = f"{passes} passes over the data", "Give a number from 1 on, or data.steps"
        raise UserError("trainer.max_epochs", what, todo)
    if trainer.max_steps > 0:
        data.steps, data.epochs = trainer.max_steps, None
    elif passes != 1:
        data.steps, data.epochs = None, float(passes)
    # Lightning sees one epoch; `data` ends it. Its own count of epochs is wrong once a run has resumed twice.
    trainer.max_steps, trainer.max_epochs = -1, 1


def check_interval(settings: Namespace) -> None:
    """Check the evaluation interval of a run whose length is given in steps, before anything of it is written.

    Raises:
        UserError: an evaluation was asked for after more steps than there are (2).
    """
    trainer, data = settings.trainer, settings.data.get("init_args") or Namespace()
    batches = (data.get("steps") or 0) * trainer.accumulate_grad_batches
    evaluates = trainer.limit_val_batches != 0 and trainer.check_val_every_n_epoch is not None
    interval = trainer.val_check_interval
    if batches and evaluates and not trainer.fast_dev_run and isinstance(interval, int) and interval > batches:
        raise interval_too_long(interval, batches)


def check_warmup(settings: Namespace) -> None:
    """The same of a warm-up that is given in steps: the run would end before it has its rate.

    Raises:
        UserError: it is longer than the run (2).
    """
    steps, warmup = (settings.data.get("init_args") or Namespace()).get("steps"), settings.model.warmup
    if steps and warmup >= 1 and warmup > steps and not settings.trainer.fast_dev_run:
        raise UserError(
            "model.warmup", f"{warmup:g}, but the run has {steps} steps", f"Give at most {steps}, or a share"
        )


@contextmanager
def explain_interval_error() -> Iterator[None]:
    """The same of a run whose length is given in passes: Lightning knows its batches only once the data is there.

    Raises:
        UserError: an evaluation was asked for after more steps than there are (2).
    """
    try:
        yield
    except ValueError as error:
        match = re.search(r"`val_check_interval` \((\d+)\) must be .*? batches \((\d+)\)", str(error), re.DOTALL)
        if match is None:
            raise
        raise interval_too_long(int(match[1]), int(match[2])) from error


def interval_too_long(interval: int, batches: int) -> UserError:
    """An evaluation after more batches than a run has."""
    what, todo = f"{interval}, but the run has {batches} batches", f"Give at most {batches}, or 1.0: at the end"
    return UserError("trainer.val_check_interval", what, todo)
