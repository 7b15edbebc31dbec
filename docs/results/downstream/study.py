r"""Fine-tunes tasks from a checkpoint, from random weights and with the image ablated, several seeds each, and writes
what they reached to `--out` as JSON, from which `docs/results/tables.py` makes tables.

With `pretrained` and `ablated` also what the image is worth: the difference of the seeds' means, paired by example,
with its 95 % interval (1.96 standard errors over the images).

    .venv/bin/python docs/results/downstream/study.py checkpoints/RUN/best.ckpt --out found.json
    DATA_ROOT=... .venv/bin/python docs/results/downstream/study.py FROM --tasks vqa:daquar --ways pretrained ablated \
        --model small --prefix real --ablated-seeds 0 1 2 --out found.json

A run that is already there is read, not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

KEYS = {
    "retrieval": ("retrieval/tr_r1", "retrieval/ir_r1"),
    "vqa": ("vqa/accuracy",),
    "nlvr": ("nlvr/accuracy", "nlvr/consistency"),
    "entailment": ("entailment/accuracy",),
    "captioning": ("captioning/cider", "captioning/bleu_4"),
}
LEVELS = ("_majority", "_chance")
WAYS = {"pretrained": "", "random": "", "ablated": "--model.task.image_ablation true"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the checkpoint to start from")
    accurate = ["retrieval", "vqa", "nlvr", "entailment"]  # captioning has a page's section, and steps, of its own
    parser.add_argument("--tasks", nargs="+", default=accurate, help="task, or task:DATA")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ablated-seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--args", default="", help="options of every run")
    parser.add_argument("--model", default="tiny", help="MODEL of the random start")
    parser.add_argument("--prefix", default="study", help="the runs are checkpoints/PREFIX-...")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/downstream.json"), help="what was found, as JSON")
    return parser.parse_args()


class Run(NamedTuple):
    """What a run measured. right: of each example of the validation split, by its id, 0 to 1. images: of each, their
    ids as one text; its own id where the file is of a version that kept none."""

    metrics: dict[str, float]
    right: dict[str, float]
    images: dict[str, str]


def run(task: str, way: str, seed: int, options: argparse.Namespace) -> Run:
    """One run, made now if it is not there."""
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
    predictions = path.with_name("predictions.jsonl")  # not of retrieval
    lines = [json.loads(line) for line in predictions.read_text().splitlines()] if predictions.is_file() else []
    judged = {line["id"]: line for line in lines if line.get("right") is not None}
    images = {key: " ".join(line.get("images", [key])) for key, line in judged.items()}
    return Run(json.loads(path.read_text()), {key: line["right"] for key, line in judged.items()}, images)


def worth(task: str, full: list[Run], ablated: list[Run]) -> dict[str, Any]:
    """What the image adds, in points: mean of all seeds and its interval, then seed by seed. The interval is over the
    images: questions about one photo are right and wrong together (a cluster-robust standard error)."""
    examples = sorted(full[0].right)
    with_N, without_N = (np.array([[each.right[key] for key in examples] for each in runs]) for runs in (full, ablated))
    difference_N = 100 * (with_N.mean(0) - without_N.mean(0))
    mean = difference_N.mean()
    _, image_N = np.unique([full[0].images[key] for key in examples], return_inverse=True)
    sums_I = np.bincount(image_N, weights=difference_N - mean)
    error = (len(sums_I) / (len(sums_I) - 1) * (sums_I**2).sum()) ** 0.5 / len(examples)
    by_seed = 100 * (with_N.mean(1) - without_N.mean(1)) if len(full) == len(ablated) else np.array([])
    interval = [mean - 1.96 * error, mean + 1.96 * error]
    return {"task": task, "points": mean, "interval": interval, "seeds": by_seed.tolist()}


def kinds(key: str, runs: dict[str, dict[int, Run]]) -> dict[str, dict[str, list[float]]]:
    """The same metric by kind of question: of each kind and way, the seeds' values."""
    found: dict[str, dict[str, list[float]]] = {}
    for way, by_seed in runs.items():
        for one in by_seed.values():
            for name, value in one.metrics.items():
                if name.startswith(f"{key}/"):
                    found.setdefault(name.removeprefix(f"{key}/"), {}).setdefault(way, []).append(value)
    return found


def main() -> None:
    """Run what is missing and write what was found; after each task, so that nothing is lost."""
    options = parse()
    metrics: list[dict[str, Any]] = []
    image: list[dict[str, Any]] = []
    for task in options.tasks:
        seeds = {way: options.ablated_seeds if way == "ablated" else options.seeds for way in options.ways}
        runs = {way: {seed: run(task, way, seed, options) for seed in seeds[way]} for way in options.ways}
        for key in KEYS[task.partition(":")[0]]:
            some = next(iter(next(iter(runs.values())).values())).metrics
            level = next((some[key + end] for end in LEVELS if some.get(key + end) is not None), None)
            reached = {way: {str(seed): one.metrics[key] for seed, one in made.items()} for way, made in runs.items()}
            metrics.append({"task": task, "metric": key, "level": level, "ways": reached, "kinds": kinds(key, runs)})
        # A caption is not right or wrong.
        if {"pretrained", "ablated"} <= runs.keys() and runs["pretrained"][options.seeds[0]].right:
            image.append(worth(task, *([*runs[way].values()] for way in ("pretrained", "ablated"))))
        found = {"from": options.checkpoint, "args": options.args, "metrics": metrics, "image": image}
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
