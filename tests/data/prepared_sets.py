"""Prepared sets of drawn images for the tests of mixes, fractions and leaks."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from maskvlm.data.prepare.prepare import Plan, prepare
from maskvlm.data.prepare.shards import Job, Settings, make_shard
from maskvlm.data.raw.base import BadRow, Facts, RawRow, RawSet

SIDE = 64


def toy_image(seed: int) -> Image.Image:
    """Smooth blotches: unlike any other in its structure, like itself when encoded anew."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def raw(number: int, split: str = "train", image_id: str = "", image: bytes = b"") -> RawRow:
    """A row with one caption, "number 7"."""
    content = image or jpeg(toy_image(number))
    return RawRow(content, (f"number {number}",), image_id or f"photo {number}", split, f"row {number}")


class Rows(RawSet):
    """A raw set in memory."""

    facts = Facts("toy", None, None, "none")

    def __init__(self, rows: Iterable[RawRow | BadRow]) -> None:
        self.all = [*rows]

    def rows(self) -> Iterator[RawRow | BadRow]:
        yield from self.all


class Here:
    """In place of the processes that make shards, which take seconds to start."""

    def __init__(self, workers: int, root: Path, settings: Settings) -> None:
        self.workers, self.root, self.settings, self.counts = workers, root, settings, [0, 0]

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is to be stopped."""

    def submit(self, job: Job) -> Future[int]:
        done: Future[int] = Future()
        done.set_result(make_shard(self.root, self.settings, job).rows)
        return done


def not_drawn(report: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@contextmanager
def in_process() -> Iterator[None]:
    """Prepare in this process, and without drawing the first look, which takes most of the time."""
    first_look = patch("maskvlm.data.prepare.first_look.draw_look", not_drawn)
    with patch("maskvlm.data.prepare.prepare.Pool", Here), first_look:
        yield


def make(root: Path, name: str, rows: Iterable[RawRow | BadRow], shard: int = 7) -> Path:
    """Prepare these rows as `root/name`."""
    with in_process():
        prepare(Rows(rows), Plan("csv", "toy", Settings(name), {}, rows=shard), root / name, 1, lambda text: None)
    return root / name
