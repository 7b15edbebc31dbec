"""Number of processor cores available to this process."""

import os


def cores() -> int:
    """Number of processor cores this process may use; on macOS and Windows, which do not report it, all cores."""
    share = getattr(os, "sched_getaffinity", None)
    return len(share(0)) if share else os.cpu_count() or 1
