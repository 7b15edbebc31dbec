"""The single entry point for images: the header is checked, then the image is decoded and converted to plain RGB.

Every failure is a `BadImage` with a short reason to count by; `safe_open` raises nothing else.
"""

import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL import WebPImagePlugin as _webp  # noqa: F401  Pillow registers WEBP late; importing it does so now

from maskvlm.data.caption_text import clean_caption
from maskvlm.utils.errors import ExitCode, UserError

Image.core.set_blocks_max(4)
"""Number of blocks of at most 16 MB that Pillow keeps for its next image instead of returning them to the system, which
would have to clear them: loading and augmenting then takes a tenth less time."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats used on the web and in public data sets. TIFF is excluded: no set uses it, and its library reads a dozen
compressions with a long record of memory faults; EPS would start Ghostscript."""

ALLOWED = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp"}
"""NLVR2 names everything .png and VQA v2 everything .jpg; the actual format is detected on opening."""
OTHER_IMAGES = {".heic", ".heif", ".avif", ".tif", ".tiff", ".jxl", ".jp2", ".dng"}
"""Suffixes of images whose formats are not read: such files are counted, as somebody expects them to be used."""

MAX_PIXELS = 50_000_000
MAX_FILE_BYTES = 200_000_000
MAX_ASPECT = 200
MIN_SIDE = 8  # pixels: the smallest patch size of our models
MAX_SCANS = 500  # a progressive JPEG has about ten; thousands keep a decoder busy for minutes

_NOT_ALLOWED = "format not allowed"
_TODO = {
    "missing": "Check the folder of the images and the name",
    "unreadable": "Check the disk and the permissions",
    "too large": "Shrink it or drop its row",
}
_NOT_IMAGES = {
    b"%pdf": "application/pdf",
    b"%!ps": "application/postscript",
    b"{": "application/json",
    b"pk\x03\x04": "application/zip",
    b"\x1f\x8b": "application/gzip",
    b"<?xml": "text/xml",
}
_OTHER_FORMATS = {
    b"ii*\x00": "image/tiff",
    b"mm\x00*": "image/tiff",
    b"8bps": "image/vnd.adobe.photoshop",
    b"simple": "image/fits",
    b"\xff\x0a": "image/jxl",
}


class BadImage(UserError):
    """An image that cannot be used.

    Attributes:
        reason: short key to count by: "missing", "a folder", "unreadable", "empty", "not an image (text/html)",
            "format not allowed (image/tiff)", "too large", "too small", "too narrow", "truncated", "crc",
            "corrupt", "not finite".
        detail: more about this image; may be empty.

    Args:
        todo: what to do about it, if the image is not a row of a data set.
    """

    def __init__(self, where: object, reason: str, detail: str = "", todo: str = "") -> None:
        self.reason, self.detail = reason, clean_caption(detail)[0][:200]
        codes = {"unreadable": ExitCode.IO_ERROR} | dict.fromkeys(("missing", "a folder"), ExitCode.MISSING_INPUT)
        what = f"bad image, {reason}" + (f" ({self.detail})" if self.detail else "")
        if not todo and reason.startswith(_NOT_ALLOWED):
            todo = f"Save it as {ALLOWED}, or drop its row"
        todo = todo or _TODO.get(reason, "Replace it or drop its row")
        super().__init__(clean_caption(str(where))[0], what, todo, codes.get(reason, ExitCode.BAD_DATA))

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, str, str, str]]:  # type: ignore[override]
        """Pickle with its own arguments."""
        return type(self), (self.where, self.reason, self.detail, self.todo)

    def without_row(self) -> "BadImage":
        """The same error for a single image that is not a row of a data set."""
        if self.reason.startswith((_NOT_ALLOWED, "not an image", "a folder")):
            return BadImage(self.where, self.reason, self.detail, f"Give an image ({ALLOWED})")
        todo = {"missing": "Check the path", "too large": "Shrink it"}.get(self.reason) or _TODO.get(self.reason)
        return BadImage(self.where, self.reason, self.detail, todo or "Give another image")


