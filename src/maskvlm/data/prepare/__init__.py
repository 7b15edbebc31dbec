"""Writes prepared data sets."""
