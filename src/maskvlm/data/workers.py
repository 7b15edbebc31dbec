"""Data workers: tracks the sample that each is reading, so that failures are reported with their cause and sample.

A worker records each sample before it reads it, in a few bytes of shared memory. A worker that is killed, hangs or runs
out of memory then ends the command with one line and exit status 74.
"""

import atexit
import multiprocessing
import multiprocessing.queues
import os
import re
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.signals import end_with_parent

PATIENCE = 120.0  # seconds that the main process waits for a batch
AHEAD = 2  # batches that each worker prepares (torch's prefetch_factor)
SHARED = "/dev/shm"  # where torch keeps the batches passed by workers
FULL = f"{SHARED} is full"
NO_SPACE = "unable to allocate shared memory"  # torch's words
FEWER = "Lower data.workers or data.batch_size"
LARGER = f"{FEWER}, or make {SHARED} larger (docker run --shm-size 8g or --ipc host)"
ALONE = "Look at this sample; data.workers 0 reads it in the main process"
# pid, state, sample and time of an `At`, 32 bytes
HEAD = struct.Struct("=qqqd")
BYTES = 512  # per worker
IDLE, READS, ENDS = 0, 1, 2


class At(NamedTuple):
    """A worker's status. since: on the system's monotonic clock; text: the row's origin, or why the worker ends."""

    pid: int
    state: int
    sample: int
    since: float
    text: str

    def __str__(self) -> str:
        number = f"sample {self.sample}" if self.sample >= 0 else "a sample"
        return f"{number} ({self.text})" if self.text else number


class Board:
    """The status of each of a loader's workers, in memory shared with the main process."""

    def __init__(self, workers: int) -> None:
        # (workers, BYTES); no lock: each worker writes its own row, and a torn status only affects messages
        self.shared_WN = torch.zeros(workers, BYTES, dtype=torch.uint8).share_memory_()

    def write(self, worker: int, at: At) -> None:
        """Write a worker's status; a long text is cut."""
        # the null byte ends the text, as an older, longer one may follow it
        row = HEAD.pack(*at[:4]) + at.text.encode(errors="replace")[: BYTES - HEAD.size - 1] + b"\0"
        self.shared_WN[worker].numpy()[: len(row)] = np.frombuffer(row, np.uint8)

    def read(self) -> list[At]:
        """The status of all workers, in order."""
        rows = [row.numpy().tobytes() for row in self.shared_WN]
        texts = [row[HEAD.size :].partition(b"\0")[0].decode(errors="replace") for row in rows]
        return [At._make((*HEAD.unpack_from(row), text)) for row, text in zip(rows, texts, strict=True)]


class Notes:
    """The status of this process; also written to a board if it is a worker."""

    def __init__(self) -> None:
        self.board: Board | None = None
        self.worker = 0
        self.now = At(0, IDLE, -1, 0.0, "")

    def __call__(self, state: int, sample: int, text: str = "") -> None:
        self.now = At(os.getpid(), state, sample, time.monotonic(), text)
        if self.board is not None:
            self.board.write(self.worker, self.now)


NOTE = Notes()
BOARDS: list[Board] = []  # of the loaders of this process, the newest last


def at(origin: str, image_id: str = "") -> None:
    """Record the row being read; called by its data set as soon as it is known, before the image is decoded."""
    NOTE(READS, NOTE.now.sample, f"{origin}, {image_id}" if image_id not in origin else origin)


class Begin:
    """Initialises a worker. Args: number of workers on its board."""

    def __init__(self, workers: int) -> None:
        self.board = Board(workers)
        # bounded, as a process may create any number of loaders
        BOARDS[:] = [*BOARDS[-7:], self.board]

    def __call__(self, worker: int) -> None:
        # also makes the worker ignore SIGTERM and Ctrl-C, which the main process handles
        end_with_parent(worker)
        # the board's memory is shared with the main process
        NOTE.board, NOTE.worker = self.board, worker
        NOTE(IDLE, -1)
        # Python drops a batch that cannot be sent, and the main process would wait for it.
        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(cannot_hand_over)  # type: ignore[attr-defined]
        sys.excepthook = uncaught


def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception that ends a worker, except a broken connection, which the main process has explained."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def cannot_hand_over(error: Exception, thing: object) -> None:
    """End a worker whose finished batch cannot be sent to the main process, and say why."""
    full = NO_SPACE in str(error)
    NOTE(ENDS, NOTE.now.sample, FULL if full else f"it could not pass on a batch: {error}")
    # exit at once, as this runs in the queue's own thread, where an exception would end nothing else
    os._exit(int(ExitCode.IO_ERROR))


# ---------------------------------------------------------------------- reading


class Noted(Dataset[Any]):
    """A data set that records which sample is being read."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, pick: Any) -> Any:
        # training picks by (row, epoch), evaluation by number
        NOTE(READS, getattr(pick, "row", pick))
        with naming():
            return self.data[pick]


class NotedStream(IterableDataset[Any]):
    """The same for a stream, whose samples have no number."""

    def __init__(self, data: Any) -> None:
        self.data = data
        # `StreamLoader` reads them from its data set
        self.batches, self.start = data.batches, data.start

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self.data)
        while True:
            NOTE(READS, -1)
            with naming():
                # not `for`, as reading the next sample must be inside `naming`
                sample = next(samples, None)
            if sample is None:
                return
            yield sample


class Collated:
    """Makes a batch of samples with `collate`, after which the worker is idle."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        with naming():
            batch = self.collate(samples)
        # the sample stays in the status, to say after which one something happened
        NOTE(IDLE, NOTE.now.sample, NOTE.now.text)
        return batch


