"""What this process does while it is watched, and how much time and memory it gets meanwhile."""

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RUN = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"}
CONNECT = {"socket.connect", "socket.getaddrinfo"}
MEMORY = 8 * 2**30  # more than the process has
_LISTS: list[list[str]] = []


def _note(event: str, args: tuple[Any, ...]) -> None:
    if not _LISTS:
        return
    deed = ""
    if event == "open" and isinstance(args[0], str | bytes):
        writes = isinstance(args[1], str) and set(args[1]) & set("wax+")
        deed = f"{'write' if writes else 'read'} {os.path.realpath(os.fsdecode(args[0]))}"
    elif event in RUN:
        deed = f"run {args}"
    elif event in CONNECT:
        deed = f"connect {args[1:]}"
    elif event == "shutil.rmtree":
        deed = f"remove {args[0]}"
    if deed:
        for deeds in _LISTS:
            deeds.append(deed)


sys.addaudithook(_note)


@contextmanager
def watched() -> Iterator[list[str]]:
    """A list of deeds: `read PATH`, `write PATH`, `remove PATH`, `run ...`, `connect ...`; links are followed."""
    deeds: list[str] = []
    _LISTS.append(deeds)
    try:
        yield deeds
    finally:
        _LISTS[:] = [each for each in _LISTS if each is not deeds]


@contextmanager
def limited(seconds: float = 60.0) -> Iterator[None]:
    """More time is a TimeoutError, more memory a MemoryError: whoever asks for all of it does not stop the tests."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
