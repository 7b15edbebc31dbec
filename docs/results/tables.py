"""`python docs/results/tables.py`: write the tables of docs/results/index.md anew, from the `metrics.json` of runs and
the `runs.csv` of a study. A test holds that the page is what this writes."""

import io
import json
import re
from pathlib import Path

import pandas as pd
from rich.console import Console

from maskvlm.reporting.metric_tables import metrics_table

RESULTS = Path(__file__).parent
PAGE = RESULTS / "index.md"
TABLE = re.compile(r"(<!-- (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""A table of the page, between two comments: the first one names the file that it is made from."""


def metrics_lines(path: Path) -> str:
    """What a run printed at its end, as a block of text."""
    console = Console(width=88, file=io.StringIO(), force_terminal=False)
    console.print(metrics_table(json.loads(path.read_text(encoding="utf-8"))))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    return "\n".join(["```text", *lines, "```"])


def study_table(path: Path) -> str:
    """Means of a study's metrics over the seeds, a row for each cell, in Markdown."""
    runs = pd.read_csv(path)
    measured = [name for name in runs if name.startswith("study: ")]
    means, seeds = runs.groupby("cell")[measured].mean(), runs.groupby("cell").size()
    rows = [["", "seeds", *(name.removeprefix("study: ") for name in measured)], ["---"] * (len(measured) + 2)]
    rows += [[str(cell), str(seeds[cell]), *(f"{value:.2f}" for value in means.loc[cell])] for cell in means.index]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def filled(text: str) -> str:
    """The text of the page with its tables made anew."""

    def table(found: re.Match[str]) -> str:
        path = RESULTS / found[2]
        made = metrics_lines(path) if path.suffix == ".json" else study_table(path)
        return f"{found[1]}{made}\n{found[3]}"

    return TABLE.sub(table, text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
