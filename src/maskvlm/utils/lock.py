"""One training at a time in a run's folder.

First line: a lock of the kernel (`flock`) on `run.lock`. It ends with its process, however that dies; a copy of the
file locks nothing; of a job's processes the first one alone takes it.

Second line, for folders that several machines share and whose file system locks within one machine alone, or not at
all: the holder states who it is, and counts a beat up every few seconds. Who finds a statement of another machine
watches it: one that beats is alive. Clocks are not compared. A copied statement names another file (inode).

What cannot be known there: a holder that stands still for longer than the watch is taken for dead. When it wakes it
finds another statement than its own, and stops. Two machines that start within the same second may both train until the
next beat, when one of them stops.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import open_no_link
from maskvlm.utils.write_errors import cannot_write

NAME = "run.lock"
BEAT = 5.0  # seconds between two signs of life
WATCH = 20.0  # how long a statement of another machine is watched: four beats, and a network file system's delay
PATIENCE = 2.0  # a process that was killed has held its lock for at most so long
SIZE = 512  # bytes of a statement
# What `flock` answers where the file system has no locks.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)


class Holder(NamedTuple):
    """Who trains: machine, process, the boot of the machine, the file it stated this in, and its signs of life."""

    host: str
    pid: int
    boot: str
    inode: int
    beat: int = 0


class RunLock:
    """The lock that this process holds, if any."""

    def __init__(self) -> None:
        self.folder, self.handle = Path(), -1
        self.me: Holder | None = None
        self.rival: Holder | None = None
        self._end = threading.Event()
        # A child shares the open file, and with it the lock, which would outlive this process.
        os.register_at_fork(after_in_child=self._leave_behind)

    def take(self, folder: Path, warn: Callable[[str], object] = print) -> None:
        """Hold the folder from now on, until `release` or this process's end; one held before is released.

        Args:
            folder: of the run; made where needed.
            warn: told of a holder on another machine that gave no sign of life.

        Raises:
            UserError: another process trains here, or the folder cannot be written (73); a link stands in the
                file's place (77).
        """
        self.release()
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                handle = open_no_link(folder / NAME, os.O_RDWR | os.O_CREAT)
            except OSError as error:
                # Such as where the folder that the process was started in is gone.
                what, todo = f"cannot be made ({error.strerror})", "Choose another folder"
                other = UserError(folder, what, todo, ExitCode.CANNOT_CREATE)
                raise cannot_write(error, folder) or other from error
            try:
                if self._take(folder, handle, warn):
                    return
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def _take(self, folder: Path, handle: int, warn: Callable[[str], object]) -> bool:
        """Whether the file is still the folder's: one that `withdraw` removed meanwhile locks nothing."""
        # First line: the kernel's lock.
        locked, until = flock(handle), time.monotonic() + PATIENCE
        while locked is False and time.monotonic() < until and not _alive(holder_of(handle)):
            time.sleep(0.05)  # the holder has just been killed, or has not yet said who it is
            locked = flock(handle)
        holder = holder_of(handle)
        if locked is False:
            raise folder_in_use(folder, holder)
        try:
            if not os.path.samestat(os.fstat(handle), os.stat(folder / NAME)):
                return False
        except FileNotFoundError:
            return False
        # Second line: the statement. Of holders of this boot the kernel has judged, unless there are no locks;
        # all others are watched. A statement that was copied with its folder names the inode of another file.
        inode = os.fstat(handle).st_ino
        if holder is not None and holder.inode == inode and (holder.boot != boot() or locked is None):
            if beats(folder / NAME, holder):
                raise folder_in_use(folder, holder)
            if read_holder(folder / NAME) != holder:  # it has withdrawn meanwhile
                return False
            warn(f"{folder}: {who(holder)} trained here and gave no sign of life for {WATCH:.0f} s: taken over")
        self.folder, self.handle, self.rival = folder, handle, None
        self.me = Holder(socket.gethostname()[:100], os.getpid(), boot(), inode)
        state(handle, self.me)
        self._end = threading.Event()
        self._beats = threading.Thread(target=self._beat, args=(self._end,), daemon=True, name="run.lock")
        self._beats.start()
        return True

    def _beat(self, end: threading.Event) -> None:
        while not end.wait(BEAT) and (me := self.me) is not None:
            try:
                holder = read_holder(self.folder / NAME)
                # On a slow file system the lock may have been released meanwhile.
                if end.is_set():
                    return
                # All but the beat.
                if holder is not None and holder[:4] != me[:4]:
                    self.rival = holder
                    return
                self.me = me._replace(beat=me.beat + 1)
                state(self.handle, self.me)
            except OSError:  # the disk is full or gone: whoever writes next will tell
                continue

    def check(self) -> None:
        """Between two steps: stop where another process took the folder over.

        Raises:
            UserError: one did (73).
        """
        if self.rival is not None:
            raise folder_in_use(self.folder, self.rival)

    def withdraw(self) -> None:
        """Let go of a folder in which nothing was begun, and remove the lock's file with it."""
        if self.me is not None and self.rival is None:
            with suppress(OSError):
                (self.folder / NAME).unlink()
        self.release()

    def release(self) -> None:
        """Let go; the statement is withdrawn, so that nobody has to watch it."""
        if self.me is None:
            return
        self._end.set()
        # It may be in the middle of a beat, and write into the file that is closed here.
        self._beats.join(BEAT)
        if self.rival is None:
            with suppress(OSError):
                # Emptied, not removed: who has it open would lock a file that nobody else finds.
                os.ftruncate(self.handle, 0)
        self._leave_behind()

    def _leave_behind(self) -> None:
        """A forked process (a data worker) holds nothing: the lock ends with this process alone."""
        if self.me is not None:
            os.close(self.handle)
        self.me, self.handle = None, -1


