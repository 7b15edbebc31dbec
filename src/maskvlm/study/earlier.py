"""Runs made elsewhere: the rows of a page's `runs.csv`, so that a study can continue on another machine."""

import csv
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from maskvlm.config.safe_yaml import cut
from maskvlm.study.runs import StudyRun
from maskvlm.utils.errors import ExitCode, UserError

PAGE = "README.md"
RUNS = "runs.csv"
RUN_SHA256 = "run_sha256"
REMARK = "remark"
FACTS = ("run", "cell", "arm", "fraction", "seed", "hours", RUN_SHA256, "metrics_sha256", REMARK)
"""Columns of `runs.csv` that describe a run; its metrics follow them."""
OF_STUDY = "study: "
"""Prefix of a study's own metrics in `runs.csv`; the others are keys of metrics.json."""
MOST = 50_000_000  # maximum size of the file in bytes


class Outcome(NamedTuple):
    """Outcome of a run that is over.

    Attributes:
        hours: time that its processes took; NaN if unknown.
        metrics: content of its metrics.json. sha256: hash of that file.
        remark: as `StudyRun.remark`.
    """

    hours: float
    metrics: Mapping[str, float]
    sha256: str
    remark: str


def check_page(folder: Path) -> None:
    """Refuse a folder whose README.md is not a study's page, before it would be overwritten.

    Raises:
        UserError: there is a README.md without a `runs.csv`, which every page has (73).
    """
    if (folder / PAGE).exists() and not (folder / RUNS).exists():
        what = "is not the page of a study, and would be overwritten"
        raise UserError(folder / PAGE, what, "Give --page a folder of its own", ExitCode.CANNOT_CREATE)


def earlier_runs(page: Path, runs: Sequence[StudyRun]) -> dict[str, Outcome]:
    """Outcomes of a study's runs in the `runs.csv` of a page's folder, by name. Rows of other runs, or of the same name
    but another command, are left out with a note.

    Raises:
        UserError: the file is not such a table (65).
    """
    path = page / RUNS
    if not path.is_file():
        return {}
    todo = "Use a runs.csv that a study has written, or another folder for the page"
    if path.stat().st_size > MOST:
        raise UserError(path, f"is larger than {MOST // 10**6} MB", todo, ExitCode.BAD_DATA)
    wanted, others = {run.name: run.sha256 for run in runs}, list[str]()
    outcomes: dict[str, Outcome] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            columns = list(table.fieldnames or ())
            if not columns:  # the page was written before any run had finished
                return {}
            missing = [name for name in ("run", "hours", "metrics_sha256") if name not in columns]
            if missing:
                raise UserError(path, f"has no column {missing[0]}", todo, ExitCode.BAD_DATA)
            for row in table:
                if None in row or None in row.values():
                    what = f"expected {len(columns)} fields"
                    raise UserError(f"{path}:{table.line_num}", what, todo, ExitCode.BAD_DATA)
                # A table of an earlier version has no hash: its runs cannot be told apart from others.
                if wanted.get(row["run"], "none") == row.get(RUN_SHA256):
                    outcomes[row["run"]] = _outcome(row, f"{path}:{table.line_num}", todo)
                else:
                    others.append(row["run"])
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(path, f"is not a table of runs ({error})", todo, ExitCode.BAD_DATA) from None
    if others:
        what = (
            f"{len(others)} of {len(others) + len(outcomes)} rows come from other commands, or from another study file"
        )
        print(f"note: {path}: {what} or version, and are ignored ({cut(', '.join(others))})", file=sys.stderr)
    return outcomes


def _outcome(row: Mapping[str, str], where: str, todo: str) -> Outcome:
    """Outcome from a row of the table. Raises UserError for a value that is not a number."""
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if value and (key == "hours" or not (key in FACTS or key.startswith(OF_STUDY))):
            try:
                numbers[key] = int(value) if value.isdigit() else float(value)
            except ValueError:
                raise UserError(where, f"{key}: {value[:40]!r} is not a number", todo, ExitCode.BAD_DATA) from None
    # A table of an earlier version has no remarks.
    return Outcome(numbers.pop("hours", math.nan), numbers, row["metrics_sha256"], row.get(REMARK, ""))
