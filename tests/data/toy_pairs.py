"""A data set of coloured squares in memory, with every kind of row that cannot be read."""

from io import BytesIO

import numpy as np
from PIL import Image

from maskvlm.data.batch import InputSpec, Pairs, Row, Source

SPEC = InputSpec(24, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), text_length=12, vocab_size=120)
COLOURS = ("red", "green", "blue", "olive", "navy", "teal", "gray", "black")


def square(colour: str, size: int = 32) -> Image.Image:
    """A square of one colour on white, off the middle: it tells crops and mirrored images apart."""
    image = Image.new("RGB", (size, size), "white")
    image.paste(colour, (4, 8, 20, 24))
    return image


def png(image: Image.Image) -> bytes:
    data = BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def row(number: int, **changes: object) -> Row:
    """Image `number` with three captions."""
    colour = COLOURS[number % len(COLOURS)]
    captions = [f"a {colour} square", f"this one is {colour}", f"number {number}"]
    whole = {
        "image": square(colour),
        "captions": captions,
        "image_id": f"id {number}",
        "origin": f"toy:{number}",
    }
    return Row(**{**whole, **changes})  # type: ignore[typeddict-item]


class Rows:
    """Pairs over a list."""

    def __init__(self, rows: list[Row], fingerprint: str = "toy") -> None:
        self.rows, self.fingerprint = rows, fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Row:
        return self.rows[index]


class Outlined(Rows):
    """Pairs that know the pixels of their squares."""

    def object_mask(self, index: int, size: int) -> np.ndarray:
        part = size // 8
        ground = np.zeros((size, size), dtype=bool)
        ground[2 * part : 6 * part, part : 5 * part] = True
        return ground


class Squares(Source):
    """Sixteen training images, seven for validation, five for the test."""

    def __init__(self, **bad: list[int]) -> None:
        self.bad = bad

    def split(self, name: str) -> Pairs:
        size = {"train": 16, "val": 7, "test": 5}[name]
        broken = self.bad.get(name, [])
        return Rows([row(n, **({"image": b"no image"} if n in broken else {})) for n in range(size)], name)
