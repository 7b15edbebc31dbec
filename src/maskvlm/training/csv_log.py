"""`metrics.csv`: one table per run, always intact on disk, which a resumed run continues."""

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from maskvlm.utils.whole_files import write_text

Row = dict[str, Any]
LONGEST = 100_000  # characters per line; csv itself stops at 131,072 per field


class RunLog(CSVLogger):
    """A CSV logger that keeps an existing table and replaces the file atomically. Lightning's own deletes the table it
    finds, and rewrites it in place when a column is added."""

    @property
    @rank_zero_experiment
    def experiment(self) -> "Writer":
        if self._experiment is None:
            self._experiment = Writer(self.log_dir)
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def forget(self, step: int, unmeasured: bool, ended: bool) -> None:
        """Drop the rows that a resumed run will log again.

        Args:
            step: the last step whose training row is kept.
            unmeasured: the evaluation at that step is still to be done, so rows with its metrics are dropped too.
            ended: training had ended there. Its final evaluation is logged under the next step, and is kept.
        """
        self.experiment.forget(step, unmeasured, ended)


class Writer(ExperimentWriter):
    """Rows of a table; `metrics` holds those not yet written, as in the base class."""

    def __init__(self, log_dir: str) -> None:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        path = Path(log_dir) / self.NAME_METRICS_FILE
        super().__init__(log_dir)
        self.path = path
        self.rows = rows_in(path.read_bytes() if path.is_file() else b"")
        self.metrics_keys = sorted(set().union(*self.rows))
        self._rewrite()

    def _check_log_dir_exists(self) -> None:
        """Do nothing: Lightning's method deletes the files that it finds."""

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        """Log as the base class does, but drop a row that repeats the previous one."""
        super().log_metrics(metrics_dict, step)
        # KeepState has a step's row logged before it saves; Lightning logs it again afterwards.
        known = self.metrics[-2:-1] or self.rows[-1:]
        if known and _plain(known[0]) == _plain(self.metrics[-1]):
            self.metrics.pop()

    def save(self) -> None:
        """Append new rows; if there is a new column, replace the whole file."""
        if not self.metrics:
            return
        new, self.metrics = self.metrics, []
        self.rows += new
        # A new column changes the header, so all rows are rewritten.
        keys = sorted({*self.metrics_keys, *set().union(*new)})
        if keys != self.metrics_keys or not self.path.is_file():
            self.metrics_keys = keys
            self._rewrite()
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(_table(new, keys, header=False))

    def forget(self, step: int, unmeasured: bool, ended: bool) -> None:
        """See `RunLog.forget`."""
        rows = [row for row in self.rows if _keeps(row, step, unmeasured, ended)]
        if len(rows) < len(self.rows):
            self.rows = rows
            self._rewrite()

    def _rewrite(self) -> None:
        if self.rows:
            write_text(self.path, _table(self.rows, self.metrics_keys, header=True))
        else:
            self.path.unlink(missing_ok=True)


def rows_in(content: bytes) -> list[Row]:
    """The rows of a table; a last line that a killed process left unfinished is dropped."""
    lines = content.decode("utf-8", "replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = csv.DictReader(line.replace("\0", "") for line in lines if len(line) < LONGEST)
    try:
        # DictReader fills a short row with None, and stores the extra fields of a long row under the key None.
        return [{key: value for key, value in row.items() if key and value} for row in rows if None not in row.values()]
    except csv.Error:  # a damaged table costs its rows, not the run
        return []


def _keeps(row: Row, step: int, unmeasured: bool, ended: bool) -> bool:
    try:
        at = int(float(row.get("step", 0)))
    except (ValueError, OverflowError):  # a damaged row
        return False
    # An evaluation's row has no training loss; one that a callback adds to a training row is not of an evaluation.
    measured = any(_measured(key) for key in row) and not any(key.startswith("train/") for key in row)
    # The step's training row was logged before the checkpoint was written; its evaluation may be pending.
    return at < step or (at == step and not (unmeasured and measured)) or (ended and at == step + 1 and measured)


def _measured(key: str) -> bool:
    """Whether a column comes from an evaluation."""
    return key not in ("step", "epoch") and not key.startswith(("train/", "level/", "lr-"))


def _table(rows: list[Row], keys: list[str], header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator=os.linesep)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _plain(row: Row) -> dict[str, str]:
    return {key: str(value) for key, value in row.items()}
