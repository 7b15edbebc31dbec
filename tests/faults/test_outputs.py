"""What cannot be written is one line with the cause, whoever tried: our files, TensorBoard, matplotlib, Pillow."""

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from guards import Build
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from maskvlm.checkpoint.io import save
from maskvlm.checkpoint.provenance import Provenance
from maskvlm.data.inputs import save_image
from maskvlm.data.preview import save_sheet
from maskvlm.reporting.callbacks import try_drawing
from maskvlm.reporting.curves import curves
from maskvlm.training.attempts import Attempt
from maskvlm.training.csv_log import Writer
from maskvlm.training.failure import report
from maskvlm.training.peers import FOLDER, Peers
from maskvlm.training.process_watch import dump_stacks
from maskvlm.training.run_record import RunRecord
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.lock import RunLock
from maskvlm.utils.whole_files import write_json, write_text
from maskvlm.utils.write_errors import cannot_write, writing


def full(path: Path) -> Path:
    """A file that opens, and whose disk is full."""
    path.symlink_to("/dev/full")
    return path


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A real limit on the size of each file, in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def without_room(write: Callable[[], object]) -> None:
    with largest_file(0):
        write()


def events(folder: Path) -> None:
    logger = TensorBoardLogger(str(folder), name="", version="")
    logger.experiment.add_scalar("a", 1.0, 0)
    logger.experiment.flush()
    (path,) = folder.glob("events*")
    path.unlink()
    full(path)
    logger.experiment.add_scalar("a", 2.0, 1)
    logger.experiment.flush()


WRITERS: dict[str, Callable[[Path], object]] = {
    "json": lambda at: without_room(lambda: write_json(at / "m.json", {"a": 1})),
    "text": lambda at: without_room(lambda: write_text(at / "m.txt", "x")),
    "tensorboard": events,
    "matplotlib": lambda at: curves([{"step": 1, "train/a": 1.0}], full(at / "curves.png")),
    "pillow": lambda at: Image.new("RGB", (500, 500)).save(full(at / "x.png")),
    "checkpoint": lambda at: without_room(lambda: save({"state_dict": {}}, at / "x.ckpt")),
}


