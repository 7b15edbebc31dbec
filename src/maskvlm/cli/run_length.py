"""The length of a run: steps or epochs, set by the data's keys or the trainer's, and checks of what must fit in it."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from jsonargparse import Namespace

from maskvlm.config.given_options import options
from maskvlm.data.sampler import check_limit
from maskvlm.training.optim import first_step
from maskvlm.utils.errors import UserError


def refuse_two_lengths(arguments: list[str]) -> None:
    """Raises UserError if the command line gives both steps and epochs, neither of them null."""
    values = {option.key: option.value for option in options(arguments)}
    both = [key for key in ("data.steps", "data.epochs") if values.get(key, "null") != "null"]
    if len(both) == 2:
        raise UserError(f"--{both[1]}", f"beside --{both[0]}", "Give one of the two")


def one_length(arguments: list[str]) -> list[str]:
    """The arguments; if steps or epochs are typed, the other, which a file may set, is cleared. A printed configuration
    therefore has one length, too."""
    values = {option.key: option.value for option in options(arguments)}
    for key, other in (("data.steps", "data.epochs"), ("data.epochs", "data.steps")):
        if values.get(key, "null") != "null" and other not in values:
            return [*arguments, f"--{other}=null"]
    return arguments


def set_length(settings: Namespace, typed: Collection[str] = ()) -> None:
    """Copy `trainer.max_steps` and `trainer.max_epochs` to the data's `steps` and `epochs`, which determine the sample
    order, the learning rate and the progress: a run cut short by the trainer alone would end at a high learning rate.

    Args:
        typed: keys that the command line gives; none may silently override another.

    Raises:
        UserError: two of them are given, or a number of steps or epochs below 1.
    """
    # A length in the data's keys and in the trainer's.
    beside = [key for key in ("data.steps", "data.epochs") if key in typed]
    length = [key for key in ("trainer.max_steps", "trainer.max_epochs") if key in typed]
    if beside and length:
        raise UserError(f"--{length[0]}", f"beside --{beside[0]}", "Give one of the two")
    trainer, data = settings.trainer, settings.data.get("init_args") or Namespace()
    passes = 1 if trainer.max_epochs is None else trainer.max_epochs
    if "steps" not in data or trainer.fast_dev_run:  # a third-party data module, or a trial run
        return
    if trainer.max_steps > 0 and passes != 1:
        raise UserError("trainer.max_steps", f"beside {passes} trainer.max_epochs", "Give one of the two")
    if passes < 1:
        what, todo = f"{passes} passes over the data", "Give 1 or more, or set data.steps"
        raise UserError("trainer.max_epochs", what, todo)
    if "trainer.max_steps" in typed and trainer.max_steps < 1 and trainer.max_steps != -1:
        raise UserError("trainer.max_steps", f"{trainer.max_steps} steps", "Give 1 or more, or -1 for no limit")
    if trainer.max_steps > 0:
        data.steps, data.epochs = trainer.max_steps, None
    # One pass is also what conf/base.yaml gives Lightning, whatever the length is.
    elif passes != 1 or ("trainer.max_epochs" in typed and trainer.max_epochs is not None):
        data.steps, data.epochs = None, float(passes)
    # Lightning sees a single epoch, which `data` ends. Its own epoch count is wrong once a run has resumed twice.
    trainer.max_steps, trainer.max_epochs = -1, 1


def check_interval(settings: Namespace) -> None:
    """Check the evaluation interval of a run whose length is given in steps, before the run writes anything.

    Raises:
        UserError: the interval is longer than the run (2).
    """
    trainer, data = settings.trainer, settings.data.get("init_args") or Namespace()
    batches = (data.get("steps") or 0) * trainer.accumulate_grad_batches
    evaluates = trainer.limit_val_batches != 0 and trainer.check_val_every_n_epoch is not None
    interval = trainer.val_check_interval
    if batches and evaluates and not trainer.fast_dev_run and isinstance(interval, int) and interval > batches:
        raise interval_too_long(interval, batches)


def check_trainer(settings: Namespace, typed: Collection[str] = ()) -> None:
    """Check trainer settings that a run, which Lightning sees as one epoch of samples that the data distributes, cannot
    follow.

    Args:
        typed: keys that the command line gives.

    Raises:
        UserError: evaluation in every nth epoch, which would never come; on a share of the batches (see
            `data.sampler.check_limit`); or Lightning's own distribution of samples (2).
    """
    trainer = settings.trainer
    if (epochs := trainer.check_val_every_n_epoch) not in (None, 1):
        what = f"{epochs}, but a run is one epoch of Lightning: it would never be evaluated"
        raise UserError("trainer.check_val_every_n_epoch", what, "Set trainer.val_check_interval instead")
    check_limit("trainer.limit_val_batches", trainer.limit_val_batches)
    check_limit("trainer.limit_test_batches", trainer.limit_test_batches)
    # On by default; it does nothing in a single process.
    if trainer.use_distributed_sampler and "trainer.use_distributed_sampler" in typed:
        what = "the data already distribute the samples over the processes"
        raise UserError("trainer.use_distributed_sampler", what, "Leave it false")


def check_warmup(settings: Namespace) -> None:
    """Check a warm-up given in steps: if too long, the run would end before it reaches its learning rate.

    Raises:
        UserError: the warm-up is longer than the run, or than the part after `contrast_first`, in which the other
            losses have a warm-up of their own (2).
    """
    steps, warmup = (settings.data.get("init_args") or Namespace()).get("steps"), settings.model.warmup
    if not steps or warmup < 1 or settings.trainer.fast_dev_run:
        return
    task = settings.model.get("task") or Namespace()
    # min: a share above 1 is the task's to refuse
    contrast_first = min((task.get("init_args") or Namespace()).get("contrast_first") or 0, 1)
    late = steps - first_step(contrast_first, steps)
    # Where no step is left for the other losses, LitModel says so.
    most = late or steps
    if warmup > most:
        what = f"the run has {steps} steps"
        if warmup <= steps:
            what += f", of which {late} are left for the losses that start after contrast_first"
        raise UserError("model.warmup", f"{warmup:g}, but {what}", f"Give at most {most}, or a share")


@contextmanager
def explain_interval_error() -> Iterator[None]:
    """Explain Lightning's error for a wrong evaluation interval of a run whose length is given in epochs: the number of
    batches is known only once the data is loaded.

    Raises:
        UserError: the interval is longer than the run (2).
    """
    try:
        yield
    except ValueError as error:
        match = re.search(r"`val_check_interval` \((\d+)\) must be .*? batches \((\d+)\)", str(error), re.DOTALL)
        if match is None:
            raise
        raise interval_too_long(int(match[1]), int(match[2])) from error


def interval_too_long(interval: int, batches: int) -> UserError:
    """The error for an evaluation interval longer than the run."""
    what, todo = f"{interval}, but the run has {batches} batches", f"Give at most {batches}, or 1.0: at the end"
    return UserError("trainer.val_check_interval", what, todo)
