"""Whether a checkpoint holds the state of a run that can be resumed: position, loops, optimiser, callbacks.

Lightning restores these without checks, and silently starts a missing part from scratch. There is no written schema:
each part must look like its counterpart in what the present run itself would save.
"""

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor
from torch.optim import Optimizer

from maskvlm.config.plain_schema import describe_value
from maskvlm.objectives.task import Task
from maskvlm.utils.errors import ExitCode, UserError

LATER = ("dealt",)
"""Keys missing from the state of earlier versions; their readers do without them."""
TODO = "Resume from another checkpoint of the run, or start a new run --from this one"


def check_resumable(content: Mapping[str, Any], trainer: L.Trainer, optimizer: Optimizer, scheduler: Any) -> None:
    """Check a checkpoint against the run that would resume from it.

    Args:
        content: of the checkpoint.
        trainer: with its loops, callbacks and data, none of them restored yet.
        optimizer, scheduler: newly created by the run.

    Raises:
        UserError: a part, named in the message, is missing or has another form (65).
    """
    # What this run would save now: loops, schedule, position in the data, callbacks.
    data = trainer.datamodule  # type: ignore[attr-defined]
    wanted: dict[str, Any] = {"loops": {"fit_loop": trainer.fit_loop.state_dict()}, "epoch": 0, "global_step": 0}
    wanted["lr_schedulers"] = [scheduler.state_dict()]
    if data is not None and (state := data.state_dict()):
        wanted[type(data).__qualname__] = state
    saved = {each.state_key: state for each in trainer.callbacks if (state := each.state_dict())}  # type: ignore[attr-defined]
    callbacks = content.get("callbacks")
    # A callback that was added later has no state yet.
    known = {key: state for key, state in saved.items() if isinstance(callbacks, dict) and key in callbacks}
    wanted["callbacks"] = _any_number(known)
    where = str(trainer.ckpt_path)
    for key, part in wanted.items():
        if key not in content:
            raise _unfit(where, key, "is missing")
        check_like(part, content[key], f"{where}: {key}")
    check_optimizer(content.get("optimizer_states"), optimizer, where)


def check_like(wanted: Any, actual: Any, where: str) -> None:
    """Raise UserError (65) unless `actual` has every key of `wanted`, each with a value of the same type."""
    if isinstance(wanted, dict):
        if not isinstance(actual, dict):
            raise _unfit(where, "", f"expected a mapping, found {describe_value(actual)}")
        for key, part in wanted.items():
            if key not in actual and key in LATER:
                continue
            if key not in actual:
                raise _unfit(where, str(key), "is missing")
            check_like(part, actual[key], f"{where}.{key}")
    elif isinstance(wanted, list | tuple):
        # One that is empty now says nothing about its length.
        if type(actual) is not type(wanted) or (wanted and len(actual) != len(wanted)):
            kind = "tuple" if isinstance(wanted, tuple) else "list"
            raise _unfit(where, "", f"expected a {kind} of {len(wanted)}, found {describe_value(actual)}")
        for number, part in enumerate(wanted):
            check_like(part, actual[number], f"{where}[{number}]")
    elif isinstance(wanted, bool | int | str):
        # `type`, since True is an int. A count must not be negative, unless the run's own is.
        if type(actual) is not type(wanted) or (type(actual) is int and actual < min(0, int(wanted))):
            raise _unfit(
                where, "", f"expected a value such as {describe_value(wanted)}, found {describe_value(actual)}"
            )
    elif isinstance(wanted, float) and type(actual) not in (int, float):
        raise _unfit(where, "", f"expected a number, found {describe_value(actual)}")


def check_optimizer(states: Any, optimizer: Optimizer, where: str) -> None:
    """Raise UserError (65) unless the one state fits the optimiser's parameters, group by group and shape by shape."""
    if not isinstance(states, list) or len(states) != 1 or not isinstance(states[0], dict):
        raise _unfit(
            f"{where}: optimizer_states", "", f"expected the state of one optimiser, found {describe_value(states)}"
        )
    groups, state = states[0].get("param_groups"), states[0].get("state")
    own = optimizer.state_dict()["param_groups"]
    place = f"{where}: optimizer_states[0]"
    check_like(
        [{key: part for key, part in group.items() if key != "params"} for group in own], groups, f"{place}.groups"
    )
    assert isinstance(groups, list)
    # Parameters are numbered across all groups: the k-th number belongs to the optimiser's k-th parameter.
    numbers = [number for group in groups for number in (group.get("params") or ())]
    sizes = [[len(group["params"]) for group in own], [len(group.get("params") or ()) for group in groups]]
    if sizes[0] != sizes[1] or not isinstance(state, dict) or not set(state) <= set(numbers):
        raise _unfit(place, "", f"belongs to other parameters ({sizes[1]} in its groups, the model has {sizes[0]})")
    shapes = [value.shape for group in optimizer.param_groups for value in group["params"]]
    for number, shape in zip(numbers, shapes, strict=True):
        for name, value in (state.get(number) or {}).items():
            # Moments have their parameter's shape, the step count is a scalar.
            if not isinstance(value, Tensor) or value.shape not in (shape, ()):
                raise _unfit(place, f"state[{number}].{name}", f"expected a tensor {list(shape)}, found {_size(value)}")


def restore(task: Task, state: Any, where: str) -> None:
    """Restore a task's state other than weights. Raises UserError if it does not fit the task (65)."""
    known = isinstance(state, dict) and all(isinstance(x, Tensor) for x in state.values())
    if not known:
        raise _unfit(where, "task_state", f"expected tensors by name, found {describe_value(state)}")
    try:
        task.load_resume_state(state)
    except ValueError as error:
        raise _unfit(f"{where}: task_state", "", str(error)) from None


def _any_number(state: Any) -> Any:
    """The state of callbacks with each integer replaced by a float: a count that starts at 0 may later have any type
    and sign, such as the seconds of `trainer.max_time`."""
    if isinstance(state, dict):
        return {key: _any_number(part) for key, part in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(_any_number, state))
    return float(state) if type(state) is int else state


def _size(value: Any) -> str:
    return f"one of {list(value.shape)}" if isinstance(value, Tensor) else describe_value(value)


def _unfit(where: str, key: str, what: str) -> UserError:
    problem = f"{key} {what}" if key else what
    return UserError(where, f"holds no state that a run can resume from ({problem})", TODO, ExitCode.BAD_DATA)
