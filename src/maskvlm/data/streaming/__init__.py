"""Sets that are too large for the disk."""
