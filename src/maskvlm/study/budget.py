"""The number of steps that costs as many operations as another arm's run."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from maskvlm.config.compose import PRETRAINING, continued, read_words
from maskvlm.study.definition import Cell, Study
from maskvlm.utils.errors import UserError
from maskvlm.utils.whole_files import read_json, write_json

FLOPS = "flops.json"
STEPS = "data.steps"


def budget_in_steps(study: Study, cell: Cell, folder: Path) -> int | None:
    """The number of steps of a cell that gets another arm's operations; None for a cell whose options set it.

    Args:
        folder: folder of the study, where counts are cached.

    Raises:
        UserError: the other arm does not set its steps (2), or its operations could not be counted.
    """
    if not cell.flops_of:
        return None
    other = spent_by(study.cells, cell)
    steps = dict(other.options).get(STEPS) if other is not None else None
    if other is None or steps is None:
        todo = f"Give it {STEPS}, and an entry in the grid without flops_of"
        raise UserError(f"flops_of: {cell.flops_of}", "does not set its number of steps", todo)
    if not steps.isdigit():
        raise UserError(f"flops_of: {cell.flops_of}", f"{STEPS} is {steps}", "Give a whole number")
    starts = study.first is not None
    return max(1, round(int(steps) * flops_of(other, folder, starts) / flops_of(cell, folder, starts)))


def spent_by(cells: Sequence[Cell], cell: Cell) -> Cell | None:
    """The cell whose operations another one may spend: a cell of the arm in `flops_of`, preferably with the same
    fraction of the images; None if there is none.

    Raises:
        UserError: there are several, with different numbers of steps.
    """
    candidates = [one for one in cells if one.arm == cell.flops_of and not one.flops_of]
    candidates = [one for one in candidates if one.fraction == cell.fraction] or candidates
    if len({dict(one.options).get(STEPS) for one in candidates}) > 1:
        what = f"has cells with other numbers of steps: {', '.join(one.name for one in candidates)}"
        raise UserError(f"flops_of: {cell.flops_of}", what, f"Give it one {STEPS} for that many pairs")
    return candidates[0] if candidates else None


def flops_of(cell: Cell, folder: Path, starts: bool) -> int:
    """Operations of a training step of a cell, averaged over its run, counted once by `maskvlm bench` and cached.

    Args:
        starts: whether its runs start from another run of the study. That run may not exist yet, so the settings that
            such a start adds are applied to the command's own model.

    Raises:
        UserError: the bench failed.
    """
    path = folder / FLOPS
    known: dict[str, int] = read_json(path)
    options = [f"--{key}={value}" for key, value in cell.options if key != STEPS]
    # Not on the machine of the runs: the one that submits them may have no GPU, and operations are the same on all.
    words = [word for word in cell.run[1:] if not word.startswith("where=")]
    if starts:
        options = [*continued(read_words(cell.run[0], words, PRETRAINING)), *options]
    key = json.dumps([*words, *options])
    if key not in known:
        known[key] = _counted([*words, *options])
        write_json(path, known)
    return known[key]


def _counted(words: Sequence[str]) -> int:
    # These depend on the steps of the run, which the bench is not given, so it might find them too long.
    words = [word for word in words if not word.startswith(("--trainer.val_check_interval=", "--model.warmup="))]
    print(f"counting the operations of a step: {' '.join(words)}", flush=True)
    command = [sys.executable, "-m", "maskvlm", "bench", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError("study", f"maskvlm bench {' '.join(words)}: {last.removeprefix('error: ')}"[:500], "Fix that")
    report = json.loads(done.stdout.strip().splitlines()[-1])
    flops: int = report["flops"]
    return flops
