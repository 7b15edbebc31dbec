"""One training at a time in a run's folder.

First line of defence: a kernel lock (`flock`) on `run.lock`. It ends with its process, however that dies; a copy of the
file locks nothing; only the first process of a job takes it.

Second line of defence, for folders shared by several machines on a file system that locks only within one machine, or
not at all: the holder writes a statement of who it is, and increments a beat in it every few seconds. A process that
finds a statement of another machine watches it: if it beats, its holder is alive. Clocks are not compared. A copied
statement names another file (inode).

Limits: a holder that hangs for longer than the watch is considered dead. When it wakes up it finds another statement
than its own, and stops. Two machines that start within the same second may both train until the next beat, when one of
them stops.
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
BEAT = 5.0  # seconds between two beats
WATCH = 20.0  # seconds to watch a statement of another machine: four beats, and a network file system's delay
PATIENCE = 2.0  # seconds for which a killed process may still hold its lock
SIZE = 512  # bytes of a statement
# Errors of `flock` if the file system has no locks.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)


class Holder(NamedTuple):
    """Who trains: host, process id, boot id of the machine, inode of the statement's file, and beat count."""

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
        # A forked child shares the open file, and with it the lock, which would outlive this process.
        os.register_at_fork(after_in_child=self._leave_behind)

    def take(self, folder: Path, warn: Callable[[str], object] = print) -> None:
        """Hold the folder until `release` or the end of this process; a folder held before is released.

        Args:
            folder: the run's folder; created if needed.
            warn: called with a message if a holder on another machine gave no sign of life.

        Raises:
            UserError: another process trains here, or the folder cannot be written (73); the lock file is a link (77).
        """
        self.release()
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                handle = open_no_link(folder / NAME, os.O_RDWR | os.O_CREAT)
            except OSError as error:
                # For example because the folder in which the process was started is gone.
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
        """Take the lock; False if the file is no longer the folder's, as one that `withdraw` removed locks nothing."""
        # First line of defence: the kernel's lock.
        locked, until = flock(handle), time.monotonic() + PATIENCE
        while locked is False and time.monotonic() < until and not _alive(holder_of(handle)):
            time.sleep(0.05)  # the holder has just been killed, or has not yet written its statement
            locked = flock(handle)
        holder = holder_of(handle)
        if locked is False:
            raise folder_in_use(folder, holder)
        try:
            if not os.path.samestat(os.fstat(handle), os.stat(folder / NAME)):
                return False
        except FileNotFoundError:
            return False
        # Second line of defence: the statement. For holders of this boot the kernel has decided, unless there are no
        # locks; all others are watched. A statement copied with its folder names the inode of another file.
        inode = os.fstat(handle).st_ino
        if holder is not None and holder.inode == inode and (holder.boot != boot() or locked is None):
            if beats(folder / NAME, holder):
                raise folder_in_use(folder, holder)
            if read_holder(folder / NAME) != holder:  # it has withdrawn in the meantime
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
                # On a slow file system the lock may have been released in the meantime.
                if end.is_set():
                    return
                # Everything but the beat.
                if holder is not None and holder[:4] != me[:4]:
                    self.rival = holder
                    return
                self.me = me._replace(beat=me.beat + 1)
                state(self.handle, self.me)
            except OSError:  # the disk is full or gone: the next write will report it
                continue

    def check(self) -> None:
        """Check, between two steps, that no other process has taken over the folder.

        Raises:
            UserError: one has (73).
        """
        if self.rival is not None:
            raise folder_in_use(self.folder, self.rival)

    def withdraw(self) -> None:
        """Release a folder in which nothing was started, and remove its lock file."""
        if self.me is not None and self.rival is None:
            with suppress(OSError):
                (self.folder / NAME).unlink()
        self.release()

    def release(self) -> None:
        """Release the folder, and withdraw the statement so that nobody has to watch it."""
        if self.me is None:
            return
        self._end.set()
        # The thread may be in the middle of a beat, writing to the file that is closed here.
        self._beats.join(BEAT)
        if self.rival is None:
            with suppress(OSError):
                # Emptied, not removed: a process that has it open would lock a file that no one else finds.
                os.ftruncate(self.handle, 0)
        self._leave_behind()

    def _leave_behind(self) -> None:
        """Drop the lock in a forked process (a data worker): the lock belongs to this process only."""
        if self.me is not None:
            os.close(self.handle)
        self.me, self.handle = None, -1


HELD = RunLock()


def flock(handle: int) -> bool | None:
    """Ask the kernel for the lock. Returns whether it was granted; None if the file system has no locks."""
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
    """Write who holds the lock, always in the same number of bytes: a reader sees the old or the new statement."""
    os.pwrite(handle, json.dumps(holder._asdict()).ljust(SIZE - 1).encode() + b"\n", 0)
    os.fsync(handle)


def holder_of(handle: int) -> Holder | None:
    """The holder according to the statement; None if there is no statement, or the file is damaged."""
    try:
        entry = json.loads(os.pread(handle, SIZE, 0))
        holder = Holder(str(entry["host"])[:100], int(entry["pid"]), str(entry["boot"]), entry["inode"], entry["beat"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
    # `os.kill` treats 0 and negative numbers as process groups.
    return holder if 0 < holder.pid < 2**31 else None


def read_holder(path: Path) -> Holder | None:
    """The holder, as in `holder_of`, from a newly opened file, so that a network file system asks its server."""
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
            return now is not None  # None: the holder has withdrawn its statement
    return False


def _alive(holder: Holder | None) -> bool:
    """Whether a holder's process exists; True for a process on another machine, where it cannot be checked."""
    if holder is None or holder.boot != boot():
        return holder is not None
    try:
        # Signal 0 is not sent: it only checks whether the process exists.
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists and belongs to another user
        return True
    return True


def boot() -> str:
    """Identifies the current boot of this machine; its host name if the kernel has no boot id."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def who(holder: Holder | None) -> str:
    """`process 17 on host`."""
    return "another process" if holder is None else f"process {holder.pid} on {holder.host}"


def folder_in_use(folder: Path, holder: Holder | None) -> UserError:
    """The error for a folder that is in use."""
    named = "" if holder is None else f" ({who(holder)})"
    todo = "Wait for it, or choose another folder (--folder, or run=)"
    return UserError(folder, f"another process is training here{named}", todo, ExitCode.CANNOT_CREATE)
