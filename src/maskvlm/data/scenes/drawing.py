"""Draws scenes with Pillow, at any size: flat colours, and shapes that fill their cell of the 3x3 grid.

Each shape is drawn once at a large size and shrunk to a mask; an image then takes two pastes per object.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from maskvlm.data.scenes.world import LINES, Scene, Thing

RGB = tuple[int, int, int]

COLOUR_RGB: dict[str, RGB] = {
    "red": (225, 30, 35),
    "orange": (255, 140, 0),
    "yellow": (250, 230, 30),
    "green": (20, 150, 50),
    "turquoise": (50, 215, 215),
    "blue": (35, 75, 240),
    "purple": (135, 35, 175),
    "pink": (255, 125, 195),
}
LIGHT_COLOURS = ("orange", "yellow", "turquoise", "pink")
BACKGROUND_RGB: dict[str, RGB] = {
    "white": (248, 248, 248),
    "mint": (195, 235, 205),
    "grey": (140, 140, 140),
    "maroon": (80, 20, 30),
    "navy": (22, 28, 80),
    "black": (10, 10, 10),
}

# Diameters in cells: a large object and its jitter fill the cell, a small one has half its area.
DIAMETER = {"large": 14 / 16, "small": 10 / 16}
# Folds of a curtain, alternately dark and light: no background has folds, no object is grey.
FOLD_RGB: tuple[RGB, RGB] = ((85, 85, 85), (185, 185, 185))
FOLDS = 24  # folds per image width: two pixels each at 48 pixels
SUPERSAMPLE = 8  # masks are drawn this many times larger, then averaged


class Stamp(NamedTuple):
    """Anti-aliased masks of one object, mode "L": the whole shape, and the pattern's ink on it (or None)."""

    shape: Image.Image
    ink: Image.Image | None


def ink_of(colour: str) -> RGB:
    """Colour of stripes and dots: the object's own colour, made much darker if it is light and vice versa."""
    # 70 % of the way to black or white
    target = 0 if colour in LIGHT_COLOURS else 255
    red, green, blue = (round(0.3 * value + 0.7 * target) for value in COLOUR_RGB[colour])
    return red, green, blue


def corners_of(shape: str) -> list[tuple[float, float]]:
    """Outline of a shape as a polygon within [0, 1], x to the right and y downwards."""
    if shape == "square":
        return [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]
    if shape == "triangle":
        return [(0.5, 0.02), (1.0, 0.94), (0.0, 0.94)]
    if shape == "diamond":
        return [(0.5, 0.0), (0.88, 0.5), (0.5, 1.0), (0.12, 0.5)]
    if shape == "cross":
        low, high = 0.33, 0.67
        return [(low, 0), (high, 0), (high, low), (1, low), (1, high), (high, high), (high, 1), (low, 1),
                (low, high), (0, high), (0, low), (low, low)]  # fmt: skip
    if shape == "star":
        # ten corners, alternately outer and inner, clockwise from the top
        radii = [0.53 if corner % 2 == 0 else 0.22 for corner in range(10)]
        turns = [math.pi * corner / 5 for corner in range(10)]
        return [(0.5 + r * math.sin(t), 0.54 - r * math.cos(t)) for r, t in zip(radii, turns, strict=True)]
    assert shape == "heart", shape
    turns = [2 * math.pi * step / 60 for step in range(60)]
    # the usual heart curve: x = 16 sin^3 t, scaled to the unit square
    heights = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    return [(0.5 + math.sin(t) ** 3 / 2, 0.42 - y / 30) for t, y in zip(turns, heights, strict=True)]


def draw_shape(shape: str, side: int) -> Image.Image:
    """A shape in white on black, mode "L", `side` pixels square."""
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
        if shape == "ring":
            hole = 0.25 * side
            draw.ellipse((hole, hole, side - 1 - hole, side - 1 - hole), fill=0)
    else:
        # from [0, 1] to pixels
        draw.polygon([(x * (side - 1), y * (side - 1)) for x, y in corners_of(shape)], fill=255)
    return mask


