"""How a command ends when it cannot continue: one line on stderr and an exit status for the kind of cause.

With several processes, the first to fail reports the cause; the others only name that process.
"""

import errno
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from maskvlm.training.peers import blamed
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import whole_file
from maskvlm.utils.write_errors import cannot_write

REQUIRED = {"torch", "torchvision", "lightning", "jsonargparse", "torchmetrics", "transformers", "tokenizers", "timm"}
REQUIRED |= {"datasets", "safetensors", "tensorboard", "rich", "scipy", "matplotlib", "PIL", "numpy", "yaml"}
"""Packages required by setup.cfg, by import name."""

FIRST = "failed-first.txt"  # names the process of a job that failed first; removed when a job starts
EARLIER: list[tuple[str, int]] = []  # its content when this process started: from an earlier job


class ErrorLine(NamedTuple):
    """The text of an error line, and the exit status."""

    text: str
    code: ExitCode


def report(error: BaseException, folder: Path | None = None, debug: bool = False) -> int:
    """Report why the command ends.

    Args:
        error: what ended it.
        folder: the run's folder, where the traceback of a bug is saved; None: `checkpoints`.
        debug: also print the traceback.

    Returns:
        The exit status.
    """
    if debug:
        traceback.print_exception(error)
    lost = blamed(error)
    line = user_line(lost or error) or _bug(error, folder)
    rank = process_rank()
    first = _first_to_fail(folder, rank, line.code)
    if first == rank:
        print(f"error: {'' if rank == 0 else f'[rank {rank}] '}{line.text}", file=sys.stderr)
    else:
        print(f"[rank {rank}] see rank {first}", file=sys.stderr)
    return int(line.code)


def user_line(error: BaseException) -> ErrorLine | None:
    """The line for an error that the user can fix; None for a bug."""
    # torch re-raises a worker's error with its traceback as the text, without cause or attributes.
    if worker := _from_worker(str(error)):
        return worker
    if lost := _worker_lost(error):
        return ErrorLine(_one_line(str(lost)), lost.code)
    cause: BaseException | None = error
    seen_ids = set[int]()
    # A library may raise an error from itself.
    while cause is not None and id(cause) not in seen_ids:
        if isinstance(cause, UserError):
            return ErrorLine(_one_line(str(cause)), cause.code)
        seen_ids.add(id(cause))
        cause = cause.__cause__
    name, text = type(error).__name__, _one_line(str(error))
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return ErrorLine(
            f"{_one_line(str(error.filename))[:60]}...: the name is too long. Give another.", ExitCode.USAGE
        )
    if isinstance(error, OSError) and (write_error := cannot_write(error)):
        return ErrorLine(_one_line(str(write_error)), write_error.code)
    if missing := _missing_package(error):
        return missing
    # By name, so that Lightning and torch are not imported for a command that needs neither.
    if name == "MisconfigurationException":
        return ErrorLine(f"trainer: {text}", ExitCode.USAGE)
    if isinstance(error, MemoryError):
        todo = "Lower data.batch_size or data.workers, or give the job more memory"
        return ErrorLine(f"memory: none is left ({text or name}). {todo}.", ExitCode.IO_ERROR)
    if name == "OutOfMemoryError":
        todo = (
            "Give --model.chunk 16 (pre-training, retrieval: the same losses in less memory), or lower data.batch_size"
        )
        return ErrorLine(f"device: out of memory ({text[:120]}). {todo}.", ExitCode.UNAVAILABLE)
    if type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
        todo = "Give --model.compile false, or install what the compiler lacks (a C++ compiler, Triton)"
        return ErrorLine(f"model.compile: a block cannot be compiled ({text[:120]}). {todo}.", ExitCode.UNAVAILABLE)
    return None


def _from_worker(text: str) -> ErrorLine | None:
    """The line for an error in a data worker, which arrives as the text of its traceback and ends with the error."""
    # Subclasses too: a traceback names the actual class.
    for kind in (UserError, *_all_subclasses(UserError)):
        name = rf"{re.escape(kind.__module__)}\.{kind.__qualname__}"
        # A foreign name in it may span several lines and contain control characters.
        parts = re.split(rf"^{name}: ", text, flags=re.MULTILINE)
        if len(parts) > 1:
            message, *status = re.split(r"^exit status (\d+)$", parts[-1], flags=re.MULTILINE)
            if not status:  # other text may follow
                return ErrorLine(_one_line(message.partition("\n")[0]), ExitCode.BAD_DATA)
            return ErrorLine(_one_line(message), ExitCode(int(status[-2])))
    return None