def safe_open(source: bytes | str | Path | Image.Image, name: str, least: int | None = None) -> Image.Image:
    """Decode an image to 8-bit RGB, upright (EXIF applied and dropped), transparency on white.

    Of an animation, the first frame is used. 16-bit greyscale is scaled to 8 bits, not clipped; floats are assumed to
    range from 0 to 1, 255 or 65,535, the first range that contains them all, else from their minimum to their maximum.
    Colour profiles are ignored, as is usual in this field. JPEG and GIF have no checksum: damage within the pixels that
    leaves their end marker in place goes unnoticed.

    Args:
        source: encoded bytes, the path of a file, or a Pillow image in any mode.
        name: name of the image in error messages.
        least: sufficient length of the shorter side, in pixels. A JPEG that has it at an eighth, a quarter or half of
            its size is decoded at that size, which is several times as fast; None: full size.

    Raises:
        BadImage: the image is missing or a folder (66); it cannot be read (74); it is not an image, of a format not in
            FORMATS, damaged, a file of more than MAX_FILE_BYTES, under MIN_SIDE pixels, of more than MAX_PIXELS pixels
            (checked in the header, before decoding), or longer than MAX_ASPECT times its width (65).
    """
    with _strict_pillow():
        try:
            if isinstance(source, Image.Image):
                return _decode(source, name, least, from_caller=True)
            return _decode(_open(source, name), name, least, from_caller=False)
        except BadImage:
            raise
        except (Image.DecompressionBombError, MemoryError) as error:
            raise BadImage(name, "too large", f"more than {MAX_PIXELS:,} pixels") from error
        except Exception as error:  # Pillow's decoders raise over a dozen types
            raise BadImage(name, _reason(error), str(error)) from error


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """No warnings (our limit is below Pillow's), and no half-decoded images, even if Pillow is set to allow them."""
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _open(source: bytes | str | Path, name: str) -> Image.Image:
    """Read the header only; pixels stay encoded."""
    # the whole file, as the checks below need all bytes, and Pillow must not read files itself
    data = source if isinstance(source, bytes) else _read(Path(source), name)
    _check_bytes(data, name)
    try:
        # only these plugins see the bytes, whatever the file's name says
        return Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        reason = _kind(data)
        detail = "its header cannot be read" if reason == "corrupt" else ""
        raise BadImage(name, reason, detail) from error


