"""`maskvlm data SET RAW` and `data-check ROOT`: prepare, preview or verify a data set."""

import os
import sys
from pathlib import Path
from typing import Any

from maskvlm.config.arguments import OptionParser
from maskvlm.config.compose import choices
from maskvlm.data.caption_text import clean_caption
from maskvlm.data.prepare.finish import ROWS, Plan
from maskvlm.data.prepare.first_look import look_at_raw
from maskvlm.data.prepare.prepare import complete, prepare
from maskvlm.data.prepare.rows import Settings, first_example
from maskvlm.data.prepared.check import check_set
from maskvlm.data.prepared.manifest import LOOK, MANIFEST, SKIPPED, check_set_path, read_manifest
from maskvlm.data.raw import SETS, open_raw
from maskvlm.data.raw.columns import ROLES
from maskvlm.utils.cores import cores
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.paths import expand_user


def main(arguments: list[str], allow_import: list[str]) -> int:
    """Prepare a set, or with --look only preview it; returns the exit status."""
    parser = OptionParser("maskvlm data", description="prepare a data set from its raw files, once")
    parser.add_argument("set", metavar="SET", help=" ".join([*SETS, "or the import path of a class"]))
    parser.add_argument("raw", metavar="RAW", help="folder or file as distributed; for hf: name on the hub")
    parser.add_argument("--out", help="folder to create; its name becomes the set's (default: DATA_ROOT/SET)")
    parser.add_argument(
        "--side", type=int, default=288, help="largest shorter side of a stored image, in pixels (default: %(default)s)"
    )
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality, 1 to 100 (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=cores(), help="worker processes (default: all cores, %(default)s)"
    )
    parser.add_argument("--columns", action="append", default=[], metavar="ROLE=COLUMN,...", help=", ".join(ROLES))
    parser.add_argument(
        "--images", metavar="FOLDER", help="for csv and jsonl: folder of the images, if they are not beside the table"
    )
    parser.add_argument("--rows", type=int, default=ROWS, help="rows per shard (default: %(default)s)")
    parser.add_argument(
        "--look", action="store_true", help=f"only write {LOOK}, a contact sheet of the first rows; prepare nothing"
    )
    options = parser.parse_args(arguments)
    # 8: the smallest usable side of an image
    bounds = [("--side", options.side, 8, 10_000), ("--quality", options.quality, 1, 100)]
    bounds += [("--workers", options.workers, 1, 1024), ("--rows", options.rows, 1, 1_000_000)]
    for option, value, low, high in bounds:
        if not low <= value <= high:
            raise UserError(option, f"{value} is not from {low} to {high}", "Give another number")
    root = expand_user(options.out or Path(os.environ.get("DATA_ROOT") or "data") / options.set)
    # all names are checked before anything is read or written
    check_set_path(root)
    check_raw(options.raw)
    place = check_places(options.set, options.raw, root)
    columns = named_columns(options.columns)
    # for example an unset variable of the shell; it would be the working directory
    if options.images == "":
        raise UserError("--images", "it is empty", "Name the folder of the images, or leave it out")
    # Links in it are not resolved: the table may name its images through them.
    images = os.path.abspath(expand_user(options.images)) if options.images else ""
    # the folder's name becomes the set's, which appears in messages and ids
    # `-x` would be read as an option, for example in `--data.source.root`
    if clean_caption(root.resolve().name)[0] != root.resolve().name or root.resolve().name.startswith("-"):
        raise UserError(
            "--out", f"{root.resolve().name!r} is not a plain name", "Use another one", ExitCode.CANNOT_CREATE
        )
    settings = Settings(root.resolve().name, options.side, options.quality)
    plan = Plan(options.set, place, settings, columns, options.rows, images)
    # a name that is neither must get to `open_raw`, which reports it
    known = options.set in SETS or "." in options.set
    if known and not options.look and complete(root, plan) is not None:  # the raw files may be gone by now
        print(f"{root}: already prepared ({read_manifest(root)['coverage']}); nothing to do")
        tell_newer(Path(options.raw), root)
        return ExitCode.DONE
    raw = open_raw(options.set, options.raw, columns or None, settings.name, images or None)
    if options.look:
        # The sheet of a prepared set is one of its files, whose checksum is in the manifest.
        sheet = root.with_name(f"{root.name}-{LOOK}") if (root / MANIFEST).is_file() else root / LOOK
        lines = look_at_raw(raw, settings, sheet)
        print("\n".join([*lines, str(sheet)]))
        return ExitCode.DONE
    try:
        manifest = prepare(raw, plan, root, options.workers)
    except KeyboardInterrupt:
        print(f"interrupted; repeat the command to resume {root}", file=sys.stderr)
        # 128 + SIGINT, as in shells
        return 130
    splits = ", ".join(f"{name} {split['pictures']:,}" for name, split in manifest["splits"].items())
    number = manifest["captions"]
    captions = f", {'1 caption' if number == 1 else f'{number:,} captions'}" if number else ""
    print(f"{root}: {manifest['coverage']} ({splits}){captions}; licence: {manifest['licence']}")
    for note in manifest["notes"]:
        print(f"note: {note}")
    # rows of a table, or images of an archive: whatever the reader returns
    print_counts("left out", "row", manifest["left_out"], root)
    print_counts("repaired or dropped", "caption", manifest["mended"], root)
    # data=NAME would mean the file of that name, not this set
    if settings.name != options.set and settings.name in choices("data"):
        message = f"data={settings.name} still refers to the set of conf/data/{settings.name}.yaml"
        print(f"note: {message}, not this one: prepare it under another name to train on it")
    print(f"look at {root / LOOK}")
    return ExitCode.DONE