HELD = RunLock()


def flock(handle: int) -> bool | None:
    """Ask the kernel for the lock: whether it was given; None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def state(handle: int, holder: Holder) -> None:
    """Write who holds the lock, always as many bytes: a reader sees the old or the new statement."""
    os.pwrite(handle, json.dumps(holder._asdict()).ljust(SIZE - 1).encode() + b"\n", 0)
    os.fsync(handle)


def holder_of(handle: int) -> Holder | None:
    """Who states to hold the lock; None where nobody does, or the file is damaged."""
    try:
        entry = json.loads(os.pread(handle, SIZE, 0))
        holder = Holder(str(entry["host"])[:100], int(entry["pid"]), str(entry["boot"]), entry["inode"], entry["beat"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
    # `os.kill` takes 0 and negative numbers for groups of processes.
    return holder if 0 < holder.pid < 2**31 else None


def read_holder(path: Path) -> Holder | None:
    """The holder as `holder_of` reads it, from a newly opened file: a network file system then asks its server."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return holder_of(handle)
    finally:
        os.close(handle)


def beats(path: Path, holder: Holder) -> bool:
    """Whether the holder gives a sign of life while it is watched."""
    until = time.monotonic() + WATCH
    while time.monotonic() < until:
        time.sleep(BEAT / 5)
        now = read_holder(path)
        if now != holder:
            return now is not None  # None: it has withdrawn its statement
    return False


def _alive(holder: Holder | None) -> bool:
    """Whether a holder's process exists; True for one on another machine, as that cannot be known."""
    if holder is None or holder.boot != boot():
        return holder is not None
    try:
        # Signal 0 is not sent: it only asks whether the process is there.
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is there, and another user's
        return True
    return True


def boot() -> str:
    """What tells this run of this machine's kernel from any other; its name where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def who(holder: Holder | None) -> str:
    """`process 17 on host`."""
    return "another process" if holder is None else f"process {holder.pid} on {holder.host}"


def folder_in_use(folder: Path, holder: Holder | None) -> UserError:
    """The refusal."""
    named = "" if holder is None else f" ({who(holder)})"
    todo = "Wait for it, or choose another folder (--folder, or run=)"
    return UserError(folder, f"another process is training here{named}", todo, ExitCode.CANNOT_CREATE)
