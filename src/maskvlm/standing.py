"""How a run's folder stands: new, begun, interrupted or finished; whether the same command is what goes on with it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from maskvlm.errors import ExitCode, UserError
from maskvlm.stopped import Finished
from maskvlm.verify import newest_valid

FREE = (
    "run",
    "ckpt_path",
    "verbose",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.profiler",
    "trainer.enable_progress_bar",
    "data.init_args.workers",
    "patience",
)
"""What may differ when a run goes on: on what it runs. Losses stay what they are but for the rounding of sums."""


def newest_of(folder: Path, composed: str, warn: Callable[[str], Any]) -> str | None:
    """The checkpoint that a run in this folder goes on from; None where it begins.

    Args:
        folder: of the run.
        composed: its configuration as YAML.
        warn: told of newer checkpoints that are damaged.

    Raises:
        Finished: the run has come to its end.
        UserError: the folder holds another run (73), or every checkpoint in it is damaged (77).
    """
    record = folder / "config-fit.yaml"
    if not record.exists() and not any(folder.glob("*.ckpt")):
        return None
    choose = "Choose another folder (--run; RUN= with make)"
    if not record.exists():
        what = "holds checkpoints and no config-fit.yaml: it is no run of this project"
        raise UserError(folder, what, choose, ExitCode.CANNOT_CREATE)
    changed = differences(yaml.safe_load(record.read_text(encoding="utf-8")), yaml.safe_load(composed))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        what = f"already holds a run with other settings ({'; '.join(changed[:3])}{more})"
        todo = f"{choose}, repeat the run's own command, or go on with these settings by --ckpt_path last"
        raise UserError(folder, what, todo, ExitCode.CANNOT_CREATE)
    end = finished(folder)
    if end is not None:
        raise Finished(f"{folder}: finished at step {end}; another RUN begins anew")
    found = newest_valid(folder, warn)
    return None if found is None else str(found)


def finished(folder: Path) -> int | None:
    """The step that a run in this folder ended with; None where it has not ended."""
    try:
        return int(json.loads((folder / "versions.json").read_text())["finished"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def differences(was: Any, now: Any) -> list[str]:
    """Keys of a composed configuration that differ, with both values, but for those of FREE."""
    before, after = dict(_leaves(was)), dict(_leaves(now))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    changed = [key for key in keys if not any(key == free or key.startswith(f"{free}.") for free in FREE)]
    return [f"{key.replace('init_args.', '')} was {before.get(key)}, is {after.get(key)}" for key in changed]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _leaves(part, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list) and value:
        for number, part in enumerate(value):
            yield from _leaves(part, f"{key}[{number}]")
    else:
        yield key, value
