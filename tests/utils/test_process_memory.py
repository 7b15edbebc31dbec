"""Freed memory is used again, while a run lasts."""

import platform
import subprocess
import sys

import pytest

LIBRARY, VERSION = platform.libc_ver()
SINCE = (2, 35)  # older ones cannot be told to keep blocks of these sizes
RECENT = LIBRARY == "glibc" and tuple(int(part) for part in VERSION.split(".")[:2]) >= SINCE
pytestmark = pytest.mark.skipif(not RECENT, reason="glibc's allocator, 2.35 or newer")

FAULTS = """
import resource, sys
from contextlib import nullcontext
import torch
from maskvlm.utils.process_memory import keep_freed_memory
def faults():
    torch.ones(25_000_000)  # 100 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
with keep_freed_memory() as enabled:
    assert enabled
    print(faults())
print(faults())
"""

HUGE = """
import ctypes
from maskvlm.utils.process_memory import keep_freed_memory
def resident_and_mapped():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(fields[name].split()[0]) // 1024 for name in ("VmRSS", "VmSize")]
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
before = resident_and_mapped()
with keep_freed_memory():
    block = library.malloc(8 << 30)
    assert block and resident_and_mapped()[1] - before[1] > 8000
    library.free(block)
    print(resident_and_mapped()[1] - before[1])
    block = library.malloc(512 << 20)
    ctypes.memset(block, 1, 512 << 20)
    library.free(block)
    print(resident_and_mapped()[0] - before[0])
print(resident_and_mapped()[0] - before[0])
"""


def printed(program: str) -> list[int]:
    """The numbers of a process of its own, as the allocator's settings are a process's."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def test_a_block_that_was_freed_is_not_cleared_again() -> None:
    """Each new one of 100 MB is 24,414 pages of 4 KiB otherwise, or 48 of 2 MiB."""
    before, during, after = printed(FAULTS)
    assert 10 * during < before
    assert 10 * during < after


def test_what_a_damaged_image_asks_for_is_given_back_at_once_and_the_rest_at_the_end() -> None:
    """In MiB. A process that holds more than the machine has cannot start data workers."""
    mapped_after_huge, resident_while, resident_after = printed(HUGE)
    assert mapped_after_huge < 100
    assert resident_while > 500
    assert resident_after < 100
