"""Is this file an intact checkpoint? Answered without unpickling any of it.

Beside each checkpoint is a `.sha256` file with its size and hash. The checksums inside a checkpoint's own archive are
checked as well; without a `.sha256` they are the only check. `torch.load` does not check these, so a flipped bit would
load as another number.
"""

import hashlib
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from maskvlm.checkpoint.pickles import check_pickle
from maskvlm.config.bundled_models import bundled_models
from maskvlm.config.given_options import nearest
from maskvlm.data.safe_open import content_of, opened
from maskvlm.utils.errors import ExitCode, UserError

SIDE = ".sha256"
ZIP = b"PK\x03\x04"
ANOTHER = "Copy it again, or use another checkpoint of the run"


class Fact(NamedTuple):
    """Size and hash of a valid content of a checkpoint file, from its `.sha256`."""

    size: int
    sha256: str


def verify_checkpoint(path: str | Path) -> None:
    """Check kind, size and content of a checkpoint file without unpickling any of it; raises as `load`."""
    path = Path(path)
    if not path.exists():
        others = ", ".join(sorted(p.name for p in path.parent.glob("*.ckpt"))) or "no checkpoint"
        near = nearest(str(path), models_here(), 0.7)
        what = f"not there ({path.parent} holds {others})" + (f" (did you mean {near}?)" if near else "")
        raise bad(path, what, f"Check the path; there are: {', '.join(models_here())}", ExitCode.MISSING_INPUT)
    if path.is_dir():
        todo = f"Name a file in it, such as {path / 'last.ckpt'}"
        raise bad(path, "is a folder", todo, ExitCode.MISSING_INPUT)
    # The cheap checks first: kind and size, then the hash of the whole file, then the archive.
    facts, size = stated(path), path.stat().st_size
    _check_kind(path, facts)
    # There are two valid contents if a save was interrupted at its rename.
    if facts and all(size < fact.size for fact in facts):
        raise bad(path, f"truncated ({size} of {facts[-1].size} bytes)", ANOTHER)
    if facts and sha256_of(path) not in {fact.sha256 for fact in facts}:
        raise bad(path, f"damaged (its sha256 differs from {side_file(path).name})", ANOTHER)
    _check_archive(path)


def models_here() -> list[str]:
    """The best checkpoints of the runs in `checkpoints/`, and the bundled models, as they are named in a command."""
    return [*sorted(str(file) for file in Path("checkpoints").glob("*/best.ckpt")), *bundled_models()]


def newest_valid(folder: str | Path, warn: Callable[[str], None] = print) -> Path | None:
    """The newest intact checkpoint of a folder; None if there are no checkpoints.

    Args:
        folder: a run's folder.
        warn: called once for each newer checkpoint that was skipped; the file stays where it is.

    Raises:
        UserError: there are checkpoints, but all are damaged (77). A fresh start must be requested explicitly.
    """
    # In a copied folder, modification times mean nothing: a run resumes from these two, in this order.
    first = {"last.ckpt": 2, "previous.ckpt": 1}
    there = [path for path in Path(folder).glob("*.ckpt") if path.exists()]  # excludes broken links
    candidates = sorted(there, key=lambda p: (first.get(p.name, 0), p.stat().st_mtime_ns))[::-1]
    for path in candidates:
        try:
            verify_checkpoint(path)
        except UserError as error:
            warn(f"{error} Skipped.")
        else:
            return path
    if candidates:
        what = f"all {len(candidates)} checkpoints are damaged"
        raise bad(folder, what, "Start a new run in another folder (--folder), or restore a backup", ExitCode.REFUSED)
    return None


def _check_kind(path: Path, facts: list[Fact]) -> None:
    with opened(path) as file:  # regular files only: reading a pipe would block
        head = file.read(512)
    text = head.lstrip().lower()
    if head.startswith(ZIP):
        return
    # Not an archive: a specific message for each kind of file often mistaken for one.
    if ZIP.startswith(head):  # the first few bytes of an archive, or an empty file
        raise bad(path, f"truncated ({len(head)} of {facts[-1].size if facts else 'unknown'} bytes)", ANOTHER)
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise bad(path, "is an HTML page, not a checkpoint", "Download the file itself")
    if text.startswith(b"version https://git-lfs"):
        raise bad(path, "is a Git LFS pointer, not a checkpoint", "Fetch it with `git lfs pull`")
    # safetensors: 8 bytes with the length of the header, then the header, which is JSON.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        what = "is a safetensors file: bare weights, not a run's checkpoint"
        raise bad(path, what, "Give it as an encoder's `weights`")
    # The first instruction of a pickle since protocol 2.
    if head.startswith(b"\x80"):
        what = "is a bare pickle, which could run code on loading"
        raise bad(path, what, "Save its tensors with safetensors or torch.save", ExitCode.REFUSED)
    raise bad(path, f"is not a checkpoint (it starts with {head[:8]!r})", "Check the path")


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            stored = all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
            # Overlapping members could expand to any size.
            if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
                raise zipfile.BadZipFile("its members are larger than the file: they overlap")
            # Reads every member; a compressed one could expand without limit.
            broken = archive.testzip() if stored else None
    except Exception as error:  # zipfile raises many types for what a flipped bit can do
        raise bad(path, f"truncated or damaged ({first_line(error)})", ANOTHER) from error
    if not any(name.endswith("data.pkl") for name in names):
        raise bad(path, f"is a zip archive without data.pkl ({len(names)} members)", "Check the path")
    if not stored:
        raise bad(path, "is a compressed archive, which torch never writes", "Check the path")
    if broken is not None:
        raise bad(path, f"damaged (checksum of its member {broken})", ANOTHER)
    check_pickle(path)


def stated(path: Path) -> list[Fact]:
    """The contents that the `.sha256` beside a checkpoint accepts; empty if it is missing or unreadable."""
    try:
        # Two lines for each content, as written by `_write_side`: size, then hash and name.
        lines = content_of(side_file(path), 10_000).decode().splitlines()
        sizes = [int(line.split()[1]) for line in lines if line.startswith("#")]
        hashes = [line.split()[0] for line in lines if not line.startswith("#")]
        return [Fact(size, sha256) for size, sha256 in zip(sizes, hashes, strict=True)]
    except (UserError, ValueError, IndexError):
        return []


def sha256_of(path: Path) -> str:
    """SHA-256 of the whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def side_file(path: Path) -> Path:
    """The file with the hash of a checkpoint, such as `last.ckpt.sha256`."""
    return path.with_name(path.name + SIDE)


def bad(where: object, what: str, todo: str, code: ExitCode = ExitCode.BAD_DATA) -> UserError:
    """The error for a file that is not what it should be (exit code 65 by default)."""
    return UserError(where, what, todo, code)


def refused_imports(error: BaseException) -> str:
    """What a pickle would import, taken from torch's error. That message itself advises loading the file anyway."""
    return ", ".join(dict.fromkeys(re.findall(r"GLOBAL ([\w.]+)", str(error)))) or "it holds more than plain types"


def first_line(error: BaseException) -> str:
    """First line of an error of torch, without its advice to turn off the protection."""
    text = str(error).strip()
    if refused := re.search(r"(?:WeightsUnpickler error: |Trying to load )(.+?)(?:\. Please|\.?\n|$)", text):
        return refused[1][:200]
    line = (text.splitlines() or [""])[0][:200]
    return line if line and "weights_only" not in line else type(error).__name__
