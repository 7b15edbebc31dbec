"""A page of images and text as a PNG, laid out in inches from the top left corner."""

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

DPI = 100  # dots per inch
BLACK, GREY, GREEN, RED, SHADE = "#222222", "#6e7781", "#1a7f37", "#cf222e", "#ffe9a8"
MORE = " …"


@contextmanager
def boxes_for_glyphs() -> Iterator[None]:
    """Context in which characters that the font lacks are drawn as boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        yield


class Segment(NamedTuple):
    """A part of a line with its style."""

    text: str
    colour: str = BLACK
    shade: bool = False
    bold: bool = False


Line = list[Segment]


class Page:
    """An empty page.

    Args:
        width, height: in inches.
        points: size of the font, DejaVu Sans Mono: at 7.2 points a character is 0.06 inches wide.
    """

    def __init__(self, width: float, height: float, points: float) -> None:
        # Without pyplot, which keeps every figure in memory. The renderer measures text before anything is drawn.
        self.figure = Figure(figsize=(width, height), dpi=DPI)
        self.width, self.height, self.points = width, height, points
        self._fonts = [FontProperties(family="monospace", size=points, weight=each) for each in ("normal", "bold")]
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.character = points / DPI * 5 / 6  # inches

    def save(self, path: Path) -> Path:
        """Write the PNG; its folder must exist. Returns `path`."""
        with boxes_for_glyphs():
            self.figure.savefig(path, format="png", dpi=DPI)
        return path

    def line(self, left: float, top: float, line: Line) -> None:
        """Draw a line of segments, each verbatim: a dollar sign does not start a formula."""
        for segment in line:
            if segment.text.strip():
                # matplotlib counts from the bottom left, in fractions of the page.
                box = {"facecolor": SHADE, "edgecolor": "none", "pad": 0.6} if segment.shade else None
                self.figure.text(
                    left / self.width, 1 - top / self.height, segment.text, va="top", fontsize=self.points,
                    family="monospace", color=segment.colour, weight="bold" if segment.bold else "normal", bbox=box,
                    parse_math=False,
                )  # fmt: skip
            # The font is monospaced, so nothing needs to be measured here.
            left += self.character * len(segment.text)

    def inches(self, words: str) -> float:
        """Width of a line as drawn, in the wider of the two font weights. It exceeds the nominal width, as each letter
        takes whole pixels, even more so in a script that the font lacks."""
        with boxes_for_glyphs():
            sizes = [self._renderer.get_text_width_height_descent(words, font, False) for font in self._fonts]
        return max(size[0] for size in sizes) / DPI

    def wrap(self, words: str, width: float, most: int) -> list[str]:
        """The words in at most `most` lines, none wider than `width` inches; an ellipsis marks omitted text."""
        # Wrapped by number of characters, then checked against the width in inches; each round allows fewer.
        letters = int(width / self.inches("m"))
        while True:
            lines = textwrap.wrap(words, letters, max_lines=most, placeholder=MORE)
            over = max((self.inches(line) / width for line in lines), default=0.0)
            if over <= 1 or letters == 1:
                return lines
            letters = max(1, min(letters - 1, int(letters / over)))

    def image(self, left: float, top: float, side: float, pixels: Any, frame: str = "") -> None:
        """Draw a whole image, [H, W, 3], 8-bit or RGB from 0 to 1, in its own proportions in a square of `side` inches.
        Small images keep hard pixels, large ones are smoothed. frame: colour of a frame around the square."""
        area = (left / self.width, 1 - (top + side) / self.height, side / self.width, side / self.height)
        axes = self.figure.add_axes(area)
        axes.set_axis_off()
        pixels = np.asarray(pixels)
        # In small images the pixels themselves matter.
        axes.imshow(pixels, interpolation="nearest" if max(pixels.shape) <= 128 else "antialiased")
        if frame:
            around = Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=frame, linewidth=3)
            # Half of its line is outside the image's own area.
            around.set_clip_on(False)
            axes.add_patch(around)

    def rule(self, left: float, right: float, top: float) -> None:
        """Draw a pale horizontal line."""
        across, down = (left / self.width, right / self.width), 1 - top / self.height
        self.figure.add_artist(Line2D(across, (down, down), color="#d8d8d8", linewidth=0.6))
