"""The processes of one run as each of them sees the others: which are alive, lost or stuck, and why.

Each process keeps a record in the run's folder and renews it every second. No process queries or waits for another, so
the remaining ones can name the lost or frozen one, whichever it is. Nothing here imports torch.
"""

import json
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import open_no_link

FOLDER = ".processes"  # in the run's folder
BEAT = 1.0  # seconds between two records
WIDTH = 1024  # bytes of a record: it is overwritten in place, which needs no space on a full disk
SILENT = 120.0  # seconds without a new record: the process is frozen, or its machine is gone
AFTER_A_BREAK = 5.0  # the same once a connection is known to be broken
WITHIN = 10.0  # seconds in which the process at fault must then be found
GRACE = 5.0  # seconds given to a main thread that can still end by itself
TO_END = 10.0  # seconds that a process may still take after reporting why it ends
WELL = (ExitCode.DONE, ExitCode.REQUEUE, 130)
# Messages of torch, gloo and NCCL, all raised as RuntimeErrors.
BROKEN = re.compile(
    r"gloo|NCCL|ProcessGroup|TCPStore|c10d|pair closure|^Dist|[Cc]onnection (closed|reset)|[Tt]imed out"
)


class PeerRecord(NamedTuple):
    """What a process reports about itself.

    token: the same in all processes of one start. where: the machine (and container) whose process ids it uses.
    place: its position, which grows through a run and is the same for all processes at the same point; at: in words.
    code: its exit status once it ends. because: the process that caused it to end. why: in words.
    """

    token: str
    rank: int
    host: str
    where: str
    pid: int
    beat: int
    place: tuple[int, int]
    at: str
    code: int | None = None
    because: int | None = None
    why: str = ""


class LostProcess(UserError):
    """Another process of this run is gone: `where` says which, `what` says how.

    Args:
        rank: its rank; None if it is not known.
        where, what, todo, code: see `UserError`.
        grace: seconds in which the main thread may find out as well, and end by itself.
    """

    def __init__(self, rank: int | None, where: str, what: str, todo: str, code: int, grace: float = GRACE) -> None:
        super().__init__(where, what, todo, code)  # type: ignore[arg-type]
        self.rank, self.grace = rank, grace