def print_counts(what: str, unit: str, reasons: dict[str, Any], root: Path) -> None:
    """Print a line on what is listed under these reasons (see `Reasons.card`), if there is anything."""
    if not (total := sum(entry["count"] for entry in reasons.values())):
        return
    counts = ", ".join(f"{reason}: {entry['count']:,}" for reason, entry in reasons.items())
    number, example = f"{total:,} {unit}{'' if total == 1 else 's'}", first_example(next(iter(reasons.values())))
    print(f"{what}: {number} ({counts}), listed in {root / SKIPPED}; for example {example}")


def verify_set(arguments: list[str], allow_import: list[str]) -> int:
    """Compare a prepared set with its manifest; returns 65 if they differ."""
    parser = OptionParser("maskvlm data-check", description="compare a prepared set with its manifest")
    parser.add_argument("root", metavar="ROOT", help="folder of the set")
    parser.add_argument("--all", action="store_true", help="decode every image instead of a sample")
    parser.add_argument(
        "--workers", type=int, default=cores(), help="worker processes (default: all cores, %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.workers < 1:
        raise UserError("--workers", f"{options.workers} is below 1", "Give another number")
    faults = check_set(expand_user(options.root), options.all, options.workers)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        print(f"delete {options.root} and prepare it again with `maskvlm data`", file=sys.stderr)
    return ExitCode.BAD_DATA if faults else ExitCode.DONE


def check_raw(raw: str) -> None:
    """Check that RAW is a possible name of a file or folder.

    Raises:
        UserError: it has a null byte, is not text, or is too long (66).
    """
    try:
        check_set_path(expand_user(raw))
    except UserError as error:
        what, todo = "there is no such file or folder", "Name the set's folder or file"
        raise UserError(error.where, what, todo, ExitCode.MISSING_INPUT) from error


def check_places(name: str, raw: str, root: Path) -> str:
    """Location of the raw set, as recorded in the manifest.

    Raises:
        UserError: RAW is the folder to be created or lies in it, or that folder lies in RAW and the reader is `folder`
            (77).
    """
    source = expand_user(raw)
    if not source.exists():
        return raw  # a name on the hub, or an error that `open_raw` will report
    source, target = source.resolve(), root.resolve()
    todo = "Give the prepared set another folder (NAME= or DATA_ROOT=)"
    # preparing a set may delete files in its folder
    if source == target or target in source.parents:
        raise UserError(raw, f"RAW is inside the folder to be created, {root}", todo, ExitCode.REFUSED)
    # only this reader walks through everything in RAW
    if name == "folder" and source in target.parents:
        what = f"the folder to be created, {root}, is inside RAW and would be read as part of it"
        raise UserError(raw, what, todo, ExitCode.REFUSED)
    return str(source)


def named_columns(options: list[str]) -> dict[str, str]:
    """`image=path,caption=text` -> role -> column."""
    columns = {}
    for part in (each for words in options for each in words.split(",")):
        role, equals, column = part.partition("=")
        if role.strip() not in ROLES or not equals or not column.strip():
            raise UserError("--columns", f"'{part}' is not ROLE=COLUMN", f"Available roles: {', '.join(ROLES)}")
        if role.strip() in columns:
            todo = "Give one column; captions of several columns can be rows of their own, with the same image"
            raise UserError("--columns", f"{role.strip()} is named twice", todo)
        columns[role.strip()] = column.strip()
    return columns


def tell_newer(raw: Path, root: Path) -> None:
    """Print a warning if the single file from which a set was made is newer than the set: a corrected table would
    otherwise be silently ignored."""
    if raw.is_file() and raw.stat().st_mtime > (root / MANIFEST).stat().st_mtime:
        todo = f"to prepare the set again, delete {root} first, or give it another name (NAME=)"
        print(f"warning: {raw} was written after this set; {todo}", file=sys.stderr, flush=True)
