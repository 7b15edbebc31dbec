"""Raw rows -> the prepared form (see `manifest.py`): split into shards, made on all cores, resumable after a kill."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from maskvlm.data.files import load_json, not_an_object
from maskvlm.data.prepare.finish import Plan, finish_set
from maskvlm.data.prepare.rows import screened
from maskvlm.data.prepare.shards import Job
from maskvlm.data.prepared.manifest import (
    LOOK,
    MAKING,
    MANIFEST,
    SPLITS,
    cannot_write_set,
    read_manifest,
    write_set_json,
)
from maskvlm.data.raw.base import BadRow, RawRow, RawSet, checked_rows
from maskvlm.data.safe_open import content_of
from maskvlm.data.streaming.pool import Pool, Stage
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.paths import expand_user

PLAN, MOST_PLAN = "plan.json", 1_000_000  # bytes
MOST_BYTES = 64_000_000
"""Maximum bytes of images that are not files: a shard ends when it has this many, however few its rows."""


# ------------------------------------------------------------------ the whole


def prepare(raw: RawSet, plan: Plan, root: Path, workers: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Prepare the set in `root`, or resume preparing it; a complete set is not changed.

    Args:
        raw: the rows.
        workers: number of processes, 1 or more; the result does not depend on it.
        say: called with lines on progress.

    Returns:
        The manifest.

    Raises:
        UserError: the folder contains something else or cannot be written, or no image of the set can be used.
    """
    # the manifest exists, so `.making` is only what a killed run did not clean up
    if (manifest := complete(root, plan)) is not None:
        shutil.rmtree(root / MAKING, ignore_errors=True)
        say(f"{root}: already prepared, {manifest['coverage']}")
        return manifest
    # `.making` must exist before the lock, which is in it
    make_room(root)
    started = time.monotonic()
    try:
        with locked(root), nothing_for_nothing(root):
            claim_set(root, plan)
            remove_temporaries(root)
            with (
                Pool(workers, root, plan.settings) as pool,
                Stage("preparing", raw.facts.images, pool.counts, say) as stage,
            ):
                # rows are read lazily, by this process only
                counts = run_jobs(pool, stage, cut_jobs(checked_rows(raw), plan.rows))
            manifest = finish_set(root, raw, plan, counts, time.monotonic() - started)
    except OSError as error:  # readers of raw files report their own
        raise cannot_write_set(root, error) from error
    shutil.rmtree(root / MAKING, ignore_errors=True)
    return manifest


def run_jobs(pool: Pool, stage: Stage, jobs: Iterator[Job]) -> Counter[str]:
    """Run all jobs in the processes, with few of them in memory at a time; returns the number of jobs per split."""
    counts: Counter[str] = Counter()
    waiting: set[Future[Any]] = set()
    for job in jobs:
        counts[job.split] += 1
        (pool.root / job.split).mkdir(exist_ok=True)
        waiting.add(pool.submit(job))
        # reading waits here, so that rows with bytes do not pile up in memory
        while len(waiting) > pool.workers:  # one each, plus one that is being read
            waiting = settle(waiting, stage)
    while waiting:
        waiting = settle(waiting, stage)
    return counts


def settle(waiting: set[Future[Any]], stage: Stage) -> set[Future[Any]]:
    """The jobs still pending; raises the error of a failed one."""
    done, pending = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
    for each in done:
        # re-raises the process's error
        each.result()
    stage.show()
    return pending


def cut_jobs(rows: Iterator[RawRow | BadRow], most: int) -> Iterator[Job]:
    """Jobs of at most `most` rows of one split, in the order of the rows; a repeated image becomes a bad row."""
    waiting: dict[str, list[RawRow | BadRow]] = {}
    sizes: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    # only this process sees all rows in order
    for row in screened(rows):
        # a bad row of an unknown split is listed with train
        split = row.split if row.split in SPLITS else SPLITS[0]
        waiting.setdefault(split, []).append(row)
        # only bytes are sent to a process, which opens files itself
        sizes[split] += len(row.image) if isinstance(row, RawRow) and isinstance(row.image, bytes) else 0
        if len(waiting[split]) >= most or sizes[split] >= MOST_BYTES:
            yield Job(split, numbers[split], waiting.pop(split))
            numbers[split] += 1
            sizes[split] = 0
    # the last, shorter shard of each split
    for split in [name for name in SPLITS if name in waiting]:
        yield Job(split, numbers[split], waiting[split])


