"""`python docs/results/tables.py`: write the tables of the results pages anew, from the `metrics.json` of runs (of one
or of several seeds), the `runs.csv` of a study, the `result.json` of suites, and what `inference/measure.py` and
`downstream/study.py` found. A test holds that the pages are what this writes."""

import io
import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
from rich.console import Console

from maskvlm.reporting.metric_tables import metrics_table

RESULTS = Path(__file__).parent
PAGES = tuple(
    RESULTS / name
    for name in (
        "index.md", "suites/README.md", "inference/README.md", "downstream/README.md", "photographs/README.md",
    )
)  # fmt: skip
TABLE = re.compile(r"(<!-- (\S+\.(?:json|csv)) ?(\w*) -->\n).*?(<!-- end -->)", re.DOTALL)
"""A table of a page, between two comments: the first one names the file that it is made from, and may say which of
several tables it is."""


def metrics_lines(path: Path) -> str:
    """What a run printed at its end, as a block of text."""
    console = Console(width=88, file=io.StringIO(), force_terminal=False)
    console.print(metrics_table(json.loads(path.read_text(encoding="utf-8"))))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    return "\n".join(["```text", *lines, "```"])


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its heading."""
    heading, *others = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, ["---"] * len(heading), *others])


def study_table(path: Path) -> str:
    """Means of a study's metrics over the seeds, a row for each cell."""
    runs = pd.read_csv(path)
    measured = [name for name in runs if name.startswith("study: ")]
    means, seeds = runs.groupby("cell")[measured].mean(), runs.groupby("cell").size()
    rows = [["", "seeds", *(name.removeprefix("study: ") for name in measured)]]
    rows += [[str(cell), str(seeds[cell]), *(f"{value:.2f}" for value in means.loc[cell])] for cell in means.index]
    return markdown(rows)


def runs_table(found: dict[str, dict[str, str]], folder: Path) -> str:
    """Recall, words and pixels of runs of one recipe, their mean, and then of other runs, a row each.

    Args:
        found: `runs` and `others`, each with the name of a row and the file of the run's metrics.
        folder: where these files are.
    """

    def metrics_of(group: str) -> dict[str, dict[str, float]]:
        return {name: json.loads((folder / file).read_text(encoding="utf-8")) for name, file in found[group].items()}

    def recalls(metrics: dict[str, float], way: str) -> str:
        values = [metrics.get(f"retrieval/{way}_r{k}") for k in (1, 5, 10)]
        return " / ".join(f"{value:.1f}" for value in values if value is not None)

    runs = metrics_of("runs")
    keys = next(iter(runs.values()))
    runs[f"**mean of {len(runs)} seeds**"] = {key: mean(run[key] for run in runs.values()) for key in keys}
    rows = [["R@1 / 5 / 10", "contrast: captions", "image", "re-ranked: captions", "image", "words", "pixels"]]
    for name, metrics in (runs | metrics_of("others")).items():
        row = [name, *(recalls(metrics, way) for way in ("itc_tr", "itc_ir", "tr", "ir"))]
        if "mlm/accuracy" in metrics:
            right, wrong = metrics["mlm/accuracy"], metrics["mlm/accuracy_wrong_image"]
            row += [f"+{right - wrong:.1f} ({right:.1f} / {wrong:.1f})", f"+{metrics['mim/mse_gain']:.1f} %"]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return markdown(rows)


def suite_table(found: dict[str, Any]) -> str:
    """A row for each way of scoring, with the 95 % intervals; figures of single kinds or classes are left out."""
    # The report indents them below the figures that are about all items.
    names = [name for name in next(iter(found["metrics"].values())) if not name.startswith(" ")]

    def heading(name: str) -> str:
        chance = next(iter(found["metrics"].values()))[name]["chance"]
        return name if chance is None else f"{name} (chance {chance:.1f})"

    def cell(value: float, interval: list[float] | None) -> str:
        return f"{value:.1f}" + ("" if interval is None else f" ({interval[0]:.1f} to {interval[1]:.1f})")

    rows = [[f"{found['items']:,} items", *map(heading, names)]]
    for way, figures in found["metrics"].items():
        rows.append([f"`{way}`", *(cell(figures[name]["value"], figures[name]["interval"]) for name in names)])
    return markdown(rows)