class Peers:
    """This process and its view of the others.

    Args:
        folder: the run's folder.
        token: agreed on by all processes at rendezvous.
        rank, world: this process's rank, and the number of processes.
        silent: seconds without a sign of life after which a process is considered frozen.
        still: seconds without progress after which a process that others wait for is considered stuck.
    """

    def __init__(self, folder: Path, token: str, rank: int, world: int, silent: float, still: float) -> None:
        self.folder, self.token, self.rank, self.world = folder, token, rank, world
        self.silent, self.still = silent, still
        self.beats, self.place, self.at = 0, (0, 0), "starting"
        self.records: dict[
            int, tuple[PeerRecord, int, int]
        ] = {}  # rank -> its record, looks since its last beat, and since its last move
        self.writes = True
        self.lock = threading.Lock()
        self.leaving = threading.Event()  # the main thread knows why it ends
        self.has_left = threading.Event()  # it has said so
        self.verdict: LostProcess | None = None
        folder.joinpath(FOLDER).mkdir(parents=True, exist_ok=True)

    def move(self, step: int, phase: int, at: str) -> None:
        """Note the point that the main thread has reached."""
        self.place, self.at = (step, phase), at

    # ------------------------------------------------------------------ records

    def path(self, rank: int) -> Path:
        """Path of the record of process `rank`."""
        return self.folder / FOLDER / f"rank-{rank}"

    def write(self, code: int | None = None, because: int | None = None, why: str = "") -> None:
        """Renew this process's record; in place and at once, so that a reader sees it whole."""
        with self.lock:
            if self.has_left.is_set() and code is None:
                return  # this process has ended, or is about to: its last record stays
            self.beats += 1
            mine = (self.token, self.rank, socket.gethostname(), machine_id(), os.getpid(), self.beats)
            # A truncated record is not valid JSON, and readers ignore it.
            row = json.dumps(PeerRecord(*mine, self.place, self.at, code, because, why[:400]))
            try:
                file = open_no_link(self.path(self.rank), os.O_WRONLY | os.O_CREAT)
                try:
                    os.pwrite(file, row.encode()[:WIDTH].ljust(WIDTH), 0)
                finally:
                    os.close(file)
                self.writes = True
            except OSError:
                self.writes = False

    def read(self, rank: int) -> PeerRecord | None:
        """The record of process `rank`; None if it has none from this start (it may have ended well)."""
        try:
            with self.path(rank).open("rb") as file:
                values: list[Any] = json.loads(file.read(WIDTH))
            record = PeerRecord(*values)
            step, phase = record.place
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        numbers = (record.rank, record.pid, record.beat, step, phase)
        # From an earlier start, from another process, or damaged.
        if record.token != self.token or record.rank != rank or not all(type(number) is int for number in numbers):
            return None
        return record._replace(place=(step, phase)) if record.pid > 1 else None  # 0 and -1 mean whole groups

    def clear(self) -> None:
        """Remove the records of earlier starts; called only by the first process."""
        for path in self.folder.joinpath(FOLDER).glob("rank-*"):
            number = path.name.removeprefix("rank-")
            if not number.isdigit() or int(number) >= self.world or self.read(int(number)) is None:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the record of this process, which ends well."""
        self.path(self.rank).unlink(missing_ok=True)
        try:
            self.folder.joinpath(FOLDER).rmdir()
            self.folder.rmdir()  # if the command leaves nothing else
        except OSError:
            pass  # other processes still have theirs

    # ------------------------------------------------------------------ judgement

    def look(self, ranks: Iterable[int]) -> None:
        """Note which processes have renewed their record and moved since the last look.

        Looks are counted, not seconds: a machine that sleeps, or a process that was stopped and continued, has not
        looked in the meantime. Looks do not count while this process cannot write its own record (the file system is
        gone).
        """
        for rank in ranks:
            record = self.read(rank)
            before = self.records.get(rank)
            if record is None:
                self.records.pop(rank, None)
            elif before is None:
                self.records[rank] = (record, 0, 0)
            else:
                was, silent, still = before
                counts = int(self.writes)
                silent = 0 if record.beat != was.beat else silent + counts
                self.records[rank] = (record, silent, 0 if record.place != was.place else still + counts)

    def judge(self, silent: float, still: float, every: float = BEAT) -> LostProcess | None:
        """Which of the observed processes is lost, if any. silent, still: see `Peers`; every: seconds between looks."""
        verdicts = [
            verdict
            for rank, (record, quiet, _) in self.records.items()
            if (verdict := self._one(record, quiet * every, silent))
        ]
        verdicts.sort(key=lambda each: each[0])
        return verdicts[0][1] if verdicts else self._behind(still, every)

    def _one(self, record: PeerRecord, quiet: float, silent: float) -> tuple[int, LostProcess] | None:
        """Verdict on one process, checking the most certain signs first."""
        who = name(record)
        if record.rank == self.rank:
            return None
        if record.code is not None:
            if record.code in WELL:
                return None
            # A process that ends because of another is not to blame.
            first = record.rank if record.because is None else record.because
            return 0, LostProcess(first, who, record.why or f"exited with {record.code}", "See its line", record.code)
        if record.where == machine_id() and not alive(record.pid):
            now = self.read(record.rank)  # it may have ended well, or said why, before it was gone
            if now is None or now.code is not None:
                return None
            what = f"was lost: it was killed, perhaps because memory ran out (last seen {record.at})"
            return 1, self.lost(record, GRACE, what)
        if quiet >= silent:
            return 2, self.lost(record, 0.0, f"has shown no sign of life for {quiet:.0f} s (last seen {record.at})")
        return None

    def _behind(self, still: float, every: float) -> LostProcess | None:
        """A process that is alive but does not reach the point where others wait for it."""
        # Only decided by a process that sees all: the one being waited for may be the one without a record.
        if len(self.records) < self.world:
            return None
        first = min(self.records.values(), key=lambda each: each[0].place)
        ahead = max(each[0].place for each in self.records.values())
        if first[0].place == ahead or first[2] * every < still:
            return None
        what = f"is stuck {first[0].at}, and others are waiting for it"
        return self.lost(first[0], 0.0, what)

    def lost(self, record: PeerRecord, grace: float, what: str) -> LostProcess:
        """The verdict on a process: what happened, and how to continue the run."""
        last = self.folder / "last.ckpt"
        goes_on = f"The same command resumes from {last}" if last.is_file() else "Start the same command again"
        return LostProcess(record.rank, name(record), what, goes_on, ExitCode.UNAVAILABLE, grace)

    def everyone(self) -> range:
        """The ranks of all processes."""
        return range(self.world)

    def blame(self, timed_out: bool) -> LostProcess:
        """Find the process that broke a connection or let it time out; watches the others for up to WITHIN seconds."""
        every, until = 0.2, time.monotonic() + WITHIN
        # A connection breaks if a process is gone, and times out if one is stuck.
        still = AFTER_A_BREAK if timed_out else math.inf
        # The watch has counted looks at another interval.
        self.records = {}
        while True:
            self.look(self.everyone())
            if lost := self.judge(AFTER_A_BREAK, still, every):
                return lost
            if time.monotonic() > until:
                what = "the connection between the processes broke, and none of them is known to be lost"
                return LostProcess(None, "processes", what, "Check the network, and start the same command again", 69)
            time.sleep(every)


def name(record: PeerRecord) -> str:
    """Name of a process in messages: rank, host and process id."""
    return f"rank {record.rank} ({record.host}, process {record.pid})"


def machine_id() -> str:
    """Identifies the process-id namespace of this process: the machine, and its container if there is one."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def alive(pid: int) -> bool:
    """Whether a process of this machine is alive; one that ended but was not yet waited for (a zombie) is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        # pid (name) state ...: the name may contain spaces and parentheses, so the last parenthesis counts.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in "ZX"


def end_frozen(record: PeerRecord | None) -> None:
    """Kill a frozen process of this machine, which would not notice that the run is over."""
    if record is not None and record.where == machine_id() and alive(record.pid) and record.pid != os.getpid():
        # A stopped process handles no other signal until it is continued.
        os.kill(record.pid, signal.SIGKILL)


CURRENT: list[Peers] = []  # of the run that this process takes part in; empty if it is alone


def blamed(error: BaseException) -> LostProcess | None:
    """The process to blame for a broken connection to other processes; None for any other error."""
    if isinstance(error, UserError) or not CURRENT:
        return error if isinstance(error, LostProcess) else None
    # The watch must not end the process while the main thread finds out why.
    CURRENT[0].leaving.set()
    message = f"{type(error).__name__} {error}"
    # A late data worker is not another process of the run.
    if not isinstance(error, RuntimeError) or "DataLoader" in message or not BROKEN.search(message):
        return None
    CURRENT[0].verdict = CURRENT[0].blame(bool(re.search("timed out|timeout", message.lower())))
    return CURRENT[0].verdict


def leave(code: int) -> None:
    """Tell the other processes that this one ends with this exit status."""
    if not CURRENT:
        return
    peers = CURRENT.pop()
    peers.leaving.set()
    # From now on the watch does not overwrite the last record.
    peers.has_left.set()
    if code in WELL:
        peers.remove()
        return
    because = peers.verdict.rank if peers.verdict else None
    peers.write(code, because, peers.verdict.what if peers.verdict else "")
    last_resort = threading.Timer(TO_END, os._exit, [code])  # exit handlers of libraries may wait for others too
    last_resort.daemon = True
    last_resort.start()
