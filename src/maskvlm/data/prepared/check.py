"""Checks that a prepared set is still as its manifest says: every byte, every row, every split."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from maskvlm.data.files import load_json
from maskvlm.data.images import BadImage, safe_open
from maskvlm.data.prepare.rows import row_digest
from maskvlm.data.prepared.manifest import read_manifest, sha256_of_part
from maskvlm.data.prepared.manifest_schema import MOST_BYTES
from maskvlm.data.prepared.shards import check_shard_size, read_shard
from maskvlm.data.safe_open import check_below, content_of
from maskvlm.data.streaming.pool import process_context, watched
from maskvlm.utils.errors import ExitCode, UserError

SAMPLE = 500
"""Number of images per split to decode if not all are decoded."""


class CheckedShard(NamedTuple):
    """Findings in a shard. faults: one line each; digests: those of its rows, joined."""

    faults: list[str]
    digests: str
    rows: int
    captions: int
    decoded: int


def check_set(root: Path, every: bool = False, workers: int = 1, say: Callable[[str], None] = print) -> list[str]:
    """The faults of a set, one line each; empty if it is intact.

    Args:
        every: decode every image, not a sample of SAMPLE per split.
        workers: number of processes, 1 or more.
        say: called with a line on the content of the set.

    Raises:
        UserError: there is no set or it is unfinished (66); its manifest is damaged (65) or cannot be read (74); a
            process was killed (74); the manifest is a link out of the folder (77).
    """
    manifest = read_manifest(root)
    faults = [*other_files(root, manifest)]
    decoded = 0
    context = process_context()
    # starts no process before it is used
    with report_kills(root), ProcessPoolExecutor(workers, context, watched) as pool:
        # both keep the order of the shards, on which the split's hash depends
        spread: Callable[..., Iterator[CheckedShard]] = pool.map if workers > 1 else map
        for name, split in manifest["splits"].items():
            # rounded up; 1 for a split without images
            step = 1 if every else -(-split["pictures"] // SAMPLE) or 1
            digest, totals, unread = hashlib.sha256(), [0, 0], False
            for shard in spread(partial(check_shard, root, step), split["shards"]):
                faults += shard.faults
                # the hash of the split is over the rows' digests, independent of their shards
                digest.update(shard.digests.encode())
                totals = [totals[0] + shard.rows, totals[1] + shard.captions]
                decoded += shard.decoded
                # a shard that could not be read has no digests
                unread |= not shard.digests
            if not unread:  # else it has its own line
                faults += check_rows(root / name, split, totals, digest.hexdigest())
            faults += check_written(root / name, split)
    counts = ", ".join(f"{name} {split['pictures']:,}" for name, split in manifest["splits"].items())
    captions = sum(split["captions"] for split in manifest["splits"].values())
    if not faults:
        say(f"{root}: as its manifest says ({counts} images, {captions:,} captions; {decoded:,} images decoded)")
    return faults


@contextmanager
def report_kills(root: Path) -> Iterator[None]:
    """Raise UserError (74) if a process of the check was killed."""
    try:
        yield
    except BrokenProcessPool as error:
        what = "a process of the check was killed, perhaps because memory ran out"
        raise UserError(root, what, "Run it again with fewer --workers", ExitCode.IO_ERROR) from error


def check_shard(root: Path, step: int, shard: dict[str, Any]) -> CheckedShard:
    """Check one shard; every `step`-th of its images is decoded."""
    path, faults, digests, captions, decoded = root / shard["file"], list[str](), list[str](), 0, 0
    try:
        check_below(path, root)
        check_shard_size(path, shard["bytes"])
        # if the bytes differ, their content need not be parsed
        if (there := sha256_of_part(path)) != shard["sha256"]:
            fault = f"{path}: sha256 is {there[:16]}..., the manifest says {shard['sha256'][:16]}..."
            return CheckedShard([fault], "", 0, 0, 0)
        # one open file for all its rows
        shard_rows = read_shard(path, keep=True)
        if len(shard_rows) != shard["rows"]:
            faults.append(f"{path}: {len(shard_rows)} rows, the manifest says {shard['rows']}")
        for number, row in enumerate(shard_rows.rows()):
            digests.append(row_digest(row["image"], row["captions"], row["image_id"], row["name"]))
            captions += len(row["captions"])
            if number % step == 0:
                decoded += 1
                try:
                    safe_open(row["image"], f"{path} row {number} ({row['origin']})")
                except BadImage as bad:
                    faults.append(f"{bad.where}: {bad.what}")
    except UserError as error:
        return CheckedShard([*faults, f"{error.where}: {error.what}"], "", 0, 0, 0)
    return CheckedShard(faults, "".join(digests), len(shard_rows), captions, decoded)


def check_rows(folder: Path, split: dict[str, Any], totals: list[int], sha256: str) -> Iterator[str]:
    """Faults in the rows of a split as a whole."""
    for name, there in zip(("pictures", "captions"), totals, strict=True):
        if there != split[name]:
            label = "images" if name == "pictures" else name
            yield f"{folder}: {there} {label}, the manifest says {split[name]}"
    if sha256 != split["sha256"]:
        yield f"{folder}: the rows' hash is {sha256[:16]}..., the manifest says {split['sha256'][:16]}..."


def check_written(folder: Path, split: dict[str, Any]) -> Iterator[str]:
    """Check that `datasets` would read the shards in the manifest."""
    state = folder / "state.json"
    try:
        check_below(state, folder.parent)
        listed = [file["filename"] for file in load_json(content_of(state, MOST_BYTES), state)["_data_files"]]
    except UserError as error:
        yield f"{state}: {error.what}"
        return
    except (LookupError, TypeError) as error:
        yield f"{state}: cannot be read ({type(error).__name__})"
        return
    if listed != [Path(shard["file"]).name for shard in split["shards"]]:
        yield f"{state}: does not list the shards of the manifest"


def other_files(root: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Faults in the files other than shards."""
    for name, sha256 in manifest["files"].items():
        try:
            check_below(root / name, root)
            if (there := sha256_of_part(root / name)) != sha256:
                yield f"{root / name}: sha256 is {there[:16]}..., the manifest says {str(sha256)[:16]}..."
        except UserError as error:
            yield f"{error.where}: {error.what}"
    for name in manifest["splits"]:
        if not (root / name / "dataset_info.json").is_file():
            yield f"{root / name / 'dataset_info.json'}: is missing"
    if not (root / "dataset_dict.json").is_file():
        yield f"{root / 'dataset_dict.json'}: is missing"
