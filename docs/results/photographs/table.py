r"""Pre-trains each row of the table on Flickr8k, reads what its run measured, and prints the table.

    .venv/bin/python docs/results/photographs/table.py              # ENCODERS and DATA_ROOT as make has them
    .venv/bin/python docs/results/photographs/table.py --rows contrast all-four --seeds 0 1 2

A run that is already there is read, not repeated. `cca` is a row of its own script, `cca.py`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

NO_MASKS = "--model.task.weight_mlm 0 --model.task.weight_mim 0"
CONTRAST = f"--model.task.weight_itm 0 {NO_MASKS} --model.task.contrast_first 0 --model.task.freeze_aligned false"
ROWS = {
    "frozen": ("compact", f"--model.backbone.image.frozen all --model.lr_encoders 0 {CONTRAST}"),
    "contrast": ("compact", CONTRAST),
    "contrast-longer": ("compact", f"--data.epochs 16 {CONTRAST}"),
    "contrast-matching": ("compact", NO_MASKS),
    "all-four": ("compact", ""),
    "scratch": ("small", ""),
}
"""Row -> MODEL and options. `contrast` makes the passes of `all-four`, `contrast-longer` about its time."""
COLUMNS = {
    "itc TR": ("retrieval/itc_tr_r1", "retrieval/itc_tr_r5", "retrieval/itc_tr_r10"),
    "itc IR": ("retrieval/itc_ir_r1", "retrieval/itc_ir_r5", "retrieval/itc_ir_r10"),
    "re-ranked TR": ("retrieval/tr_r1", "retrieval/tr_r5", "retrieval/tr_r10"),
    "re-ranked IR": ("retrieval/ir_r1", "retrieval/ir_r5", "retrieval/ir_r10"),
    "words, %": ("mlm/accuracy", "mlm/accuracy_wrong_image", "mlm/accuracy_no_image"),
    "pixels, squared error": ("mim/mse", "mim/mse_wrong_text", "mim/mse_no_text"),
}
"""Column -> metrics: R@1 / 5 / 10, or with the right partner / a wrong one / none."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", default="flickr8k", help="DATA of every run")
    parser.add_argument("--args", default="", help="options of every run")
    parser.add_argument("--prefix", default="photographs", help="the runs are checkpoints/PREFIX-...")
    return parser.parse_args()


def run(row: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """The metrics of one run, made now if it is not there."""
    model, words = ROWS[row]
    folder = f"{options.prefix}-{row}-{seed}"
    path = Path("checkpoints") / folder / "metrics.json"
    if not path.with_name("card.json").is_file():  # written last
        words = f"--seed_everything {seed} {words} {options.args}"
        command = ["make", "pretrain", f"MODEL={model}", f"DATA={options.data}", f"RUN={folder}", f"ARGS={words}"]
        command += [f"PYTHON={sys.executable}"]
        if model != "small" and "ENCODERS" in os.environ:
            command.append(f"ENCODERS={os.environ['ENCODERS']}")
        print(" ".join(command), file=sys.stderr, flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    metrics: dict[str, float] = json.loads(path.read_text())
    return metrics


def cell(names: tuple[str, ...], runs: list[dict[str, float]]) -> str:
    """Means of the seeds, side by side; empty where a row has no such head."""
    if any(names[0] not in metrics for metrics in runs):
        return ""
    digits = 4 if names[0].startswith("mim") else 1
    return " / ".join(f"{statistics.mean(metrics[name] for metrics in runs):.{digits}f}" for name in names)


def main() -> None:
    """Run what is missing and print the table."""
    options = parse()
    print(f"| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}", flush=True)
    for row in options.rows:
        runs = [run(row, seed, options) for seed in options.seeds]
        print(f"| {row} | {' | '.join(cell(names, runs) for names in COLUMNS.values())} |", flush=True)


if __name__ == "__main__":
    main()
