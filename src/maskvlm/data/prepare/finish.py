"""The end of a preparation: writes the files that combine its shards into one set."""

import hashlib
import json
import shutil
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from maskvlm.data.phash import KIND
from maskvlm.data.prepare.first_look import look_at_prepared
from maskvlm.data.prepare.rows import Reasons, Settings
from maskvlm.data.prepare.shards import ShardNote, note_file, read_note
from maskvlm.data.prepared.manifest import (
    LOOK,
    MAKING,
    MANIFEST,
    SKIPPED,
    SPLITS,
    coverage,
    sha256_of_part,
    tool_versions,
    whole_set_file,
    write_dataset_files,
    write_set_json,
)
from maskvlm.data.prepared.manifest_schema import FORMAT
from maskvlm.data.raw.base import RawSet
from maskvlm.utils.errors import ExitCode, UserError

ROWS = 1000
"""Default for the largest number of rows in a shard."""
FOUND_IN_TEXT = {
    "malformed row", "missing column", "too many columns", "quote left open", "quotes do not fit", "unknown split",
    "duplicate id", "duplicate image id", "duplicate caption", "image in two splits", "image in two tables",
    "no caption", "empty caption", "caption too long", "name is not text",
}  # fmt: skip
"""Reasons that say nothing of the image's file."""


class Plan(NamedTuple):
    """Description of the set to prepare.

    Attributes:
        set, raw, columns, images: as passed to `open_raw`.
        rows: rows per shard.
    """

    set: str
    raw: str
    settings: Settings
    columns: dict[str, str]
    rows: int = ROWS
    images: str = ""

    def card(self) -> dict[str, Any]:
        """Entry in the manifest."""
        card = {"set": self.set, "raw": self.raw, "columns": self.columns, "images": self.images, "rows": self.rows}
        return {**card, **self.settings._asdict()}


def finish_set(root: Path, raw: RawSet, plan: Plan, counts: Counter[str], seconds: float) -> dict[str, Any]:
    """Write the files that combine the shards into one set, the manifest last."""
    splits: dict[str, Any] = {}
    left_out, mended = Reasons(), Reasons()
    with whole_set_file(root / SKIPPED) as lines:
        for split in [name for name in SPLITS if counts[name]]:
            # one at a time, so that only one note is in memory
            notes = (read_note(note_file(root, split, number)) for number in range(counts[split]))
            summary = Summary()
            for note in notes:
                # in the order of the rows, on which the split's hash depends
                summary.add(note)
                for entries, reasons, out in ((note.left_out, left_out, True), (note.mended, mended, False)):
                    for entry in entries:
                        reasons.add(entry)
                        # skipped.jsonl lists every row, the manifest counts and a few examples
                        line = {"split": split, "left_out": out, **entry._asdict()}
                        lines.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
            if summary.shards:
                splits[split] = summary.card()
    images = sum(split["pictures"] for split in splits.values())
    if not images:
        # raises
        give_up(root, plan, left_out)
    remove_others(root, splits)
    for name, split in splits.items():
        files = [Path(shard["file"]).name for shard in split["shards"]]
        write_dataset_files(root / name, files, split["sha256"][:16], raw.facts.licence)
    write_set_json(root / "dataset_dict.json", {"splits": [*splits]}, indent=None)
    annotations = [copy(file, root) for file in raw.annotations]
    manifest = {
        "format": FORMAT,
        "name": plan.settings.name,
        "title": raw.facts.title,
        "licence": raw.facts.licence,
        "coverage": coverage(images, raw.facts.images),
        "pictures": images,
        "captions": sum(split["captions"] for split in splits.values()),
        "published": {"pictures": raw.facts.images, "captions": raw.facts.captions},
        "notes": raw.notes,
        "settings": plan.card(),
        "phash": {"column": "phash", "kind": KIND, "bits": 64},
        "left_out": left_out.card(),
        "mended": mended.card(),
        "splits": splits,
    }
    # draws the content of the manifest so far
    manifest["look"] = look_at_prepared(root, manifest)
    # after the image is drawn, as its checksum is among these
    manifest["files"] = {name: sha256_of_part(root / name) for name in (SKIPPED, LOOK, *annotations)}
    manifest["versions"] = tool_versions()
    # time and versions are only in the manifest, so that shards of the same rows are byte-identical
    manifest["made"] = {"finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": round(seconds, 1)}
    # last, as it marks everything else as complete
    write_set_json(root / MANIFEST, manifest)
    return manifest


class Summary:
    """Summary of a split, built shard by shard. Its hash is of the rows in order, however they are cut into shards."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.shards: list[dict[str, Any]] = []
        self.totals: Counter[str] = Counter()

    def add(self, note: ShardNote) -> None:
        """Add the next shard, in the order of the rows."""
        self.sha256.update(note.digests.encode())
        self.totals.update(pictures=note.rows, captions=note.captions, kept=note.kept, bytes=note.bytes)
        if note.file:
            part = {"file": note.file, "rows": note.rows, "bytes": note.bytes, "sha256": note.sha256}
            self.shards.append(part)

    def card(self) -> dict[str, Any]:
        """The split's entry in the manifest."""
        return {**self.totals, "sha256": self.sha256.hexdigest(), "shards": self.shards}


def give_up(root: Path, plan: Plan, left_out: Reasons) -> None:
    """Clean up and raise UserError, as no image can be used."""
    # a later attempt must not take the folder for another set
    for name in (*SPLITS, MAKING):
        shutil.rmtree(root / name, ignore_errors=True)
    (root / SKIPPED).unlink(missing_ok=True)
    with suppress(OSError):
        root.rmdir()
    reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.count.most_common(5))
    first = next(iter(left_out.first.values()))[0]["message"] if left_out.first else "there is no row"
    what = f"no image can be used ({reasons or 'no rows'}; first: {first})"
    images = not set(left_out.count) <= FOUND_IN_TEXT
    todo = "Check RAW and its folder of images" if images else "Check the rows of RAW: no image was opened"
    raise UserError(plan.raw, what, todo, ExitCode.BAD_DATA)


def remove_others(root: Path, splits: dict[str, Any]) -> None:
    """Remove shards that an earlier run made from rows that no longer exist."""
    # raw files may have changed between two runs of an unfinished set
    listed = {shard["file"] for split in splits.values() for shard in split["shards"]}
    for name in SPLITS:
        for file in (root / name).glob("data-*.arrow"):
            if f"{name}/{file.name}" not in listed:
                file.unlink()
        with suppress(OSError):
            (root / name).rmdir()


def copy(file: Path, root: Path) -> str:
    """Copy an annotation file as distributed next to the images; returns its name."""
    try:
        with file.open("rb") as source, whole_set_file(root / file.name) as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except OSError as error:
        raise UserError(file, f"cannot be read ({error.strerror})", "Check the file", ExitCode.IO_ERROR) from error
    return file.name