# ------------------------------------------------------------------ the folder


def complete(root: Path, plan: Plan) -> dict[str, Any] | None:
    """The manifest if the set exists and is complete, else None.

    Raises:
        UserError: it is another set, or was made with other settings.
    """
    if not (root / MANIFEST).is_file():
        return None
    manifest = read_manifest(root)
    check_same(root, manifest["settings"], plan, "a prepared set")
    return manifest


def check_same(root: Path, there: dict[str, Any], plan: Plan, what: str) -> None:
    """Raise UserError if the existing set was made with other settings."""
    # through JSON like the stored settings, where tuples are lists
    card = json.loads(json.dumps(plan.card()))
    # If the raw files are gone by now, the typed path no longer exists, but it may have been the same one.
    if there.get("raw") == str(expand_user(card["raw"]).resolve()):
        card["raw"] = there["raw"]
    # `images` is missing in sets that were begun before it was an option
    if other := [name for name in card if there.get(name, "") != card[name]]:
        differences = ", ".join(f"{name} {there.get(name)!r} instead of {card[name]!r}" for name in other)
        todo = "Delete this folder to prepare it again, or use another name (NAME=)"
        raise UserError(root, f"holds {what} made with {differences}", todo, ExitCode.CANNOT_CREATE)


def make_room(root: Path) -> None:
    """Create the folder, unless it contains anything but a partly prepared set or a first look."""
    try:
        begun = (root / MAKING / PLAN).is_file()
        if not begun and root.is_dir() and {each.name for each in root.iterdir()} - {LOOK, MAKING}:
            todo = "Name another one (NAME=, DATA_ROOT=); it will be created"
            raise UserError(root, "holds files that are not part of a prepared set", todo, ExitCode.CANNOT_CREATE)
        (root / MAKING).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write_set(root, error) from error


def claim_set(root: Path, plan: Plan) -> None:
    """Record the plan, unless the folder contains another, partly prepared set; called under the lock."""
    file = root / MAKING / PLAN
    if file.is_file() and any(root.glob("*/data-*.arrow")):  # an attempt that made nothing does not count
        check_same(root, read_plan(file, root), plan, "an unfinished set")
    write_set_json(file, plan.card())


def read_plan(file: Path, root: Path) -> dict[str, Any]:
    """The plan of an unfinished set."""
    try:
        plan = load_json(content_of(file, MOST_PLAN), file)
    except UserError as error:
        raise UserError(file, error.what, f"Delete {root}", error.code) from error
    if not isinstance(plan, dict):
        raise UserError(file, not_an_object(plan), f"Delete {root}", ExitCode.BAD_DATA)
    return plan


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Allow one run at a time; the system releases the lock when the process ends, however it does."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    # the lock is on the open file; the file that remains has no meaning
    with (root / MAKING / "lock").open("w") as file:
        try:
            # NB: fail at once rather than wait for the other run
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            todo = "Wait for it, or stop it first"
            raise UserError(root, "another process is preparing this set", todo, ExitCode.CANNOT_CREATE) from error
        except OSError:  # a file system without locks
            pass
        yield


@contextmanager
def nothing_for_nothing(root: Path) -> Iterator[None]:
    """Remove the folder after an error before the first shard; a first look stays. Ctrl-C is not an error here."""
    try:
        yield
    except Exception:
        if not any(root.glob("*/data-*.arrow")):
            for name in (*SPLITS, MAKING):
                shutil.rmtree(root / name, ignore_errors=True)
            with suppress(OSError):
                root.rmdir()
        raise


def remove_temporaries(root: Path) -> None:
    """Remove partly written files of a killed run."""
    for folder in (root, *(root / name for name in (*SPLITS, MAKING))):
        # safe under the lock, as no one else writes here
        for file in folder.glob(".*.tmp"):
            file.unlink(missing_ok=True)
