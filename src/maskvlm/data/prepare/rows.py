"""Raw rows -> rows of the prepared form: images turned upright, shrunk and encoded, captions cleaned."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from PIL import Image

from maskvlm.data.caption_text import clean_caption, stable_id
from maskvlm.data.images import BadImage, safe_open
from maskvlm.data.phash import phash
from maskvlm.data.prepared.manifest import SCHEMA, SPLITS
from maskvlm.data.raw.base import BadRow, RawRow
from maskvlm.utils.errors import UserError

BATCH = 100  # rows of an Arrow record batch: a few MB
EXAMPLES = 5  # rows per reason in the manifest; skipped.jsonl has all
MOST_REASONS, OTHER = 100, "other reasons"
LONGEST = 100_000
"""Characters; anything longer is not a caption but a file, or many rows after an unclosed quote."""

EXTRAS = {"exif", "xmp", "icc_profile", "comment", "photoshop", "progressive", "progression"}
"""Parts of a JPEG, by Pillow's names, that a prepared one does not have."""


class Settings(NamedTuple):
    """Settings of a prepared set.

    Attributes:
        name: name of the set; the `source` of each row.
        side: largest length of an image's shorter side in pixels, 8 or more.
        quality: JPEG quality, 1 to 100.
    """

    name: str
    side: int = 288
    quality: int = 90


class RowNote(NamedTuple):
    """A row that is left out, or kept after a repair."""

    reason: str
    origin: str
    message: str


