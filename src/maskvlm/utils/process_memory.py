"""Memory that a process frees and allocates again."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# From glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
NO_LIMIT = -1
KEPT_BYTES = 2**30
# Final value of glibc's dynamic thresholds in a process that frees large blocks (its manual, M_MMAP_THRESHOLD), and the
# largest value that versions before 2.35 accept.
GLIBC_KEPT_BYTES = 32 * 2**20


@contextmanager
def keep_freed_memory() -> Iterator[bool]:
    """Keep freed memory for the next tensor instead of returning it to the system; on exit, return it.

    The C library returns each large block when it is freed. The next block of the same size is then new to the process,
    and the system clears it page by page: a fifth of a step's time if tensors are large (bench/attention.py).

    Blocks above 1 GiB (32 MiB before glibc 2.35) are returned as usual. A damaged image may allocate 34 GB and use none
    of it; if kept, it would be cleared for the next image, and leave no room to start a data worker.

    Yields:
        Whether the setting was applied; only glibc supports it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:
        yield False
        return
    applied = mallopt(MMAP_THRESHOLD, KEPT_BYTES) or mallopt(MMAP_THRESHOLD, GLIBC_KEPT_BYTES)
    # The free top of the heap is never trimmed.
    applied = mallopt(TRIM_THRESHOLD, NO_LIMIT) and applied
    try:
        yield bool(applied)
    finally:
        mallopt(MMAP_THRESHOLD, GLIBC_KEPT_BYTES)
        mallopt(TRIM_THRESHOLD, 2 * GLIBC_KEPT_BYTES)
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
