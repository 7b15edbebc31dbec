"""Where a run resumes: finds the checkpoint in its folder (`newest_of`), and tells whether the folder is new,
interrupted or finished, and whether the command is the same."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from maskvlm.checkpoint.integrity import newest_valid, verify_checkpoint
from maskvlm.config.given_options import config_text
from maskvlm.config.safe_yaml import read_yaml
from maskvlm.training.attempts import BEFORE, check_attempts
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.launch import Finished
from maskvlm.utils.whole_files import read_json

FREE = (
    "run",
    "ckpt_path",
    "verbose",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.max_time",
    "trainer.profiler",
    "trainer.enable_progress_bar",
    "trainer.callbacks[StepGuard]",
    "trainer.callbacks[KeepState].init_args.background",
    "data.init_args.workers",
    "model.compile",
    "patience",
)
"""Settings that may differ when a run is resumed: what it runs on, and when it gives up. With the same number of
processes the losses are the same up to the rounding of sums. With another number each process also has other rows: it
draws dropout for them, uses the first of them for `masked_image_share` and `exchanged_share`, keeps its own queue of
negatives (a checkpoint has the first process's), and may miss some negatives of other processes (docs/gpus.md)."""
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
RECORD = "config-fit.yaml"
CHOOSE = "Choose another folder (--folder, or run=)"


def newest_of(folder: Path, composed: str, warn: Callable[[str], Any], origin: str | None = None) -> str | None:
    """The checkpoint from which a run in this folder resumes; None for a new run.

    Args:
        folder: the run's folder.
        composed: its configuration as YAML.
        warn: called with a message about newer checkpoints that are damaged.
        origin: another run's checkpoint that the command names; a run that started from it resumes like any other.

    Raises:
        Finished: the run is finished.
        UserError: the folder holds another run (73), its record of the settings is damaged (65), every checkpoint in it
            is damaged (77), or the run died too often in the same step (77).
    """
    if not may_go_on(folder, composed, origin):
        return None
    # Checked first: verifying a large checkpoint takes seconds.
    failed = check_attempts(folder)
    newest = newest_valid(folder, warn)
    # The newest checkpoint itself may be the cause of every failure.
    if failed.times >= BEFORE and newest is not None and newest.name == LAST and whole(folder / PREVIOUS):
        newest = folder / PREVIOUS
        warn(f"{folder}: died {failed.times} times in step {failed.step}; resuming from {PREVIOUS}, the one before")
    return None if newest is None else str(newest)


def may_go_on(folder: Path, composed: str, origin: str | None = None) -> bool:
    """Whether the folder holds this very run, unfinished; False if it holds none. Changes nothing.

    Raises: see `newest_of`.
    """
    record = folder / RECORD
    if origin is not None and has_begun(folder) and read_json(folder / "versions.json").get("origin") != origin:
        what = f"already holds a run, which did not start from {origin}"
        todo = f"{CHOOSE}, or leave --ckpt_path out to resume that run"
        raise UserError(folder, what, todo, ExitCode.CANNOT_CREATE)
    if not record.exists() and not any(folder.glob("*.ckpt")):
        return False
    if not record.exists():
        what = f"holds checkpoints but no {RECORD}: it is not a run of this project"
        raise UserError(folder, what, CHOOSE, ExitCode.CANNOT_CREATE)
    # The same settings, except those in FREE?
    changed = differences(recorded(record), read_yaml(composed, "configuration"))
    if changed and not has_begun(folder):
        return False
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        what = f"already holds a run with other settings ({'; '.join(changed[:3])}{more})"
        todo = f"{CHOOSE}, repeat the run's own command, or resume with these settings: --ckpt_path last"
        raise UserError(folder, what, todo, ExitCode.CANNOT_CREATE)
    end = finished(folder)
    if end is not None:
        raise Finished(f"{folder}: already finished at step {end}; use another folder (run=) for a new run")
    return True


def has_begun(folder: Path) -> bool:
    """Whether a run has left anything of its training: a checkpoint, metrics of a step, or a note of its end. A start
    that failed, for example because the processes cannot share a batch, only left its settings, and the corrected
    command may replace them."""
    figures = folder / "metrics.csv"
    has_figures = figures.is_file() and figures.stat().st_size > 0
    return has_figures or any(folder.glob("*.ckpt")) or finished(folder) is not None


def recorded(record: Path) -> dict[str, Any]:
    """The configuration with which a run was started.

    Raises:
        UserError: the file cannot be read or is damaged (65).
    """
    try:
        content = read_yaml(config_text(str(record)), str(record))
        if isinstance(content, dict):
            return content
        why = "it holds no `key: value` lines"
    except UserError as error:
        why = error.what
    todo = "Restore it, or resume with the same settings and --ckpt_path last, which writes it again"
    raise UserError(record, f"damaged ({why})", todo, ExitCode.BAD_DATA)


def whole(path: Path) -> bool:
    """Whether a checkpoint exists and is not damaged."""
    try:
        verify_checkpoint(path)
    except UserError:
        return False
    return True


def finished(folder: Path) -> int | None:
    """The last step of the run in this folder; None if it has not finished."""
    return _noted(folder, "finished", "step")


def asked_for(folder: Path) -> int | None:
    """The number of steps requested for a finished run, which may have stopped early because of its score; None if not
    recorded, as by older versions."""
    return _noted(folder, "finished", "of")


def diverged_at(folder: Path) -> int | None:
    """The step at which the run in this folder was ended for too many skipped steps; None for any other run."""
    return _noted(folder, "diverged", "step")


def _noted(folder: Path, event: str, key: str) -> int | None:
    try:
        return int(read_json(folder / "versions.json")[event][key])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def differences(was: Any, now: Any) -> list[str]:
    """Keys of a composed configuration that differ, with both values. Excludes keys in FREE, and options that did not
    exist when the run started and have their default now."""
    before, after = dict(_leaves(was)), dict(_leaves(now))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    # A free key covers all keys below it: `trainer.strategy.init_args.timeout`, `callbacks[StepGuard].init_args`.
    changed = [key for key in keys if not any(key == free or key.startswith((f"{free}.", f"{free}[")) for free in FREE)]
    changed = [key for key in changed if not _is_new(key, before, after)]
    return [f"{key.replace('init_args.', '')} was {before.get(key)}, is {after.get(key)}" for key in changed]


def _is_new(key: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a key is an option of the same class that an older version did not have, left at its default."""
    # The class that takes the option, as named in both configurations.
    parent, _, name = key.rpartition(".init_args.")
    path = before.get(f"{parent}.class_path")
    same = bool(parent) and path is not None and path == after.get(f"{parent}.class_path")
    if not parent and key.startswith("model."):  # of the LightningModule, which configurations do not name
        name, path, same = key.removeprefix("model."), "maskvlm.training.lit.LitModel", True
    # Each entry of a list has its own key: `betas[0]`.
    part = re.sub(r"^\w*", "", name)
    name, option = name.removesuffix(part), key.removesuffix(part)
    known = any(each == option or each.startswith((f"{option}[", f"{option}.")) for each in before)
    if known or path is None or not same:
        return False
    module, _, kind = path.rpartition(".")
    owner = getattr(sys.modules.get(module), kind, None)  # classes named by a command are imported by now
    parameter = inspect.signature(owner).parameters.get(name) if inspect.isclass(owner) else None
    default = parameter.default if parameter is not None else inspect.Parameter.empty
    # YAML has no tuples.
    leaves = dict(_leaves(list(default) if isinstance(default, tuple) else default, name))
    return name + part in leaves and bool(leaves[name + part] == after[key])


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _leaves(part, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list) and value:
        for name, part in _named(value):
            yield from _leaves(part, f"{key}[{name}]")
    else:
        yield key, value


def _named(parts: list[Any]) -> Iterator[tuple[str, Any]]:
    """Entries of a list, named by class if all classes differ, so that an added entry does not renumber the others."""
    paths = [part.get("class_path") if isinstance(part, dict) else None for part in parts]
    names = [str(path).rpartition(".")[2] for path in paths]
    by_class = None not in paths and len({*names}) == len(names)
    yield from ((names[place] if by_class else str(place), part) for place, part in enumerate(parts))
