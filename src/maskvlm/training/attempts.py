"""Records in a side file the step in which a run died and how often, so that restarts do not fail the same way forever.

`attempts.json` holds the current step. It exists while a training runs and after one that died, whatever the cause. A
training that ends well, is asked to stop, or meets a full disk or the like removes it. Reading it changes nothing, so
all processes of a job come to the same conclusion.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.launch import Stopped
from maskvlm.utils.whole_files import open_no_link
from maskvlm.utils.write_errors import cannot_write

NAME = "attempts.json"
BEFORE, MOST = 2, 4
"""After BEFORE failures in the same step a run resumes from the previous checkpoint; after MOST it does not resume."""
SIZE = 100  # bytes
# Device, folder and disk: the same step may succeed elsewhere.
NOT_THE_RUNS = (ExitCode.UNAVAILABLE, ExitCode.CANNOT_CREATE, ExitCode.IO_ERROR)


class Failures(NamedTuple):
    """The step (counted from 1) that the latest attempts died in, and how many in a row."""

    step: int | None = None
    times: int = 0


def failures(folder: Path) -> Failures:
    """The failures recorded in a run's side file; none if it is missing or damaged."""
    try:
        with (folder / NAME).open("rb") as file:
            record = json.loads(file.read(SIZE))
        before, times, step = record["failed_in"], record["times"], record["step"]
        if not all(value is None or type(value) is int for value in (before, times, step)):
            return Failures()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Failures()
    if step is None:  # died before its first step: nothing new to count
        return Failures(before, times or 0)
    # Counted at the next start, since a killed process writes nothing.
    return Failures(step, (times or 0) + 1 if step == before else 1)


def forget(folder: Path) -> None:
    """Remove the side file of a run that ended as it should."""
    with suppress(OSError):
        (folder / NAME).unlink(missing_ok=True)


def check_attempts(folder: Path) -> Failures:
    """The failures so far, if the run may be tried again.

    Raises:
        UserError: the run died too often in the same step (77).
    """
    past = failures(folder)
    if past.times >= MOST:
        what = f"the run died {past.times} times in step {past.step}"
        todo = f"Find the cause (crash.txt, the job's output), then delete {folder / NAME} to try again"
        raise UserError(folder, what, todo, ExitCode.REFUSED)
    return past


class Attempt:
    """Records the current step, at a cost of a few microseconds per step. A full disk costs the record, not the run.

    Raises:
        UserError: the file's path is a link (77).
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, failures(folder)
        self.handle = -1
        with suppress(OSError):
            self.handle = open_no_link(folder / NAME, os.O_RDWR | os.O_CREAT)
        # Immediately, so that a run that dies before its first step keeps the earlier failures.
        self.note(None)
        with suppress(OSError):  # after the note, so that nothing of a damaged file remains
            os.ftruncate(self.handle, SIZE)

    def note(self, step: int | None) -> None:
        """Record the current step, counted from 1; None before the first."""
        if self.handle >= 0:
            facts = {"failed_in": self.before.step, "times": self.before.times, "step": step}
            with suppress(OSError):
                # Always the same size, so it fits on a full disk. No fsync: the note only has to outlive its process.
                os.pwrite(self.handle, json.dumps(facts).ljust(SIZE - 1).encode() + b"\n", 0)

    def close(self) -> None:
        """Stop recording. The last note stays until the run has finished."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1


@contextmanager
def attempted(folder: Path) -> Iterator[None]:
    """Context of a training. A request to stop, or a disk, device or folder fault, does not count as a failure."""
    try:
        yield
    except BaseException as error:
        if not counts(error):
            forget(folder)
        raise


def counts(error: BaseException) -> bool:
    """Whether an error may recur at the same step for a reason that lies in the run itself."""
    if isinstance(error, OSError):
        return cannot_write(error) is None
    if isinstance(error, UserError):
        return error.code not in NOT_THE_RUNS
    # Ctrl-C and a plain exit are not Exceptions.
    return isinstance(error, Exception) and not isinstance(error, Stopped)