def _worker_lost(error: BaseException) -> UserError | None:
    """A data worker that died or is late. If no worker was ever started, torch is not imported."""
    if "maskvlm.data.workers" not in sys.modules:
        return None
    from maskvlm.data.workers import lost_worker

    # The cause first: torch's handler names the signal, and if it interrupts torch's own wait for a batch, that wait
    # raises "exited unexpectedly" from it.
    causes = (error.__cause__, error)
    return next((lost for each in causes if each is not None and (lost := lost_worker(str(each)))), None)


def _all_subclasses(kind: type) -> list[type]:
    subclasses: list[type] = kind.__subclasses__()
    return [deep for sub in subclasses for deep in (sub, *_all_subclasses(sub))]


def _missing_package(error: BaseException) -> ErrorLine | None:
    """Error line for an interpreter without a required package, such as one passed to `make` as PYTHON=; else None."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name not in REQUIRED:
        return None
    text = f"{name} is not installed in {sys.executable}. Install this project there: {sys.executable} -m pip install ."
    return ErrorLine(text, ExitCode.UNAVAILABLE)


def _bug(error: BaseException, folder: Path | None) -> ErrorLine:
    text = f"{type(error).__name__}: {error}"
    if "\nOriginal Traceback" in text:  # of a data worker; the error itself comes last
        # Lines of a traceback are indented: the error follows the last of them.
        text = re.split(r"^ .*$", text.rstrip(), flags=re.MULTILINE)[-1]
    text = _one_line(text)[:300].rstrip(".")
    name = f"crash-rank{process_rank()}.txt" if process_rank() else "crash.txt"
    path = (folder or Path("checkpoints")) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            # File names need not be valid text.
            temporary.write_text("".join(traceback.format_exception(error)), "utf-8", "backslashreplace")
    except OSError:
        traceback.print_exception(error)
        return ErrorLine(text, ExitCode.OUR_BUG)
    if place := _of_others(error):
        return ErrorLine(f"{place}: {text}. Fix it there; {path} has the traceback.", ExitCode.OUR_BUG)
    return ErrorLine(f"{text}. This is a bug; {path} has its traceback.", ExitCode.OUR_BUG)


def _of_others(error: BaseException) -> str:
    """File and line of the deepest frame outside this project and installed libraries, such as in a user's own loss;
    "" if there is none."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    # This project, its tasks, Python and installed packages. The deepest frame outside them counts.
    ours = Path(__file__).resolve().parents[1]
    mine = [ours, ours.parents[1] / "tasks", Path(sys.prefix), Path(sys.base_prefix)]
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename).resolve()
        if file.is_file() and not any(file.is_relative_to(folder) for folder in mine):
            place = f"{frame.filename}:{frame.lineno}"
    return place


def process_rank() -> int:
    """This process's rank before any process group exists: torchrun's, the launcher's, or SLURM's. The order is
    Lightning's: processes that it starts within a SLURM step, as in an interactive shell, all inherit that step's rank.
    """
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def _first_to_fail(folder: Path | None, rank: int, code: int) -> int:
    """Rank of the first process to fail. Each process tries to create the same file, and whoever succeeds was first.
    No communication, so no hang."""
    # Lightning's launcher removes WORLD_SIZE on its way out, but not LOCAL_RANK.
    several = "LOCAL_RANK" in os.environ or "RANK" in os.environ or "SLURM_PROCID" in os.environ
    if not several or folder is None or not folder.is_dir():
        return rank
    try:
        # "x" fails if the file exists, that is, for all processes but one.
        with (folder / FIRST).open("x") as file:
            file.write(f"{rank} {int(code)}\n")
        return rank
    except FileExistsError:
        if failed_first(folder) in EARLIER:  # of an earlier job, unrelated to this one
            return rank
        words = _written(folder / FIRST).split()
        return int(words[0]) if words else 0
    except OSError:
        return rank


def _written(path: Path, most: float = 2.0) -> str:
    """The file's text. The file is empty for a moment after it is created, so wait for the text for at most `most`
    seconds (its writer may have been killed just then)."""
    end = time.monotonic() + most
    while not (text := path.read_text()) and time.monotonic() < end:
        time.sleep(0.01)
    return text


def failed_first(folder: Path | None) -> tuple[str, int]:
    """What the first process to fail has written (its rank and exit status), and when; `("", 0)` if there is none."""
    try:
        path = (folder or Path()) / FIRST
        return path.read_text(), path.stat().st_mtime_ns
    except OSError:
        return "", 0


def _one_line(text: str) -> str:
    """The text without line ends and control characters: file names may contain anything."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
