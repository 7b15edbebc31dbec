"""Encoded images of every allowed kind, and what the tests of `safe_open` share."""

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskvlm.data.images import BadImage, safe_open

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
SMOOTH = Image.fromarray(NOISE[:6, :8]).resize((64, 48), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(source: Any) -> np.ndarray:
    image = safe_open(source, "x")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def reason(source: Any, name: str = "x") -> str:
    with pytest.raises(BadImage) as caught:
        safe_open(source, name)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def make_png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 0) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _seeds() -> dict[str, bytes]:
    turned = SMOOTH.rotate(180)
    frames: dict[str, Any] = {"save_all": True, "append_images": [turned]}
    deep = np.random.default_rng(1).integers(0, 65536, (48, 64)).astype(np.uint16)
    return {
        "jpeg": encode(SMOOTH, "JPEG"),
        "progressive": encode(SMOOTH, "JPEG", progressive=True),
        "cmyk": encode(SMOOTH.convert("CMYK"), "JPEG"),
        "png": encode(SMOOTH, "PNG"),
        "png16": encode(Image.fromarray(deep), "PNG"),
        "png-la": encode(SMOOTH.convert("LA"), "PNG"),
        "png-p": encode(SMOOTH.convert("P"), "PNG", transparency=3),
        "apng": encode(SMOOTH, "PNG", **frames),
        "webp": encode(SMOOTH, "WEBP"),
        "webp-lossless": encode(SMOOTH, "WEBP", lossless=True),
        "webp-animation": encode(SMOOTH, "WEBP", **frames),
        "gif": encode(SMOOTH, "GIF"),
        "gif-animation": encode(SMOOTH, "GIF", **frames),
        "bmp": encode(SMOOTH, "BMP"),
    }


SEEDS = _seeds()
