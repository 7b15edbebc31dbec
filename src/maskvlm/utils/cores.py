"""How many processor cores there are for this process."""

import os


def cores() -> int:
    """Processor cores this process may use; macOS and Windows do not tell the share, so all there are."""
    share = getattr(os, "sched_getaffinity", None)
    return len(share(0)) if share else os.cpu_count() or 1
