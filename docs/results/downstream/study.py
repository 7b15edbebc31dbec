r"""Fine-tunes tasks from a checkpoint, from random weights and blind, several seeds each, and prints the table.

    .venv/bin/python docs/results/downstream/study.py checkpoints/RUN/best.ckpt
    DATA_ROOT=... .venv/bin/python docs/results/downstream/study.py FROM --tasks vqa:daquar --ways pretrained blind \
        --model small --prefix real --blind-seeds 0 1 2

A run that is already there is read, not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

KEYS = {
    "retrieval": ("retrieval/tr_r1", "retrieval/ir_r1"),
    "vqa": ("vqa/accuracy",),
    "nlvr": ("nlvr/accuracy", "nlvr/consistency"),
    "entailment": ("entailment/accuracy",),
}
LEVELS = ("_majority", "_chance")
WAYS = {"pretrained": "", "random": "", "blind": "--model.task.blind true"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the checkpoint to start from")
    parser.add_argument("--tasks", nargs="+", default=list(KEYS), help="task, or task:DATA")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--blind-seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--args", default="", help="options of every run")
    parser.add_argument("--model", default="tiny", help="MODEL of the random start")
    parser.add_argument("--prefix", default="study", help="the runs are checkpoints/PREFIX-...")
    return parser.parse_args()


def run(task: str, way: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """The metrics of one run, made now if it is not there."""
    name, _, data = task.partition(":")
    data = data or "scenes"
    folder = f"{options.prefix}-{name}-{data}-{way}-{seed}"
    path = Path("checkpoints") / folder / "metrics.json"
    card = path.with_name("card.json")  # written last
    if not card.is_file():
        start = "random" if way == "random" else options.checkpoint
        words = f"--seed_everything {seed} {WAYS[way]} {options.args}"
        command = ["make", "finetune", f"TASK={name}", f"DATA={data}", f"FROM={start}", f"MODEL={options.model}"]
        command += [f"RUN={folder}", f"ARGS={words}", f"PYTHON={sys.executable}"]
        print(" ".join(command), file=sys.stderr, flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
    metrics: dict[str, float] = json.loads(path.read_text())
    return metrics


def cell(values: list[float]) -> str:
    """Mean, and the range of the seeds."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Run what is missing and print the table."""
    options = parse()
    print(f"| | level | {' | '.join(options.ways)} |\n|---|---|{'---|' * len(options.ways)}", flush=True)
    for task in options.tasks:
        seeds = {way: options.blind_seeds if way == "blind" else options.seeds for way in options.ways}
        found = {way: [run(task, way, seed, options) for seed in seeds[way]] for way in options.ways}
        for key in KEYS[task.partition(":")[0]]:
            some = next(iter(found.values()))[0]
            level = next((some[key + end] for end in LEVELS if some.get(key + end) is not None), None)
            cells = [cell([metrics[key] for metrics in runs]) for runs in found.values()]
            print(f"| {key} | {'' if level is None else f'{level:.1f}'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