def _read(path: Path, name: str) -> bytes:
    try:
        # before it is opened, as reading a pipe would block forever
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise BadImage(name, "a folder", str(path) if str(path) != name else "")
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(name, "missing", f"{path} is not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise BadImage(name, "too large", f"a file of {status.st_size:,} bytes, of at most {MAX_FILE_BYTES:,}")
        return path.read_bytes()
    # ValueError: a null byte in the name; BadImage is a ValueError too
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage(name, "missing", f"no file {path}") from error
    except OSError as error:
        raise BadImage(name, "unreadable", f"{path}: {error.strerror}") from error


def _check_bytes(data: bytes, name: str) -> None:
    """Check for damage that Pillow overlooks, or would detect only after much work."""
    # nothing, or a file of zeros, as a full disk leaves it
    if not data.strip(b"\x00"):
        raise BadImage(name, "empty", f"{len(data)} bytes")
    # JPEG: each scan begins with FF DA, and each is decoded over the whole image
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise BadImage(name, "too large", f"more than {MAX_SCANS} scans of a progressive JPEG")
    # WebP: its header says how many bytes follow
    if data.startswith(b"RIFF") and int.from_bytes(data[4:8], "little") > len(data) - 8:
        raise BadImage(name, "truncated", f"{len(data)} bytes")
    if data.startswith(b"\x89PNG"):
        _check_png(data, name)


def _check_png(data: bytes, name: str) -> None:
    """Check what Pillow does not: the checksums of pixel data and the end marker."""
    # after the signature: chunks of length, kind, content and checksum (4 + 4 + length + 4 bytes)
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            break
        # the checksum is of kind and content
        if kind == b"IDAT" and zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise BadImage(name, "crc", "a block of pixels fails its checksum")
        if kind == b"IEND":
            return
        position = end
    raise BadImage(name, "truncated", f"{len(data)} bytes without an end marker")


def _kind(data: bytes) -> str:
    """The reason for a file that is in none of the allowed formats, by its first bytes."""
    # in lower case, like the tables of first bytes
    head = data[:512].lstrip().lower()
    if b"<html" in head or head.startswith(b"<!doctype html"):
        return "not an image (text/html)"
    if b"<svg" in head:
        return f"{_NOT_ALLOWED} (image/svg+xml)"
    # the first four bytes are the size of a box
    if data[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1"):
        return f"{_NOT_ALLOWED} (image/heif)"
    for start, kind in _OTHER_FORMATS.items():
        if head.startswith(start):
            return f"{_NOT_ALLOWED} ({kind})"
    for start, kind in _NOT_IMAGES.items():
        if head.startswith(start):
            return f"not an image ({kind})"
    # an allowed format whose header Pillow could not read
    if data.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM")):
        return "corrupt"
    return "not an image (unknown)"


def _reason(error: Exception) -> str:
    text = str(error).lower()
    if isinstance(error, EOFError) or any(sign in text for sign in ("truncat", "not enough", "unexpected end")):
        return "truncated"
    return "crc" if "checksum" in text or "crc" in text else "corrupt"


def _decode(image: Image.Image, name: str, least: int | None, from_caller: bool) -> Image.Image:
    """Check the size in the header, decode, turn upright, convert to RGB; the caller's image is not changed."""
    # only the header has been read; no pixel is decoded yet
    _check_size(*image.size, name)
    if least is not None:
        image.draft(None, (least, least))  # only affects JPEG
    # after `draft`, which makes it smaller
    size = image.size
    image.load()
    if image.size != size:
        raise BadImage(name, "corrupt", f"{image.size} pixels instead of {size} in the header")
    plain = image.mode == "RGB" and not from_caller and not image.has_transparency_data
    rgb = image._new(image.im) if plain else _to_rgb(image, name)  # without the reader that opened it
    # the orientation is read from the EXIF bytes in `info`
    rgb.info = dict(image.info)
    _turn_upright(rgb)
    rgb.info = {}
    return rgb.copy() if rgb.getexif() else rgb  # parsed EXIF stays in the object, but not in a copy


def _check_size(width: int, height: int, name: str) -> None:
    # the first reason that applies is reported
    shorter, longer = sorted((width, height))
    broken = {
        "too large": (width * height > MAX_PIXELS, f"at most {MAX_PIXELS:,} in all"),
        "too small": (shorter < MIN_SIDE, f"at least {MIN_SIDE} a side"),
        "too narrow": (longer > MAX_ASPECT * shorter, f"at most {MAX_ASPECT} times as long as wide"),
    }
    for reason, (is_so, limit) in broken.items():
        if is_so:
            raise BadImage(name, reason, f"{width} x {height} pixels; {limit}")


def _turn_upright(image: Image.Image) -> None:
    """Apply EXIF orientation in place; an image is not rejected for damaged EXIF."""
    with suppress(Exception):  # parsing damaged EXIF may raise anything
        ImageOps.exif_transpose(image, in_place=True)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    # Pillow's own `convert` would clip these modes at 255
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image, name)
    if image.has_transparency_data:
        # converted directly, a transparent pixel would show its hidden colour
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit and 32-bit integers and floats to 0..255, rounded; a transparent grey becomes white."""
    values_HW = np.asarray(image).astype(np.float32)
    if not np.isfinite(values_HW).all():
        raise BadImage(name, "not finite", "a pixel is infinite or not a number")
    least, greatest = float(values_HW.min()), float(values_HW.max())
    # the first usual range that contains all values, else the image's own
    usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    low, high = next(((0.0, top) for top in usual if least >= 0 and greatest <= top), (least, greatest))
    # `or 1`: an image of one value, where the range is empty
    grey_HW = np.rint((values_HW - low) * (255 / (high - low or 1))).astype(np.uint8)
    if isinstance(key := image.info.get("transparency"), int):
        grey_HW[values_HW == key] = 255
    return Image.fromarray(grey_HW)
