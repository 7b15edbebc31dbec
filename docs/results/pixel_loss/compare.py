"""Draw how much better masked pixels are filled in with the right caption than with a wrong one, run by run.

python docs/results/pixel_loss/compare.py OUT.png NAME=RUN_FOLDER NAME=RUN_FOLDER ...
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from maskvlm.reporting.curves import COLOURS, read_rows, series

PANELS = {
    "mse": "squared error, all masked pixels",
    "l1": "absolute error, all masked pixels",
    "object_mse": "squared error, hidden objects alone",
    "object_l1": "absolute error, hidden objects alone",
}


def main(out: str, *runs: str) -> None:
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for colour, run in zip(COLOURS, runs, strict=False):
            name, folder = run.split("=", 1)
            rows = read_rows(Path(folder) / "metrics.csv")
            steps, right = series(rows, f"mim/{key}")
            wrong = series(rows, f"mim/{key}_wrong_text")[1]
            gain = [100 * (1 - ours / theirs) for ours, theirs in zip(right, wrong, strict=True)]
            axes.plot(steps, gain, "o-", color=colour, markersize=3.5, label=f"{name}: {gain[-1]:.1f} % at the end")
        axes.axhline(0, color="black", linewidth=0.8, linestyle="--")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel("lower with the right caption, %", fontsize=8)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
