r"""Two commands with the same RUN at once: one must train, the other must report that.

    PYTHONPATH=src:. python bench/lock.py --trials 50

The second starts at random 0 to 3 seconds after the first, in every fifth trial at the same moment. Each is forked from
this process, which has everything imported. Every trial must give exit statuses 0 and 73, one line from the rejected
command that names the other process, a metrics.csv with every step once and in order, and a last checkpoint of the last
step.
"""

import argparse
import csv
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from bench.kills import command, fork, wait
from maskvlm.checkpoint.io import load

STEPS, LATEST = 120, 3.0  # steps, which take longer than the second command is late at most, in seconds


def trial(folder: Path, late: float) -> tuple[list[int], str]:
    """Run a pair of commands; returns the exit statuses and what is wrong, "" if nothing is."""
    arguments = command(folder, 0, (f"--data.steps={STEPS}", "--trainer.val_check_interval=60"))
    logs = [folder.parent / f"{folder.name}-{name}.txt" for name in ("first", "second")]
    first = fork(arguments, log=logs[0])
    time.sleep(late)
    children = (first, fork(arguments, log=logs[1]))
    codes = [wait(child) for child in children]
    # In either order: the second one may have been faster.
    if sorted(codes) != [0, 73]:
        return codes, f"exits {codes}: {logs[codes.index(max(codes))].read_text()[-300:]}"
    trained = codes.index(0)
    # The rejected command prints a single line that names the process that trains.
    output = logs[1 - trained].read_text()
    beginning = f"error: {folder}: another process is training here (process {children[trained]} on "
    if output.count("\n") != 1 or not output.startswith(beginning):
        return codes, f"the one refused said {output[-300:]!r}"
    with (folder / "metrics.csv").open(newline="") as file:
        # Each step once and in order: two runs that write to one file would show here.
        steps = [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")]
    if steps != [*range(STEPS)]:
        return codes, f"metrics.csv has {len(steps)} rows of {STEPS} steps"
    last = load(folder / "last.ckpt")["global_step"]
    return codes, "" if last == STEPS else f"last.ckpt is of step {last}"


def trials(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Counts of exit statuses, the first command's first, and what went wrong."""
    chance, counts = random.Random(seed), Counter[str]()
    wrong: list[str] = []
    for number in range(count):
        late = chance.uniform(0.0, LATEST) if number % 5 else 0.0  # every fifth at the same moment
        codes, what = trial(folder / f"run{number}", late)
        counts[f"exits {codes}"] += 1
        if what:
            wrong.append(f"run{number}, {late:.2f} s late: {what}")
    return {"counts": dict(counts), "wrong": wrong}


def main() -> int:
    """Returns the exit status: 1 if a trial went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        summary = trials(Path(scratch), options.trials, options.seed)
    print(yaml.safe_dump(summary, sort_keys=False, width=200), end="")
    print(f"{len(summary['wrong'])} wrong of {options.trials}")
    return int(bool(summary["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
