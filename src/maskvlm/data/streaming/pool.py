"""Processes that make shards, and a progress line.

They are forked from a server that has already done the imports (or spawned, if the system has no such server), as
forking a process with threads may hang. They end with the process that started them, however that ends.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from maskvlm.data.prepare.shards import Job, PreparationStopped, Settings, ShardNote, make_shard
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.status_bar import StatusBar

REPORT_EVERY = 30.0  # seconds between lines without a terminal
WINDOW = 30.0  # seconds over which the speed is measured


def process_context() -> Any:
    """The multiprocessing context, see above."""
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        # the server imports once; each process is forked from it after the imports
        context.set_forkserver_preload(["maskvlm.data.prepare.shards"])
        start_server()
    return context


def start_server() -> None:
    """Start the fork server with Ctrl-C blocked. Ctrl-C reaches every process of a terminal, so the server and its
    children would otherwise end in the middle of an import with a traceback. Only the first process handles it."""
    from multiprocessing import forkserver, resource_tracker

    # otherwise the server would start it, which unblocks SIGINT
    resource_tracker.ensure_running()
    # a new process inherits the blocked signals; in this process the signal is pending, not lost
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interrupted_later() -> Iterator[None]:
    """Delay a Ctrl-C to the end of this context. The pool does not yet know a process that is being started and would
    not wait for it: that process would find its shared resources gone and end with a traceback."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda signum, _: noted.append(signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if noted:
        signal.raise_signal(signal.SIGINT)


# ------------------------------------------------------------------ in the processes

# set by `at_work` once per process, rather than with every job
_AT_WORK: dict[str, Any] = {}


def watched() -> None:
    """Run first in each process: it leaves Ctrl-C to the first process, and ends when that one does."""
    # Ctrl-C reaches all processes of a terminal; the first one stops the others through `stop`
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # no process of a killed run may keep writing

    threading.Thread(target=watch, daemon=True).start()


def at_work(root: Path, settings: Settings, counts: Any, stop: Any) -> None:
    """Initialise a process for `work`."""
    watched()
    _AT_WORK.update(root=root, settings=settings, counts=counts, stop=stop)


def work(job: Job) -> int:
    """Make a shard; returns its number of rows."""
    counts, stop = _AT_WORK["counts"], _AT_WORK["stop"]

    def tick(used: bool) -> None:
        if stop.is_set():
            # leaves `whole_set_file`, which removes the partly written shard
            raise PreparationStopped
        with counts.get_lock():
            # index 0: used, index 1: left out
            counts[not used] += 1

    note: ShardNote = make_shard(_AT_WORK["root"], _AT_WORK["settings"], job, tick)
    return note.rows


# ------------------------------------------------------------------ in the first process


class Pool:
    """Processes for `work`; they are stopped when the context is left.

    Attributes:
        counts: number of rows used and left out so far.
    """

    def __init__(self, workers: int, root: Path, settings: Settings) -> None:
        context = process_context()
        self.workers, self.root = workers, root
        # shared memory, passed once when a process starts
        self.counts, self._stop = context.Array("q", 2), context.Event()
        self._pool = ProcessPoolExecutor(workers, context, at_work, (root, settings, self.counts, self._stop))

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # processes stop at their next row; wait for them, so that nothing is written later
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            what = "a process of the preparation was killed, perhaps because memory ran out"
            todo = "Run the same command again (finished shards are kept), with fewer --workers if memory is short"
            raise UserError(self.root, what, todo, ExitCode.IO_ERROR) from error

    def submit(self, job: Job) -> Future[int]:
        """Submit a job."""
        try:
            # the first job starts the processes
            with interrupted_later():
                return self._pool.submit(work, job)
        except (EOFError, ConnectionError) as error:  # the fork server is gone
            raise BrokenProcessPool("no process can be started") from error


class Stage:
    """`1,200 of about 113,287  118 images/s  3 left out  0:15:50 left`: a bar on a terminal, otherwise lines.

    Args:
        total: expected number of images; None if unknown.
        counts: running counts of rows used and left out.
        say: called with a line if there is no terminal.
    """

    def __init__(self, name: str, total: int | None, counts: Any, say: Callable[[str], None]) -> None:
        self.name, self.total, self.counts, self.say = name, total, counts, say
        self.reported_at = time.monotonic()
        self.past: deque[tuple[float, int]] = deque([(self.reported_at, 0)])
        self.bar = StatusBar(name, total, Console(stderr=True))

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self) -> None:
        """Report the progress, if it is due."""
        now = time.monotonic()
        used, left_out = self.counts[:]
        # the last WINDOW seconds, in steps of half a second; two entries are kept for the speed
        if now - self.past[-1][0] >= 0.5:
            self.past.append((now, used + left_out))
        while now - self.past[0][0] > WINDOW and len(self.past) > 2:
            self.past.popleft()
        if self.bar.drawn:
            self.bar.show(used + left_out, self.line())
        elif now - self.reported_at >= REPORT_EVERY:
            self.reported_at = now
            self.say(f"{self.name}  {self.line()}")

    def line(self) -> str:
        """The progress in words."""
        used, left_out = self.counts[:]
        (first, before), (last, after) = self.past[0], self.past[-1]
        speed = (after - before) / (last - first) if last > first else 0.0
        expected = f" of about {self.total:,}" if self.total else ""
        line = f"{used:,}{expected}  {speed:.0f} images/s  {left_out:,} left out"
        remaining = (self.total or 0) - used - left_out
        return f"{line}  {timedelta(seconds=round(remaining / speed))} left" if remaining > 0 and speed else line
