"""A page of examples: images, what was asked, the truth and the prediction, green where it is right, else red."""

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle

from maskvlm.data.images import safe_open
from maskvlm.objectives.task import Prediction

COLUMNS = 3
IMAGE, TEXT, MARGIN, LINE, GAP = 1.25, 2.6, 0.2, 0.15, 0.12  # inches
ASKED, SAID = 4, 2  # lines at most: of a question, of the truth and of the prediction each
DPI, SIZE = 100, 8  # dots an inch, points of the font
FONTS = [FontProperties(family="monospace", size=SIZE, weight=weight) for weight in ("normal", "bold")]
MORE = " …"
GREEN, RED, GREY = "#1a7f37", "#cf222e", "#6e7781"


class Shown(NamedTuple):
    """A prediction with its images: encoded bytes, paths or Pillow images; and what each image is, or nothing."""

    prediction: Prediction
    images: Sequence[Any]
    labels: Sequence[str] = ()


def example_page(shown: Sequence[Shown], path: Path) -> Path:
    """Write a PNG; rows are filled from left to right.

    Returns:
        `path`.
    """
    with warnings.catch_warnings():  # scripts that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", "Glyph")
        draw_page(shown).savefig(path, format="png", dpi=DPI)
    return path


def draw_page(shown: Sequence[Shown]) -> Figure:
    """Cells of one size, as wide as the example with most images needs."""
    most = max(len(one.images) for one in shown)
    columns = COLUMNS if most == 1 else 2
    rows = -(-len(shown) // columns)
    cell_width, cell_height = most * (IMAGE + GAP) + TEXT, IMAGE + 2 * GAP
    size = (columns * cell_width + 2 * MARGIN, rows * cell_height + 2 * MARGIN + 2 * LINE)
    figure = Figure(figsize=size, dpi=DPI)
    known = [one.prediction["right"] for one in shown if one.prediction["right"] is not None]
    right = f"; {sum(known):.3g} of these {len(known)} right" if known else ""
    ink = Ink(figure)
    ink.text(MARGIN, MARGIN, f"Some predictions, at even distances through the split{right}", "black", bold=True)
    for number, one in enumerate(shown):
        row, column = divmod(number, columns)
        draw_cell(ink, MARGIN + column * cell_width, MARGIN + 2 * LINE + row * cell_height, one, most)
    return figure


def draw_cell(ink: "Ink", left: float, top: float, shown: Shown, most: int) -> None:
    """The images side by side, what they are below, the words to their right."""
    prediction = shown.prediction
    colour = GREY if prediction["right"] is None else GREEN if prediction["right"] >= 0.5 else RED
    for place, image in enumerate(shown.images):
        ink.image(left + place * (IMAGE + GAP), top, image, prediction["id"], colour)
    for place, label in enumerate(shown.labels):
        ink.text(left + place * (IMAGE + GAP), top + IMAGE + GAP / 3, label, GREY)
    parts = [(prediction["text"] or " ", ASKED, "black"), (f"said:  {prediction['prediction']}", SAID, colour)]
    if prediction["truth"]:
        parts.insert(1, (f"truth: {prediction['truth']}", SAID, GREY))
    lines = [(line, shade) for words, most_lines, shade in parts for line in ink.wrap(words, TEXT - GAP, most_lines)]
    for number, (line, shade) in enumerate(lines):
        ink.text(left + most * (IMAGE + GAP), top + number * LINE, line, shade, bold=shade in (GREEN, RED))


class Ink:
    """Text and images at places given in inches from the top left."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.width, self.height = figure.get_size_inches()
        self.renderer = FigureCanvasAgg(figure).get_renderer()

    def inches(self, words: str) -> float:
        """Width of a line as it is drawn, in the wider of the two weights: more than the font says, as each
        letter takes whole pixels, and more still in a script that the font lacks."""
        return max(self.renderer.get_text_width_height_descent(words, font, False)[0] for font in FONTS) / DPI

    def wrap(self, words: str, width: float, most: int) -> list[str]:
        """At most so many lines, none wider than `width` inches; dots say that there is more."""
        letters = int(width / self.inches("m"))
        while True:
            lines = textwrap.wrap(words, letters, max_lines=most, placeholder=MORE)
            over = max((self.inches(line) / width for line in lines), default=0.0)
            if over <= 1 or letters == 1:
                return lines
            letters = max(1, min(letters - 1, int(letters / over)))

    def text(self, left: float, top: float, words: str, colour: str, bold: bool = False) -> None:
        """One line, as it is: a dollar sign starts no formula."""
        self.figure.text(
            left / self.width, 1 - top / self.height, words, va="top", fontsize=SIZE, family="monospace", color=colour,
            weight="bold" if bold else "normal", parse_math=False,
        )  # fmt: skip

    def image(self, left: float, top: float, image: Any, name: str, colour: str) -> None:
        """Whole, in its own proportions, in a frame of the verdict's colour."""
        area = (left / self.width, 1 - (top + IMAGE) / self.height, IMAGE / self.width, IMAGE / self.height)
        axes = self.figure.add_axes(area)
        pixels = np.asarray(safe_open(image, name))
        axes.imshow(pixels, interpolation="nearest" if max(pixels.shape) <= 128 else "antialiased")
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_visible(False)
        frame = Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=colour, linewidth=3)
        frame.set_clip_on(False)
        axes.add_patch(frame)
