"""Memory that a process frees and asks for again."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
NO_LIMIT = -1
KEPT_BYTES = 2**30
# Where glibc's own adapting thresholds end up in a process that frees large blocks (its manual, M_MMAP_THRESHOLD), and
# the largest that versions before 2.35 can be told.
GLIBC_KEPT_BYTES = 32 * 2**20


@contextmanager
def keep_freed_memory() -> Iterator[bool]:
    """Keep what is freed for the next tensor, instead of giving it back to the system; on leaving, give it back.

    The C library gives each large block back when it is freed. The next one of the same size is then new to the
    process, and the system clears it page by page: a fifth of a step's time, where tensors are large
    (bench/attention.py).

    Blocks above 1 GiB (32 MiB before glibc 2.35) are given back as ever. A damaged image may ask for 34 GB and use none
    of it; kept, they would be cleared for the next image, and no data worker could be started beside them.

    Yields:
        Whether this C library was told; glibc alone can be.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:
        yield False
        return
    applied = mallopt(MMAP_THRESHOLD, KEPT_BYTES) or mallopt(MMAP_THRESHOLD, GLIBC_KEPT_BYTES)
    # The free end of the heap is never cut off.
    applied = mallopt(TRIM_THRESHOLD, NO_LIMIT) and applied
    try:
        yield bool(applied)
    finally:
        mallopt(MMAP_THRESHOLD, GLIBC_KEPT_BYTES)
        mallopt(TRIM_THRESHOLD, 2 * GLIBC_KEPT_BYTES)
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
