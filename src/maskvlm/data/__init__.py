"""Pairs of image and text: how they are read, prepared, sampled and put into batches."""
