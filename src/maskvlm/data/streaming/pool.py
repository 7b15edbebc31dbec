"""Processes that make shards, and the line that says how far they are.

They are started by a server that has the imports already (or anew, where the system knows no such server): forking
a process that has threads may hang. They end with the process that started them, however that ends.
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

REPORT_EVERY = 30.0  # seconds between lines where there is no terminal
WINDOW = 30.0  # seconds that the speed is of


def process_context() -> Any:
    """How processes are started: see above."""
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        # the server imports once; each process is forked from it with the imports done
        context.set_forkserver_preload(["maskvlm.data.prepare.shards"])
        start_server()
    return context


def start_server() -> None:
    """Start the server of processes deaf to Ctrl-C, which reaches every process of a terminal: it, and what is forked
    from it, would end in the middle of an import with a traceback. The first process alone decides."""
    from multiprocessing import forkserver, resource_tracker

    # the server would start it first, which opens SIGINT again
    resource_tracker.ensure_running()
    # a new process inherits what is blocked; here the signal waits, and is not lost
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interrupted_later() -> Iterator[None]:
    """A Ctrl-C in here takes effect at the end. A process that is being started is not known to its pool yet, so that
    nobody would wait for it: it would find what it shares with the first one gone, and end with a traceback."""
    if threading.current_thread() is not threading.main_thread():  # which alone handles signals
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

# what `at_work` sets once a process, rather than with every job
_AT_WORK: dict[str, Any] = {}


def watched() -> None:
    """First thing in each process: it leaves Ctrl-C to the first process, and ends when that does."""
    # Ctrl-C reaches all processes of a terminal; the first one stops the others by `stop`
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # no process of a run that was killed may go on writing

    threading.Thread(target=watch, daemon=True).start()


def at_work(root: Path, settings: Settings, counts: Any, stop: Any) -> None:
    """What `work` needs."""
    watched()
    _AT_WORK.update(root=root, settings=settings, counts=counts, stop=stop)


def work(job: Job) -> int:
    """Make a shard; its rows."""
    counts, stop = _AT_WORK["counts"], _AT_WORK["stop"]

    def tick(used: bool) -> None:
        if stop.is_set():
            # leaves `whole_set_file`, which removes the half-written shard
            raise PreparationStopped
        with counts.get_lock():
            # place 0: used, place 1: left out
            counts[not used] += 1

    note: ShardNote = make_shard(_AT_WORK["root"], _AT_WORK["settings"], job, tick)
    return note.rows


# ------------------------------------------------------------------ in the first process


class Pool:
    """Processes for `work`; they are told to stop when it is left.

    Attributes:
        counts: rows used and rows left out so far.
    """

    def __init__(self, workers: int, root: Path, settings: Settings) -> None:
        context = process_context()
        self.workers, self.root = workers, root
        # shared memory, handed over once when a process starts
        self.counts, self._stop = context.Array("q", 2), context.Event()
        self._pool = ProcessPoolExecutor(workers, context, at_work, (root, settings, self.counts, self._stop))

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # processes stop at their next row; waiting for them, so that nothing is written later
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            what = "a process of the preparation was killed, perhaps because memory ran out"
            todo = "Run the same command again (finished shards are kept), with fewer --workers if memory is short"
            raise UserError(self.root, what, todo, ExitCode.IO_ERROR) from error

    def submit(self, job: Job) -> Future[int]:
        """Hand a job over."""
        try:
            # the first job starts the processes
            with interrupted_later():
                return self._pool.submit(work, job)
        except (EOFError, ConnectionError) as error:  # the server of the processes is gone
            raise BrokenProcessPool("no process can be started") from error


class Stage:
    """`1,200 of about 113,287  118 images/s  3 left out  0:15:50 left`: a bar on a terminal, elsewhere lines.

    Args:
        total: images to expect, None where unknown.
        counts: used and left out, as they grow.
        say: takes lines where there is no terminal.
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
        """Tell how far it is, if it is time."""
        now = time.monotonic()
        used, left_out = self.counts[:]
        # the past of WINDOW seconds, in steps of half a second; two entries stay for the speed
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
        """What the bar says, in words."""
        used, left_out = self.counts[:]
        (first, before), (last, after) = self.past[0], self.past[-1]
        speed = (after - before) / (last - first) if last > first else 0.0
        expected = f" of about {self.total:,}" if self.total else ""
        line = f"{used:,}{expected}  {speed:.0f} images/s  {left_out:,} left out"
        remaining = (self.total or 0) - used - left_out
        return f"{line}  {timedelta(seconds=round(remaining / speed))} left" if remaining > 0 and speed else line
