"""Prepared sets (see `manifest.py`) as sources of pairs.

Rows are read from the shards' files: neither a large set nor many processes cost memory, and a data worker receives
only the file names of a split.

Shapes: N rows, P images per row (one).
"""

import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from maskvlm.data.batch import Row, Source
from maskvlm.data.phash import near
from maskvlm.data.prepared.manifest import SKIPPED, read_manifest
from maskvlm.data.prepared.shards import PreparedShards
from maskvlm.data.raw.lines import one_line, text_lines
from maskvlm.data.strict_json import parse_json
from maskvlm.data.subset import first_images, row_ids
from maskvlm.utils.distributed import rank
from maskvlm.utils.errors import ExitCode, UserError, check_least
from maskvlm.utils.paths import expand_user

HOLD_OUT = 3  # the purpose of these random draws, see `subset.lots`
UNREADABLE = "unreadable lines of skipped.jsonl"
MOST_LISTED = 1000
"""Number of left-out rows that a split lists per reason; skipped.jsonl has all of them."""


class PreparedPairs:
    """One split of a prepared set.

    Attributes:
        fingerprint: hash of the rows' content, independent of where the set is and how it is split into shards.
        skipped: rows that a run leaves out: none, as all rows here can be used.
        unprepared: reason -> rows that preparation left out or repaired, the first MOST_LISTED of each. Preparation has
            reported them, so only an evaluation's card counts them again.
        row_N: the rows of the stored split that are in this one; None: all.
    """

    def __init__(self, root: Path, name: str, split: dict[str, Any]) -> None:
        self.root, self.name = root, name
        self._shards = PreparedShards(root, split["shards"])
        self.fingerprint = str(split["sha256"])[:16]
        self.skipped: dict[str, list[str]] = {}
        self.unprepared = read_skipped(root / SKIPPED, name)
        self.row_N: np.ndarray | None = None
        self._length = len(self._shards)

    def only(self, row_N: np.ndarray) -> "PreparedPairs":
        """A subset of the rows, as a split of its own."""
        # shallow: both share the shards and their open files
        part = copy.copy(self)
        part.row_N, part._length = row_N, len(row_N)
        # little-endian on every machine
        part.fingerprint = hashlib.sha256(self.fingerprint.encode() + row_N.astype("<i8").tobytes()).hexdigest()[:16]
        return part

    def __len__(self) -> int:
        return self._length

    def place(self, index: int) -> int:
        """The row's number in the stored split. Raises IndexError."""
        # supports negative indices, and raises IndexError outside
        number = range(self._length)[index]
        return number if self.row_N is None else int(self.row_N[number])

    def __getitem__(self, index: int, /) -> Row:
        place = self.place(index)
        return Row(
            image=self._shards.value("image", place),
            captions=self._shards.value("captions", place),
            image_id=self._shards.value("image_id", place),
            origin=f"{self.root}/{self.name} row {place} ({self._shards.value('origin', place)})",
        )

    def captions(self, index: int) -> list[str]:
        """The captions of an image, without reading the image."""
        return list(self._shards.value("captions", self.place(index)))

    def image_ids(self) -> Iterator[str]:
        """Ids of all its images, each once, without reading them."""
        for image in self.column("image_id"):
            yield image.as_py()

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of all rows: `captions`, `image_id`, `source`, `origin` or `phash`."""
        column = self._shards.column(name)
        return column if self.row_N is None else column.take(pa.array(self.row_N))


class Prepared(Source):
    """A set prepared by `maskvlm data` (a `Source`).

    Args:
        root: the set's folder.
        hold_out: if the set has no `val` split, hold out this many training images (at most a twentieth of them,
            rounded up), chosen by id, as `val`. 0: such a set has no `val`.
    """

    def __init__(self, root: str, hold_out: int = 0) -> None:
        check_least(0, {"data.source.hold_out": hold_out})
        self.root, self.hold_out = expand_user(root), hold_out

    def split(self, name: str) -> PreparedPairs:
        """The pairs of one split.

        Raises:
            UserError: there is no finished set, it has no such split, or a shard is missing or damaged.
        """
        splits = read_manifest(self.root)["splits"]
        # both parts depend on the ids only, so `train` and `val` never overlap
        if self.hold_out and name in ("train", "val") and "train" in splits and "val" not in splits:
            return self._parted(PreparedPairs(self.root, "train", splits["train"]), name)
        if name not in splits:
            there = ", ".join(f"{other} with {splits[other]['pictures']:,} images" for other in splits)
            what = f"no split '{name}' (available: {there or 'none'})"
            if name == "val" and "train" in splits:
                way = "set data.source.hold_out to hold out part of train for it"
            elif self.hold_out and "train" in splits and "val" not in splits:
                way = "use val, which is held out of train"
            elif "train" in splits:
                way = "name another split"
            else:  # words in the names of folders and tables choose splits
                way = "prepare it again with a split train: a column, or a word in a file's or folder's name, says it"
            todo = f"Name another set, or {way}"
            raise UserError(self.root, what, todo, ExitCode.MISSING_INPUT)
        return PreparedPairs(self.root, name, splits[name])

    def _parted(self, pairs: PreparedPairs, name: str) -> PreparedPairs:
        """The training part of a split, or its held-out part."""
        ids_NP = row_ids(pairs)
        assert ids_NP is not None
        share = min(self.hold_out / len(pairs), 0.05)
        # at least one image; seed 0: the same ones in every run
        val_N = first_images(ids_NP[:, 0], max(share, 1 / len(pairs)), 0, HOLD_OUT)
        train_N = np.setdiff1d(np.arange(len(pairs)), val_N)
        # (N,)
        hash_N = pairs.column("phash").to_numpy()
        copy_N = near(hash_N[train_N], hash_N[val_N])  # the same photo may occur under two names
        copies = int(copy_N.sum())
        all_alike = bool(copy_N.all())
        train_N = train_N if all_alike else train_N[~copy_N]  # if all look alike, nothing else would be left
        if not len(train_N):
            what, todo = "all its images would be held out for validation", "Prepare more images"
            raise UserError(self.root, what, todo, ExitCode.BAD_DATA)
        # reported once, although both splits get here
        if name == "train" and rank() == 0:
            message = f"{len(val_N):,} of its {len(pairs):,} images are held out of training as its validation split"
            if copies:
                way = "kept, because all others do" if all_alike else "left out"
                like = "looks like one of them is" if copies == 1 else "look like one of them are"
                message += f", {copies:,} that {like} {way}"
            print(f"{self.root} has no val split: {message}", flush=True)
        part = pairs.only(train_N if name == "train" else val_N)
        if name == "val":
            part.unprepared = {}  # they were rows of `train`, and no row counts twice
        return part


def read_skipped(path: Path, split: str) -> dict[str, list[str]]:
    """Reason -> origins of the split's rows; the last entry says how many more there are.

    It is only used for reporting, so unreadable lines are just listed under a reason of their own.
    """
    listed: dict[str, list[str]] = {}
    more: Counter[str] = Counter()

    def add(reason: str, origin: str) -> None:
        origins = listed.setdefault(reason, [])
        # bounded: skipped.jsonl may have millions of lines
        if len(origins) < MOST_LISTED:
            origins.append(origin)
        else:
            more[reason] += 1

    try:
        # each line is checked by itself, as the file may be untrusted
        for number, text, problem in text_lines(path):
            entry = skipped_entry(text) if not problem else None
            if entry is None:
                add(UNREADABLE, f"{path}:{number}")
            elif entry["split"] == split:
                add(one_line(entry["reason"]), one_line(entry["origin"]))
    except UserError as error:
        add(UNREADABLE, str(error))
    # a last entry counts those that are not listed
    for reason, count in more.items():
        listed[reason].append(f"and {count:,} more, in {path}")
    return listed


def skipped_entry(text: str) -> dict[str, str] | None:
    """An entry of skipped.jsonl; None if the line is not valid."""
    try:
        entry = parse_json(text)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("split", "reason", "origin"))
    return entry if whole else None