def draw_pattern(pattern: str, side: int, step: float) -> Image.Image:
    """Stripes or dots that repeat every `step` pixels, centred, mode "L", `side` pixels square."""
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    # more rows than fit; those outside are cut off
    reach = math.ceil(side / step) + 1
    for row in range(-reach, reach + 1):
        y = side / 2 + row * step
        if pattern == "striped":
            # half ink, half gap; Pillow's coordinates include the last pixel, hence - 1
            draw.rectangle((0, y - step / 4, side, y + step / 4 - 1), fill=255)
            continue
        for column in range(-reach, reach + 1):
            x, radius = side / 2 + column * step, 0.25 * step
            draw.ellipse((x - radius, y - radius, x + radius - 1, y + radius - 1), fill=255)
    return mask


@lru_cache(maxsize=4096)
def stamp_of(shape: str, size: str, pattern: str, image_size: int) -> Stamp:
    """The masks of a kind of object in images of `image_size` pixels."""
    cell = image_size / 3
    # in pixels of the image
    side = max(1, round(DIAMETER[size] * cell))
    outline = draw_shape(shape, side * SUPERSAMPLE)
    if pattern == "plain":
        return Stamp(outline.reduce(SUPERSAMPLE), None)
    # the pattern within the shape, nothing elsewhere
    ink = ImageChops.darker(outline, draw_pattern(pattern, side * SUPERSAMPLE, cell * SUPERSAMPLE / 4))
    return Stamp(outline.reduce(SUPERSAMPLE), ink.reduce(SUPERSAMPLE))


def corner_of(thing: Thing, side: int, image_size: int) -> tuple[int, int]:
    """Left and top pixel of an object whose mask is `side` pixels wide."""
    cell = image_size / 3
    # centre of the cell, shifted by sixteenths of it, minus half of the mask
    left = (thing.column + 0.5 + thing.dx / 16) * cell - side / 2
    top = (thing.row + 0.5 + thing.dy / 16) * cell - side / 2
    # `round` rounds halves to even, so neighbours would be a pixel closer or farther apart
    return math.floor(left + 0.5), math.floor(top + 0.5)


def draw_scene(scene: Scene, size: int) -> Image.Image:
    """The scene as an RGB image of `size` x `size` pixels."""
    image = Image.new("RGB", (size, size), BACKGROUND_RGB[scene.background])
    for thing in scene.things:
        stamp = stamp_of(thing.shape, thing.size, thing.pattern, size)
        corner = corner_of(thing, stamp.shape.width, size)
        image.paste(COLOUR_RGB[thing.colour], corner, stamp.shape)
        if stamp.ink is not None:
            image.paste(ink_of(thing.colour), corner, stamp.ink)
    return image


def draw_object_mask(scene: Scene, size: int) -> NDArray[np.bool_]:
    """True for pixels, [size, size], of which an object covers at least half."""
    cover = Image.new("L", (size, size), 0)
    for thing in scene.things:
        stamp = stamp_of(thing.shape, thing.size, thing.pattern, size).shape
        cover.paste(255, corner_of(thing, stamp.width, size), stamp)
    return np.asarray(cover) >= 128


@lru_cache(maxsize=256)
def curtain_of(size: int, line: str) -> Image.Image:
    """The curtain over a row or column (a key of LINES) of images of `size` pixels, mode "RGBA", clear elsewhere."""
    curtain = Image.new("RGBA", (size, size))
    draw = ImageDraw.Draw(curtain)
    # the first cell of the line
    row, column = divmod(LINES[line][0], 3)
    rows, columns = (3, 1) if line.endswith("column") else (1, 3)
    top, bottom = round(row * size / 3), round((row + rows) * size / 3) - 1
    left, right = round(column * size / 3), round((column + columns) * size / 3) - 1
    for x in range(left, right + 1):
        draw.line((x, top, x, bottom), fill=FOLD_RGB[x * FOLDS // size % 2])
    return curtain


def draw_behind(scene: Scene, size: int, line: str) -> Image.Image:
    """The scene with a curtain over a row or column (a key of LINES) that hides everything there."""
    visible = tuple(thing for thing in scene.things if thing.cell not in LINES[line])  # edges may stick out by a pixel
    image = draw_scene(Scene(scene.background, visible), size)
    curtain = curtain_of(size, line)
    image.paste(curtain, (0, 0), curtain)
    return image
