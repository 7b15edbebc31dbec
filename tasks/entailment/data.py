"""SNLI-VE: does a photo of Flickr30k entail a sentence? (Xie et al. 2019, github.com/necla-ml/SNLI-VE)

The test labels of many `neutral` pairs were found to be wrong. Corrected labels for validation and test come with
e-SNLI-VE 2.0 (Do et al. 2020, data/gt_labels.csv: pairID, image_link, sentence2, label) and e-ViL (Kayser et al. 2021,
esnlive_dev.csv, esnlive_test.csv: pairID, Flickr30kID, hypothesis, gold_label, explanation).
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from maskvlm.data.examples import ExampleSource
from maskvlm.data.files import (
    ImagesByKey,
    JsonLine,
    digest_of,
    get,
    get_label,
    get_name,
    json_lines,
)
from maskvlm.data.prepare.example_images import open_album
from maskvlm.data.raw.table import RawTable as CommaTable
from maskvlm.data.safe_open import check_below
from maskvlm.data.table import (
    EXAMPLE_COLUMNS,
    EXAMPLE_VERSION,
    ParsedColumns,
    RowOrigin,
    Table,
    TableExamples,
    TableRows,
    cached_table,
    choose_rows,
)
from maskvlm.utils.distributed import rank
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.paths import expand_user

log = logging.getLogger(__name__)

VERSION = 1
"""Increase this when the same files give a different table."""

LABELS = ("entailment", "neutral", "contradiction")
NO_LABEL = "-"  # the annotators did not agree
CORRECTED = "label corrected"
LAYOUT = "SNLI-VE"
TODO = "Prepare the set (maskvlm data snli_ve FOLDER), or set data.source.root to the folder of its files"


class SnliVe(ExampleSource):
    """SNLI-VE as distributed: one pair per line with `Flickr30K_ID`, `sentence2`, `gold_label` and `pairID`.

    Pairs with the label `-` are left out of every split and counted, following the data set's authors.

    Args:
        root: folder of the files as distributed, or of the set that `maskvlm data` made from them.
        train, val, test: their names; None if there is none.
        images: folder of Flickr30k's (or Flickr8k's) images, whose names start with the photo's number, or of that
            set prepared; by default the root's own, `images/` in it, or the root.
        corrected: files with labels that replace those of the same pairID in every split, .csv or jsonl, with
            columns `pairID` and `gold_label` (or `label`); changed pairs are listed in `skipped`. A warning is logged
            if none of them is in a split that is evaluated.
        cache: folder for cached tables; by default next to those of Hugging Face datasets.
        max_missing: maximum share of training pairs without their image; these are skipped and listed.
    """

    labels = LABELS

    def __init__(
        self,
        root: str,
        train: str | None = "snli_ve_train.jsonl",
        val: str | None = "snli_ve_dev.jsonl",
        test: str | None = "snli_ve_test.jsonl",
        images: str | None = None,
        corrected: str | list[str] | None = None,
        cache: str | None = None,
        max_missing: float = 0.01,
    ) -> None:
        self.root, self.images = expand_user(root), images
        self.files = {"train": train, "val": val, "test": test}
        named = [corrected] if isinstance(corrected, str) else corrected or []
        self.corrected = [expand_user(name) for name in named]
        self.cache, self.max_missing = cache, max_missing
        self.warned: set[str] = set()

    def split(self, name: str) -> TableExamples:
        """The pairs of `train`, `val` or `test`.

        Raises:
            UserError: a file or its images are missing, a line is malformed, or a pairID occurs twice.
        """
        if not (file := self.files.get(name)):
            raise UserError(f"data.source.{name}", "no file was given for this split", "Name one")
        origin = RowOrigin(self.root / file, "{file}:{place}")
        check_below(origin.file, self.root)
        digest = digest_of(origin.file, todo=TODO) + digest_of(*self.corrected, todo="Correct data.source.corrected")
        # Half of each digest: the file's and the corrections'.
        key = f"snli-ve-{EXAMPLE_VERSION}.{VERSION}-{digest[:32]}-{digest[64:96]}"
        table = cached_table(
            key, self.cache, EXAMPLE_COLUMNS, lambda: parse_entailment(origin, read_labels(self.corrected))
        )
        if name != "train" and self.corrected and name not in self.warned and rank() == 0:
            self._warn_if_missed(table, name)
        return choose_rows(table, origin, name, self._images(), self.max_missing)

    def _warn_if_missed(self, table: Table, split: str) -> None:
        """Log one warning per split that no correction applies to; checks the table, which may come from the cache.

        A correction file for validation has nothing for training, which is fine; evaluating on labels that one
        believes to be corrected is not.
        """
        pairs = read_labels(self.corrected).keys()
        if table.notes.get(CORRECTED) or not pairs.isdisjoint(table.rows.data.column("id").to_pylist()):
            return
        self.warned.add(split)
        count = f"{len(pairs)} pairIDs" if len(pairs) > 1 else "1 pairID"
        files, file = ", ".join(map(str, self.corrected)), self.files[split]
        log.warning("warning: none of the %s of %s is in %s; its labels are unchanged", count, files, file)

    def _images(self) -> ImagesByKey:
        """Images by number; if two files have the same number, the one named by the number alone."""
        album = open_album(self.images, self.root)
        named: dict[str, str] = {}
        # False sorts before True: names of digits alone come first, and setdefault keeps the first.
        for name in sorted(album.names, key=lambda name: (not PurePosixPath(name).stem.isdigit(), name)):
            if number := re.match(r"\d+", PurePosixPath(name).name):
                named.setdefault(f"flickr {number[0]}", name)
        return album.images(named)


def parse_entailment(origin: RowOrigin, corrected: dict[str, str]) -> ParsedColumns:
    """The lines of a file as an examples table; a malformed line is an error that names it."""
    rows = TableRows(origin, "pairID")
    for where, number, record in json_lines(origin.file):
        pair = get_name(record, "pairID", where, LAYOUT)
        old = get_label(record, "gold_label", (*LABELS, NO_LABEL), where, LAYOUT)
        label = corrected.get(pair, old)
        if label != old:
            # Counted before pairs without a label are left out: a correction may also be `-`.
            rows.note(CORRECTED, number)
        if label == NO_LABEL:
            rows.note("no gold label", number)
            continue
        rows.add(
            place=number,
            id=pair,
            images=[f"flickr {get_name(record, 'Flickr30K_ID', where, LAYOUT)}"],
            text=get(record, "sentence2", str, where, LAYOUT),
            answers=[label],
        )
    return rows.finish()


# ------------------------------------------------------------------ corrected labels


def read_labels(files: list[Path]) -> dict[str, str]:
    """pairID -> label from all files.

    Raises:
        UserError: a file lacks these columns, a label is not one of the classes, or a pair has two different labels.
    """
    labels: dict[str, str] = {}
    for file in files:
        rows = [*(csv_rows(file) if file.suffix == ".csv" else json_lines(file))]
        if not rows:
            raise UserError(file, "no label in this file", "Correct data.source.corrected", ExitCode.BAD_DATA)
        for where, _, record in rows:
            pair, label = _correction(record, where)
            if labels.setdefault(pair, label) != label:
                what = f"pairID '{pair}' is '{label}' here and '{labels[pair]}' before"
                raise UserError(where, what, "Keep one of the two", ExitCode.BAD_DATA)
    return labels


def _correction(record: dict[str, Any], where: str) -> tuple[str, str]:
    column = next((name for name in ("gold_label", "label") if name in record), None)
    if column is None or "pairID" not in record:
        there = ", ".join(repr(name) for name in record)[:200]
        what = f"no columns 'pairID' and 'gold_label' (found: {there or 'nothing'})"
        raise UserError(where, what, "Name the columns so", ExitCode.BAD_DATA)
    return get_name(record, "pairID", where, LAYOUT), get_label(record, column, (*LABELS, NO_LABEL), where, LAYOUT)


def csv_rows(file: Path) -> Iterator[JsonLine]:
    """The rows of a comma-separated file, keyed by the names in its first line, each with the line it starts on."""
    table = CommaTable(file, ",")
    for number, fields, problem in table.records():
        where = f"{file}:{number}"
        if problem:
            what = f"not comma-separated text ({problem[0]}: {problem[1]})"
            raise UserError(where, what, "Fix this line, or fetch the file again", ExitCode.BAD_DATA)
        # A quote that is closed too late swallows the rows in between, which is valid CSV.
        if any(line.count(",") >= len(table.columns) - 1 > 0 for field in fields for line in field.split("\n")[1:]):
            what = "a quoted field goes on over what looks like another row"
            raise UserError(where, what, "Close the quote, or put the field on one line", ExitCode.BAD_DATA)
        yield JsonLine(where, number, dict(zip(table.columns, fields, strict=True)))
