"""What cannot be written is one line with the cause, whoever tried; what is written is on the disk before its name."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from maskvlm.checkpoint.io import save
from maskvlm.training.attempts import Attempt
from maskvlm.training.csv_log import Writer
from maskvlm.training.failure import report
from maskvlm.training.peers import FOLDER, Peers
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.lock import RunLock
from maskvlm.utils.whole_files import write_json, write_text
from maskvlm.utils.write_errors import writing

WHOLE_FILES: dict[str, Callable[[Path], object]] = {
    "json": lambda path: write_json(path, {"a": 1}),
    "text": lambda path: write_text(path, "x"),
    "checkpoint": lambda path: save({"state_dict": {}}, path),
}


@pytest.mark.parametrize("kind", WHOLE_FILES)
def test_content_then_name_then_folder_reach_the_disk(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a power loss leaves the old file or the new one; a rename that fails leaves the old one and no other."""
    path, done, fsync, replace = tmp_path / "x", [], os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        done.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def noted_replace(source: Path, target: Path) -> None:
        done.append(("rename", str(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    WHOLE_FILES[kind](path)
    (temporary,) = (name for what, name in done if what == "rename" and name.endswith(".x.tmp"))
    at = done.index(("rename", temporary))
    assert ("fsync", temporary) in done[:at]
    assert ("fsync", str(tmp_path)) in done[at:]

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "x")

    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(UserError):
        WHOLE_FILES[kind](path)
    assert path.read_bytes() == before
    assert not [*tmp_path.glob(".*.tmp")]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A real limit on the size of each file, in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def grow(folder: Path) -> None:
    """A table that was begun."""
    log = Writer(str(folder))
    for step in range(2):
        log.log_metrics({"a": 1.0}, step)
        with largest_file((folder / "metrics.csv").stat().st_size if step else 10**9):
            log.save()


def without_room(kind: str, folder: Path) -> None:
    with largest_file(0):
        WHOLE_FILES[kind](folder / "x")


WRITERS: dict[str, Callable[[Path], object]] = {
    "json": lambda at: without_room("json", at),
    "checkpoint": lambda at: without_room("checkpoint", at),
    "table": grow,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line(writer: str, tmp_path: Path) -> None:
    """/dev/full takes no byte, nor does a file that may have none."""
    with pytest.raises(UserError) as caught, writing(tmp_path):
        WRITERS[writer](tmp_path)
    assert caught.value.code == ExitCode.IO_ERROR
    assert "no space left: disk full (" in caught.value.what or writer == "table"
    assert caught.value.where.startswith(str(tmp_path))


IN_A_RUN: dict[str, tuple[Callable[[Path], object], bool]] = {
    ".m.json.tmp": (lambda at: write_json(at / "m.json", {}), False),
    "crash.txt": (lambda at: report(ZeroDivisionError("x"), at), False),
    "attempts.json": (Attempt, True),
    "run.lock": (lambda at: RunLock().take(at), True),
    f"{FOLDER}/rank-0": (lambda at: Peers(at, "token", 0, 2, 1.0, 1.0).write(), True),
}
"""What a command writes in a run's folder, and whether it refuses a link there."""


@pytest.mark.parametrize("name", IN_A_RUN)
def test_no_link_in_a_runs_folder_is_written_through(name: str, tmp_path: Path) -> None:
    """The folder of a run may be a stranger's: a link in it leads to any file, or to none yet."""
    write, refused = IN_A_RUN[name]
    for run in (tmp_path / "there", tmp_path / "absent"):
        target, link = tmp_path / f"target-{run.name}", run / name
        link.parent.mkdir(parents=True)
        if run.name == "there":
            target.write_text("mine")
        link.symlink_to(target)
        if refused:
            with pytest.raises(UserError, match=rf"{name}: is a symbolic link") as caught:
                write(run)
            assert caught.value.code == ExitCode.REFUSED
        else:
            write(run)
        assert not (run / "m.json").is_symlink()
    assert (tmp_path / "target-there").read_text() == "mine"
    assert not (tmp_path / "target-absent").exists()
