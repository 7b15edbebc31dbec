r"""Compares the built-in training step with that of another checkout: pairs per second of each, and their ratio.

    git worktree add ../before 89274c0
    OMP_NUM_THREADS=1 python bench/step.py --against ../before --repeats 7

Both train the four losses and the word loss of 89274c0's built-in recipe; later additions to the recipe are turned off.
Ratios are computed within a round, as the load of the machine varies.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]
FILES = ("base", "pretrain", "model/tiny", "pretrain-tiny", "data/scenes")
SINCE = {
    "data.source.relations": "0",
    "model.task.weight_spread": "0",
    "model.task.text_mask_most": "null",
    "model.task.text_masking": "null",
    "model.task.masks_per_text": "1",
    "model.task.image_learns": "1",
    "model.backbone.text.name": "bert",
    "model.task.decoder_positions": "false",
    "model.backbone.query_positions": "false",
}


def pairs_a_second(checkout: Path, options: list[str]) -> float:
    """Pairs per second, measured by a bench of 25 steps in its own process."""
    files = [word for name in FILES for word in ("-c", f"conf/{name}.yaml")]
    done = subprocess.run(
        [sys.executable, "-m", "maskvlm", "bench", *files, *options],
        capture_output=True, text=True, cwd=checkout, env=os.environ | {"PYTHONPATH": "src"},
    )  # fmt: skip
    match = re.search(r"([\d.]+) pairs/s", done.stdout)
    if match is None:
        raise SystemExit(f"{checkout}: {done.stderr.strip().splitlines()[-1:] or done.stdout}")
    return float(match[1])


def main() -> None:
    """Measure in turn and print the median of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="another checkout, such as a git worktree")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    since = [word for name, value in SINCE.items() for word in (f"--{name}", value)]
    ratios = []
    for number in range(options.repeats):
        before, now = pairs_a_second(options.against, []), pairs_a_second(HERE, since)
        ratios.append(now / before)
        print(f"{number + 1}: {before:.1f} and {now:.1f} pairs/s, {ratios[-1]:.3f} times as fast", flush=True)
    print(f"median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