def share_tables(found: dict[str, Any]) -> dict[str, str]:
    """Of `inference/measure.py`: what the methods find, and how three of them judge the same pairs of texts."""
    rows, by_text = [["method", "question", "right", "by chance"]], {}
    for one in found["shares"]:
        right = f"{100 * one['right'] / one['of']:.1f} %"
        if one["method"] in ("match", "cosine"):
            by_text[one["question"]].append(right)
            continue
        if one["method"] == "score":
            by_text[one["question"]] = [f"{one['question']}, of {one['of']}", right]
            continue
        chance = "" if one["chance"] is None else f"{one['chance']:.1f}"
        rows.append([f"`{one['method']}`", one["question"], f"{right} of {one['of']}", chance])
    heading = ["prefers", "`score`", "`match`", "cosine"]
    return {"methods": markdown(rows), "wordings": markdown([heading, *by_text.values()])}


def fine_tuning_tables(found: dict[str, Any]) -> dict[str, str]:
    """Of `downstream/study.py`: means and ranges of the seeds, what the image adds, and means by kind of question."""

    def cell(by_seed: dict[str, float] | None) -> str:
        values = [*(by_seed or {}).values()]
        if len(values) < 2:
            return "".join(f"{value:.1f} (one seed)" for value in values)
        return f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    ways = list(dict.fromkeys(way for row in found["metrics"] for way in row["ways"]))
    rows = [["", "by chance", *ways]]
    for row in found["metrics"]:
        level = "" if row["level"] is None else f"{row['level']:.1f}"
        rows.append([f"{row['task']}, `{row['metric']}`", level, *(cell(row["ways"].get(way)) for way in ways)])
    adds = [["", "what the image adds, points (95 %)", "seed by seed"]]
    for row in found["image"]:
        low, high = row["interval"]
        seeds = ", ".join(f"{seed:+.1f}" for seed in row["seeds"])
        adds.append([row["task"], f"{row['points']:+.1f} ({low:+.1f} to {high:+.1f})", seeds])
    kinds = [["", "kind", "by chance", *ways]]
    for row in found["metrics"]:
        for kind, by_way in row["kinds"].items():
            if kind.endswith("_majority"):
                continue
            means = [f"{mean(by_way[way]):.1f}" if way in by_way else "" for way in ways]
            level = row["kinds"].get(f"{kind}_majority", {}).get(ways[0])
            kinds.append([row["task"], kind, f"{mean(level):.1f}" if level else "", *means])
    return {"metrics": markdown(rows), "image": markdown(adds), "kinds": markdown(kinds)}


def table_of(path: Path, part: str = "") -> str:
    """The table of a file, by what is in it. part: which one, of a file that has several.

    Raises:
        ValueError: the file is none of those that this reads.
    """
    if path.suffix == ".csv":
        return study_table(path)
    found = json.loads(path.read_text(encoding="utf-8"))
    if "suite" in found:
        return suite_table(found)
    if "shares" in found:
        return share_tables(found)[part]
    if "image" in found:
        return fine_tuning_tables(found)[part]
    if "runs" in found:
        return runs_table(found, path.parent)
    if "retrieval/tr_r1" in found:
        return metrics_lines(path)
    raise ValueError(f"{path}: no metrics of a run, no result of a suite, and no shares of measure.py or study.py")


def filled(text: str) -> str:
    """The text of a page with its tables made anew."""
    return TABLE.sub(lambda found: f"{found[1]}{table_of(RESULTS / found[2], found[3])}\n{found[4]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