@contextmanager
def naming() -> Iterator[None]:
    """Add the sample being read to errors raised inside."""
    try:
        yield
    except Exception as error:
        if lack := no_memory(error):
            raise lack from None
        # a note, not another exception, as the type determines the exit status
        error.add_note(f"while reading {NOTE.now}")
        raise


def no_memory(error: Exception) -> UserError | None:
    """A one-line error (74) if the cause is lack of memory, else None."""
    if isinstance(error, MemoryError):
        what = f"no memory left at {NOTE.now} ({str(error) or 'MemoryError'})"
        return UserError("data worker", what, f"{FEWER}, or give the job more memory", ExitCode.IO_ERROR)
    if NO_SPACE in str(error):
        return UserError(SHARED, f"is full at {NOTE.now}", LARGER, ExitCode.IO_ERROR)
    return None


def noted_loader(
    kind: type[DataLoader[Any]], data: Any, collate: Callable[[Any], Any], workers: int, **settings: Any
) -> DataLoader[Any]:
    """A loader whose workers record their status, and that waits at most `PATIENCE` for a batch."""
    noted = NotedStream(data) if isinstance(data, IterableDataset) else Noted(data)
    if workers:
        # without workers torch rejects a timeout; the caller's `settings` take precedence
        settings = {"timeout": PATIENCE, "worker_init_fn": Begin(workers)} | settings
    return kind(noted, collate_fn=Collated(collate), num_workers=workers, **settings)


# ---------------------------------------------------------------------- in the main process


@atexit.register
def end_workers() -> None:
    """Kill the remaining workers at the end of this process, which would wait for them (SIGTERM: `signals.py`)."""
    # pids that workers wrote themselves, so that no other child is killed
    if pids := {at.pid for board in BOARDS for at in board.read()}:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise in other exit code
    for child in multiprocessing.active_children():
        if child.pid in pids:
            child.kill()


def check_shared(batch: int, workers: int, processes: int = 1) -> None:
    """Check, before workers start, that shared memory has room for their batches.

    Args:
        batch: bytes of one batch's images.
        workers: number of workers of one process.
        processes: number of processes on this machine.

    Raises:
        UserError: there is not enough room (74).
    """
    if not os.path.isdir(SHARED):
        return  # macOS and Windows have no such folder
    # each worker prepares AHEAD batches, and one is in use
    room, needed = os.statvfs(SHARED), (AHEAD * workers + 1) * batch * processes
    free = room.f_bavail * room.f_frsize
    if free < needed:
        what = f"{free / 1e6:,.1f} MB are free, {processes} x {workers} data workers prepare {needed / 1e6:,.1f} MB"
        raise UserError(SHARED, what, LARGER, ExitCode.IO_ERROR)


def lost_worker(text: str) -> UserError | None:
    """Turn torch's message about a worker that died or is late into an error with cause and samples; else None.

    Args:
        text: text of torch's RuntimeError, which may be raised in the main process at any moment (by a signal).
    """
    died = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]+)|exited)", text)
    if died:
        pids = {int(pid) for pid in died[1].split(",")}
        # the board outlives its worker, so its last status is still there
        fallen = [at for board in BOARDS for at in board.read() if at.pid in pids]
        return UserError(f"data worker (process {died[1]})", *cause_of(died[2], fallen), ExitCode.IO_ERROR)
    late = re.search(r"DataLoader timed out after (\d+)", text)
    if late:
        now = time.monotonic()
        # the one that has spent the longest on its sample first
        slow = sorted((at for board in BOARDS for at in board.read() if at.state == READS), key=lambda at: at.since)
        each = [f"process {at.pid} has been at {at} for {now - at.since:.0f} s" for at in slow[:3]]
        what = f"no batch arrived within {late[1]} s; {'; '.join(each) or 'none of them is reading'}"
        todo = "Look at these samples, and at the disk or network they come from"
        return UserError("data workers", what, todo, ExitCode.IO_ERROR)
    return None


def cause_of(killed_by: str | None, fallen: list[At]) -> tuple[str, str]:
    """What happened to workers, and what to do."""
    where = ", ".join(map(str, fallen)) or "an unknown sample"
    # the worker itself recorded why it ends (`cannot_hand_over`)
    if ended := next((at for at in fallen if at.state == ENDS), None):
        return f"{ended.text} (after sample {ended.sample})", LARGER if ended.text == FULL else ALONE
    if killed_by == "Killed":
        what = f"was killed at {where}, perhaps by the system because memory ran out"
        return what, f"{FEWER}, or give the job more memory"
    # SIGBUS: a page of mapped memory without a file or memory behind it
    if killed_by == "Bus error":
        what = f"met a bus error at {where}: {FULL}, or a file was truncated while it was read"
        return what, f"Check the data (maskvlm data-check). {LARGER}"
    how = f"was ended ({killed_by.lower()})" if killed_by else "ended by itself"
    return f"{how} at {where}", ALONE
