"""A raw set of made images, with rows of every kind that preparing has to deal with."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from data.prepared_sets import Rows, in_process
from PIL import Image

from maskvlm.data.prepare.finish import Plan
from maskvlm.data.prepare.prepare import prepare
from maskvlm.data.prepare.rows import Settings
from maskvlm.data.raw.base import BadRow, Facts, RawRow


class Toy(Rows):
    """Rows of a list."""

    def __init__(self, rows: list[RawRow | BadRow], images: int | None = None) -> None:
        super().__init__(rows)
        self.facts = Facts("Toy images", images, None, "free")
        self.annotations: list[Path] = []


def photo(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    """Soft blobs of colour: like a photo to a hash and to JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    data = BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def row(number: int, split: str = "train", **changes: Any) -> RawRow:
    """Image `number`, a PNG that must be encoded anew, with two captions."""
    captions = (f"image  number {number}", "a second caption")
    whole = RawRow(encoded(photo(number), "PNG"), captions, f"toy {number}", split, f"toy.csv:{number}")
    return whole._replace(**changes)


def plan(name: str = "toy", rows: int = 4, side: int = 48, raw: str = "toy.csv", **more: Any) -> Plan:
    return Plan("csv", raw, Settings(name, side, **more), {}, rows)


def make(root: Path, entries: list[RawRow | BadRow], images: int | None = None, **more: Any) -> dict[str, Any]:
    """Prepare these rows in `root`, in this process; the manifest."""
    with in_process():
        return prepare(Toy(entries, images), plan(**more), root, 1, lambda line: None)


def files_of(root: Path) -> dict[str, bytes]:
    """All files of a set but the manifest, which knows the time."""
    files = (file for file in sorted(root.rglob("*")) if file.is_file() and file.name != "manifest.json")
    return {str(file.relative_to(root)): file.read_bytes() for file in files}
