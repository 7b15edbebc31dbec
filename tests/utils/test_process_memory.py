"""Freed memory is used again."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from maskvlm.utils.process_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def touch():
    torch.ones(25_000_000)  # 100 MB
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_a_block_that_was_freed_is_not_cleared_again() -> None:
    """Each new one of 100 MB is 24,414 pages of 4 KiB otherwise, or 48 of 2 MiB."""
    faults = {
        way: int(subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True).stdout)
        for way in ("give back", "keep")
    }
    assert 10 * faults["keep"] < faults["give back"]
