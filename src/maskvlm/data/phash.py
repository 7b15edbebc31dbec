"""A perceptual hash: near copies of a picture (encoded again, resized, grey) differ in few of its 64 bits.

Whole numbers all the way, so that every machine arrives at the same bits.

Shapes: S side of the small grey picture, F frequencies a side.
"""

import math

import numpy as np
from PIL import Image

KIND = "dct-8x8-of-32x32"
"""Goes into manifests: hashes are comparable where the kind is the same."""

SIDE, FREQUENCIES, SCALE = 32, 8, 4096
COSINE_FS = np.array(
    [
        [round(SCALE * math.cos(math.pi * frequency * (2 * place + 1) / (2 * SIDE))) for place in range(SIDE)]
        for frequency in range(FREQUENCIES)
    ],
    np.int64,
)
BIT_N = np.left_shift(np.uint64(1), np.arange(FREQUENCIES**2, dtype=np.uint64))


def phash(image: Image.Image) -> int:
    """64 bits: which of the 64 lowest frequencies are above their median (the constant one counts as below).

    A picture of one colour has 0, as have all pictures of one colour: 0 says nothing about being copies.

    Args:
        image: RGB or grey.
    """
    grey_SS = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.int64)
    strength_FF = COSINE_FS @ grey_SS @ COSINE_FS.T
    strength_FF[0, 0] = 0
    strength_N = strength_FF.ravel()
    if not strength_N.any():
        return 0
    return int(BIT_N[strength_N > np.median(strength_N)].sum())


def distance(first: int, second: int) -> int:
    """Bits in which two hashes differ, 0 to 64."""
    return (first ^ second).bit_count()
