"""Memory that a process frees and asks for again."""

import ctypes
import sys

# Of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Keep what is freed for the next tensor, instead of giving it back to the system, for the rest of the process.

    The C library gives each large block back when it is freed. The next one of the same size is then new to the
    process, and the system clears it page by page: a fifth of a step's time, where tensors are large
    (bench/attention.py).

    Returns:
        Whether this C library was told; glibc alone can be.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Blocks of any size come from the heap, whose free end is never cut off.
    return mallopt is not None and all(
        mallopt(name, value) == 1 for name, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1))
    )
