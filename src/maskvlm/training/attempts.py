"""Notes in a side file in which step a run died, and how often, so that one command does not die the same way forever.

`attempts.json` holds the step that is under way. It is there while a training runs, and after one that died, however it
died. A training that ends well, or is asked to end, or meets a full disk or the like, removes it. Reading it changes
nothing, so that all processes of a job come to the same conclusion.
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
"""After BEFORE failures in one step a run goes on from the checkpoint before the latest; after MOST not at all."""
SIZE = 100  # bytes
# Device, folder and disk: the same step may pass elsewhere.
NOT_THE_RUNS = (ExitCode.UNAVAILABLE, ExitCode.CANNOT_CREATE, ExitCode.IO_ERROR)


class Failures(NamedTuple):
    """The step (counted from 1) that the latest attempts died in, and how many in a row."""

    step: int | None = None
    times: int = 0


def failures(folder: Path) -> Failures:
    """The failures that the side file of a run tells; none where it is missing or damaged."""
    try:
        with (folder / NAME).open("rb") as file:
            record = json.loads(file.read(SIZE))
        before, times, step = record["failed_in"], record["times"], record["step"]
        if not all(value is None or type(value) is int for value in (before, times, step)):
            return Failures()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Failures()
    if step is None:  # died before its first step: that says nothing new
        return Failures(before, times or 0)
    # Counted by the next start, as a process that is killed writes nothing.
    return Failures(step, (times or 0) + 1 if step == before else 1)


def forget(folder: Path) -> None:
    """Remove the side file of a run that ended as it should."""
    with suppress(OSError):
        (folder / NAME).unlink(missing_ok=True)


def check_attempts(folder: Path) -> Failures:
    """The failures so far, where the run may be tried again.

    Raises:
        UserError: it died too often in the same step (77).
    """
    past = failures(folder)
    if past.times >= MOST:
        what = f"the run died {past.times} times in step {past.step}"
        todo = f"Find the cause (crash.txt, the job's output), then delete {folder / NAME} to try again"
        raise UserError(folder, what, todo, ExitCode.REFUSED)
    return past


class Attempt:
    """Notes the step that is under way; a few microseconds a step. A full disk costs the note, not the run.

    Raises:
        UserError: a link stands in the file's place (77).
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, failures(folder)
        self.handle = -1
        with suppress(OSError):
            self.handle = open_no_link(folder / NAME, os.O_RDWR | os.O_CREAT)
        # At once: a run that dies before its first step leaves the earlier failures as they are.
        self.note(None)
        with suppress(OSError):  # after the note: of a damaged file nothing stays
            os.ftruncate(self.handle, SIZE)

    def note(self, step: int | None) -> None:
        """step: counted from 1; None before the first."""
        if self.handle >= 0:
            facts = {"failed_in": self.before.step, "times": self.before.times, "step": step}
            with suppress(OSError):
                # As many bytes each time: a full disk has room. No fsync: the note outlives its process, as it must.
                os.pwrite(self.handle, json.dumps(facts).ljust(SIZE - 1).encode() + b"\n", 0)

    def close(self) -> None:
        """Stop noting. The last note stays until the run has come to its end."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1


@contextmanager
def attempted(folder: Path) -> Iterator[None]:
    """Context of a training. A request to stop and a fault of a disk, device or folder count as no failure."""
    try:
        yield
    except BaseException as error:
        if not counts(error):
            forget(folder)
        raise


def counts(error: BaseException) -> bool:
    """Whether an error may come again at the same step for a reason that lies in the run."""
    if isinstance(error, OSError):
        return cannot_write(error) is None
    if isinstance(error, UserError):
        return error.code not in NOT_THE_RUNS
    # Ctrl-C and a plain exit are no Exceptions.
    return isinstance(error, Exception) and not isinstance(error, Stopped)
