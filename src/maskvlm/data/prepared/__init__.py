"""Reads prepared data sets, written by `maskvlm data`."""
