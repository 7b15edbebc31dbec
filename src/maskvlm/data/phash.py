"""A perceptual hash: near copies of an image (re-encoded, resized, grey) differ in few of its 64 bits.

It uses integer arithmetic throughout, so that every machine computes the same bits.

Shapes: S side of the small grey image, F frequencies per side, N and M hashes.
"""

import math
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

KIND = "dct-8x8-of-32x32"
"""Stored in manifests: hashes are comparable if the kind is the same."""

Ids = NDArray[np.uint64]
NEAR = 8  # bits: see `contamination.py`
# a hash of 64 bits as 4 parts of 16
BANDS, BITS = 4, 16
MOST = 1 << 22  # hashes compared at once
SIDE, FREQUENCIES, SCALE = 32, 8, 4096
# the lowest frequencies of a discrete cosine transform, as integers
COSINE_FS = np.array(
    [
        [round(SCALE * math.cos(math.pi * frequency * (2 * place + 1) / (2 * SIDE))) for place in range(SIDE)]
        for frequency in range(FREQUENCIES)
    ],
    np.int64,
)
BIT_N = np.left_shift(np.uint64(1), np.arange(FREQUENCIES**2, dtype=np.uint64))


def phash(image: Image.Image) -> int:
    """64 bits: which of the 64 lowest frequencies are above their median (the constant one, the brightness, counts as
    0).

    All images of a single colour have hash 0, so 0 says nothing about being copies.

    Args:
        image: RGB or greyscale image.
    """
    # BOX: each value is the mean of its pixels
    grey_SS = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.int64)
    # (F, S) (S, S) (S, F) -> (F, F): rows, then columns
    strength_FF = COSINE_FS @ grey_SS @ COSINE_FS.T
    # the constant part is the brightness, which a copy may change
    strength_FF[0, 0] = 0
    strength_N = strength_FF.ravel()
    if not strength_N.any():
        return 0
    # bit n stands for frequency n
    return int(BIT_N[strength_N > np.median(strength_N)].sum())


def distance(first: int, second: int) -> int:
    """Number of bits in which two hashes differ, 0 to 64."""
    return (first ^ second).bit_count()


def near(hash_N: Ids, hash_M: Ids, bits: int = NEAR) -> NDArray[np.bool_]:
    """Whether a row's hash is within `bits` bits of one of the others. Hash 0, a single colour, is near nothing.

    Hashes that differ in at most 8 bits differ in at most 2 bits in one of any three of their 16-bit parts: only rows
    with such a part are compared, 0.2 % of them for each part. 3 million against 5,000 take two seconds.

    Args:
        bits: maximum distance, up to 11.
    """
    # images of a single colour all have 0: near each other without being copies
    near_N, hash_M = np.zeros(len(hash_N), bool), np.unique(hash_M[hash_M != 0])
    # maximum number of bits in which the nearest part may differ
    reach = bits // BANDS
    # all differences of at most `reach` bits in 16: 137 for a reach of 2
    flips = [sum(1 << bit for bit in some) for n in range(reach + 1) for some in combinations(range(BITS), n)]
    # if each of these parts differed in more than `reach` bits, the hash would differ in more than `bits`
    for band in range(bits // (reach + 1) + 1):
        part_N, part_M = (_part(hashes, band) for hashes in (hash_N, hash_M))
        # rows sorted by the value of their part: a table of 65,536 values gives the rows of each
        order_N = np.argsort(part_N, kind="stable")
        start = np.searchsorted(part_N[order_N], np.arange((1 << BITS) + 1))  # of each value's rows
        for flip in flips:
            wanted_M = part_M ^ np.uint16(flip)
            # as int64 before adding 1, as the largest part would wrap to 0
            first_M, count_M = start[wanted_M], start[wanted_M.astype(np.int64) + 1] - start[wanted_M]
            for some in _portions(count_M):
                counts, other = count_M[some], hash_M[some]
                # the runs of rows, joined: for each pair of row and other its place in `order_N`
                begin = np.repeat(first_M[some] - np.cumsum(counts) + counts, counts)
                row = order_N[begin + np.arange(len(begin))]
                # the whole hash decides
                far = np.bitwise_count(hash_N[row] ^ np.repeat(other, counts))
                near_N[row[far <= bits]] = True
    return near_N & (hash_N != 0)


def _part(hashes: Ids, band: int) -> NDArray[np.uint16]:
    return (hashes >> np.uint64(BITS * band)).astype(np.uint16)


def _portions(count_M: NDArray[np.int64]) -> list[slice]:
    """Consecutive slices with about MOST comparisons each, as many images may share one hash."""
    # cut where the running total passes a multiple of MOST
    total_M = np.cumsum(count_M)
    cut = np.searchsorted(total_M, np.arange(MOST, int(total_M[-1]) if len(total_M) else 0, MOST)) + 1
    ends = [0, *np.unique(cut).tolist(), len(count_M)]
    return [slice(first, last) for first, last in pairwise(ends) if last > first]