@pytest.mark.guard("maskvlm.utils.write_errors:cannot_write")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line(writer: str, build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full takes no byte, nor does a file that may have none. TensorBoard's thread dies of it;
    its traceback is not printed."""
    with pytest.raises(UserError) as caught, writing(tmp_path):
        WRITERS[writer](tmp_path)
    assert caught.value.code == ExitCode.IO_ERROR
    assert "no space left: disk full (" in caught.value.what
    assert caught.value.where.startswith(str(tmp_path))
    assert capsys.readouterr().err == ""


@pytest.mark.guard("maskvlm.utils.write_errors:cannot_write")
def test_a_table_that_cannot_grow_is_one_line(build: Build, tmp_path: Path) -> None:
    log = Writer(str(tmp_path))
    log.log_metrics({"a": 1.0}, 0)
    log.save()
    log.log_metrics({"a": 2.0}, 1)
    size = (tmp_path / "metrics.csv").stat().st_size
    with pytest.raises(UserError) as caught, writing(tmp_path), largest_file(size):
        log.save()
    assert caught.value.code == ExitCode.IO_ERROR
    assert caught.value.where == str(tmp_path)


@pytest.mark.guard("maskvlm.utils.write_errors:is_output_error", gives="False")
def test_a_thread_that_cannot_write_prints_no_traceback(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    errors: list[BaseException | None] = []
    before, threading.excepthook = threading.excepthook, lambda args: errors.append(args.exc_value)
    try:
        with writing():
            for error in (OSError(errno.ENOSPC, "x"), ValueError("y")):
                thread = threading.Thread(target=fail, args=(error,))
                thread.start()
                thread.join()
    finally:
        threading.excepthook = before
    assert [type(error) for error in errors] == [ValueError]


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EROFS, ExitCode.CANNOT_CREATE),
        (errno.EACCES, ExitCode.CANNOT_CREATE),
        (errno.EISDIR, ExitCode.CANNOT_CREATE),
        (errno.EDQUOT, ExitCode.IO_ERROR),
        (errno.EIO, ExitCode.IO_ERROR),
        (errno.ESTALE, ExitCode.IO_ERROR),
    ],
)
def test_the_number_tells_the_class(number: int, code: ExitCode) -> None:
    error = cannot_write(OSError(number, os.strerror(number), b"/x/y.csv"))
    assert error is not None
    assert (error.where, error.code) == ("/x/y.csv", code)
    assert os.strerror(number) in error.what


def test_what_is_no_matter_of_writing_stays_what_it_is() -> None:
    assert cannot_write(FileNotFoundError(errno.ENOENT, "x")) is None
    with pytest.raises(FileNotFoundError), writing():
        Path("/no/such/file").read_text()


def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.json").mkdir()
    with pytest.raises(UserError, match=r"m\.json: cannot be written \(Is a directory\)"):
        write_json(tmp_path / "m.json", {})


def drawn(folder: Path) -> None:
    trainer: Any = SimpleNamespace(loggers=[])
    try_drawing(trainer, folder / "curves.png", lambda path: curves([{"step": 1, "train/a": 1.0}], path))


def logged(folder: Path) -> None:
    """The start of a run with Lightning's logger, which writes hparams.yaml by itself."""
    trainer = SimpleNamespace(
        is_global_zero=True, fast_dev_run=False, default_root_dir=folder, datamodule=None, world_size=1, precision="32"
    )
    RunRecord().setup(trainer, None, "fit")  # type: ignore[arg-type]
    TensorBoardLogger(folder, name="", version="").save()


IN_A_RUN: dict[str, tuple[Callable[[Path], object], bool]] = {
    ".m.json.tmp": (lambda at: write_json(at / "m.json", {}), False),
    "crash.txt": (lambda at: report(ZeroDivisionError("x"), at), False),
    "curves.png": (drawn, False),
    "provenance.json": (lambda at: Provenance({}).save(at / "provenance.json"), False),
    "hparams.yaml": (logged, False),
    "stacks-rank0.txt": (lambda at: dump_stacks(at / "stacks-rank0.txt"), False),
    "attempts.json": (Attempt, True),
    "run.lock": (lambda at: RunLock().take(at), True),
    f"{FOLDER}/rank-0": (lambda at: Peers(at, "token", 0, 2, 1.0, 1.0).write(), True),
}
"""What a command writes in a run's folder, and whether it refuses a link there."""


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to none"])
@pytest.mark.parametrize("name", IN_A_RUN)
def test_no_link_in_a_runs_folder_is_written_through(name: str, there: bool, tmp_path: Path) -> None:
    """The folder of a run may be a stranger's: a link in it leads to any file."""
    target, link = tmp_path / "target", tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    if there:
        target.write_text("mine")
    link.symlink_to(target)
    write, refused = IN_A_RUN[name]
    if refused:
        with pytest.raises(UserError, match=rf"{name}: is a symbolic link") as caught:
            write(tmp_path / "run")
        assert caught.value.code == ExitCode.REFUSED
    else:
        write(tmp_path / "run")
    assert target.exists() == there
    assert not there or target.read_text() == "mine"
    assert not (tmp_path / "run" / "m.json").is_symlink()


PICTURE = Image.new("RGB", (500, 500))
NAMED: dict[str, Callable[[Path], object]] = {
    "x.png": lambda at: save_image(PICTURE, at / "x.png"),
    "x.jpg": lambda at: save_image(PICTURE, at / "x.jpg"),
    "sheet.png": lambda at: save_sheet([UserError("a", "b", "c")], at / "sheet.png"),
}
"""What commands write that a user names: `scene`, `explain`, `reconstruct` and `inpaint`; `preview` and `search`."""


@pytest.mark.guard("maskvlm.utils.write_errors:cannot_write")
@pytest.mark.parametrize("name", NAMED)
def test_a_named_file_that_cannot_be_written_is_one_line(name: str, build: Build, tmp_path: Path) -> None:
    write = NAMED[name]
    write(tmp_path / "new")
    assert Image.open(tmp_path / "new" / name).size
    (tmp_path / "taken" / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    for folder, reason in {"taken": "Is a directory", "file": "File exists", "file/below": "Not a directory"}.items():
        with pytest.raises(UserError) as caught:
            write(tmp_path / folder)
        assert caught.value.code == ExitCode.CANNOT_CREATE
        assert caught.value.where == str(tmp_path / folder / name)
        assert caught.value.what == f"cannot be written ({reason})"
    (tmp_path / "full").mkdir()
    full(tmp_path / "full" / name)
    with pytest.raises(UserError, match="disk full") as caught:
        write(tmp_path / "full")
    assert caught.value.code == ExitCode.IO_ERROR