class Reasons:
    """Rows by reason: their count, and the first of them."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.first: dict[str, list[dict[str, str]]] = {}

    def add(self, entry: RowNote) -> None:
        """Count a row under its reason, and list the first ones. An untrusted set may have any number of reasons: those
        beyond MOST_REASONS are merged into one."""
        reason = entry.reason if entry.reason in self.count or len(self.count) < MOST_REASONS else OTHER
        self.count[reason] += 1
        if len(examples := self.first.setdefault(reason, [])) < EXAMPLES:
            examples.append({"origin": entry.origin, "message": entry.message})

    def card(self) -> dict[str, Any]:
        """Reasons with their counts and first examples, the most frequent first."""
        return {name: {"count": count, "examples": self.first[name]} for name, count in self.count.most_common()}


def first_example(entry: Mapping[str, Any]) -> str:
    """The first row of a reason in `Reasons.card` or a manifest, `FILE:LINE: why`; "" if none is listed."""
    if not entry["examples"]:
        return ""
    example = entry["examples"][0]
    # Some messages begin with the row's place.
    begun = example["message"].startswith(example["origin"])
    return str(example["message"] if begun else f"{example['origin']}: {example['message']}")


class Unusable(Exception):
    """A row that is left out: reason and message."""


class RowMaker:
    """Turns raw rows into record batches, and records what was left out or repaired.

    Args:
        captioned: whether to leave out rows without a caption.
    """

    def __init__(self, captioned: bool, settings: Settings, tick: Callable[[bool], None]) -> None:
        self.captioned, self.settings, self.tick = captioned, settings, tick
        self.digests: list[str] = []
        self.captions = self.kept = 0
        self.left_out: list[RowNote] = []
        self.mended: list[RowNote] = []

    def batches(self, rows: list[RawRow | BadRow]) -> Iterator[pa.RecordBatch]:
        """Record batches of at most BATCH rows; none if no row can be used."""
        waiting: list[dict[str, Any]] = []
        for row in rows:
            # None is counted, but not added to the batch
            used = self.take(row)
            if used is not None:
                waiting.append(used)
            if len(waiting) == BATCH:
                yield pa.RecordBatch.from_pylist(waiting, SCHEMA)
                waiting = []
            # may raise to stop
            self.tick(used is not None)
        if waiting:
            yield pa.RecordBatch.from_pylist(waiting, SCHEMA)

    def take(self, row: RawRow | BadRow) -> dict[str, Any] | None:
        """The row in the prepared form, or None if it is left out."""
        if isinstance(row, BadRow):
            self.left_out.append(RowNote(row.reason, clean_line(row.origin), clean_line(row.message)))
            return None
        origin = clean_line(row.origin)
        try:
            # captions before the image, as they are far cheaper to reject
            captions, notes = self.clean(row)
            check_names_of_row(row)
            image = prepare_image(row.image, place_of_image(row), self.settings)
        except BadImage as bad:
            self.left_out.append(RowNote(bad.reason, origin, str(bad)))
            return None
        except Unusable as problem:
            reason, message = problem.args
            self.left_out.append(RowNote(reason, origin, f"{origin}: {message}"))
            return None
        # only for rows that are used; repairs in others do not matter
        self.mended += [RowNote(reason, origin, f"{origin}: {message}") for reason, message in notes]
        self.captions += len(captions)
        self.kept += image.kept
        # of the row as stored, so that `data-check` computes the same
        self.digests.append(row_digest(image.data, captions, row.image_id, row.name))
        # the columns of `manifest.SCHEMA`
        return {
            "image": image.data,
            "captions": captions,
            "image_id": row.image_id,
            "source": self.settings.name,
            "name": row.name,
            "origin": origin,
            "phash": image.phash,
        }

    def clean(self, row: RawRow) -> tuple[list[str], list[tuple[str, str]]]:
        """Captions that contain words, and (reason, message) for the others and for repairs.

        Raises:
            Unusable: no caption is left, but one is needed.
            UserError: the reader gave one text instead of a tuple of texts (2).
        """
        captions, notes = [], []
        if isinstance(row.captions, str):  # its characters would be taken for captions
            raise UserError(row.origin, "captions are one text", "A reader gives a tuple of texts: (text,)")
        for number, text in enumerate(row.captions, 1):
            caption, note = clean_caption(text) if len(text) <= LONGEST else ("", "too long")
            if note:
                reason = "empty caption" if note == "empty" else f"caption {note}"
                notes.append((reason, f"caption {number} of {len(row.captions)}"))
            if caption:
                captions.append(caption)
        if self.captioned and not captions:
            reasons = [reason for reason, _ in notes]
            # the most frequent reason stands for the row
            raise Unusable(max(reasons, key=reasons.count) if reasons else "no caption", "no caption is left")
        return captions, notes


def screened(rows: Iterator[RawRow | BadRow]) -> Iterator[RawRow | BadRow]:
    """Turn repeated images, in any split, and rows of an unknown split into bad rows."""
    seen_ids: set[int] = set()  # some 60 bytes per image: 200 MB for three million
    for row in rows:
        if isinstance(row, RawRow) and row.split not in SPLITS:
            message = f"split '{row.split}' is none of {', '.join(SPLITS)}"
            row = BadRow("unknown split", row.origin, message, SPLITS[0])
        elif isinstance(row, RawRow):
            # the set only grows if the id is new
            known = len(seen_ids)
            seen_ids.add(stable_id(row.image_id))
            if len(seen_ids) == known:
                message = f"id '{row.image_id}' was given to an earlier row; each image needs its own"
                row = BadRow("duplicate image id", row.origin, message, row.split)
        yield row


# ------------------------------------------------------------------ a row


class PreparedImage(NamedTuple):
    """An image in the prepared form. kept: its bytes are the original ones."""

    data: bytes
    phash: int
    kept: bool


def prepare_image(source: bytes | str, name: str, settings: Settings) -> PreparedImage:
    """Upright RGB as JPEG, with the shorter side at most `settings.side` pixels; never enlarged.

    A baseline RGB JPEG without metadata that is small enough is kept unchanged, as re-encoding could only degrade it.
    A JPEG four times as large or more is decoded at half its size or less by libjpeg, which is far closer to the exact
    result (39 to 47 dB) than JPEG at quality 90 (31 to 37 dB on the same photos).

    Raises:
        BadImage: as `safe_open`.
    """
    # twice the side is left for `shrink`, whose interpolation is better than libjpeg's
    image = safe_open(source, name, least=2 * settings.side)
    if min(image.size) > settings.side:
        image = shrink(image, settings.side)
    elif is_plain(data := source if isinstance(source, bytes) else Path(source).read_bytes()):
        return PreparedImage(data, phash(image), True)
    # a new JPEG of the pixels has no metadata
    encoded = BytesIO()
    image.save(encoded, "JPEG", quality=settings.quality)
    return PreparedImage(encoded.getvalue(), phash(image), False)


def shrink(image: Image.Image, side: int) -> Image.Image:
    """Scale an image to this shorter side with bicubic interpolation over all pixels (antialiased)."""
    shorter = min(image.size)
    width, height = (max(1, round(length * side / shorter)) for length in image.size)
    # reducing_gap: first reduced by an integer factor to at least three times the size, which is faster
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def is_plain(data: bytes) -> bool:
    """Whether the data are a baseline RGB JPEG with nothing else in it."""
    # start and end markers: nothing follows the image
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return False
    with Image.open(BytesIO(data), formats=["JPEG"]) as image:
        return image.mode == "RGB" and not EXTRAS & image.info.keys()


def check_names_of_row(row: RawRow) -> None:
    """Reject names that are not UTF-8, which cannot be stored in columns."""
    for text in (row.image_id, row.name):
        if text.encode("utf-8", "ignore").decode() != text:
            raise Unusable("name is not text", f"the name {text!r} is not text")


def place_of_image(row: RawRow) -> str:
    """What a message calls a row's image: the row's place, and the file if that place does not name it."""
    own = "" if isinstance(row.image, bytes) or Path(row.image).name in row.origin else f" ({row.image})"
    return clean_line(f"{row.origin}{own}")


def clean_line(text: str) -> str:
    """One printable line of a message."""
    return clean_caption(text)[0]


def row_digest(image: bytes, captions: list[str], image_id: str, name: str) -> str:
    """128-bit hash of the content of a row without its origin; 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (image, image_id.encode(), name.encode(), *(caption.encode() for caption in captions)):
        # with its length, so that "ab", "c" differs from "a", "bc"
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
