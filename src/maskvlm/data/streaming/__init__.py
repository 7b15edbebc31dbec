"""Streams data sets that are too large for the disk."""
