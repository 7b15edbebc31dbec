"""A contact sheet of a data set: images with their captions, to look at before training."""

import textwrap
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from maskvlm.data.batch import Pairs, Row
from maskvlm.data.images import safe_open
from maskvlm.utils.errors import UserError
from maskvlm.utils.write_errors import write_output

COLUMNS = 4
WRAP = 62  # characters per caption line, as many as fit under an image at the sizes below
MOST_CAPTIONS, MOST_CHARACTERS = 5, 180  # more of either would run into the next row
IMAGE_INCHES, CAPTION_INCHES, LINE_INCHES = 2.4, 4.0, 0.125


def contact_sheet(pairs: Pairs, path: Path, count: int = 24) -> Path:
    """Write a PNG of `count` images, spread evenly over the data set, each above its captions.

    For a row that cannot be read, the reason is shown instead of the image. Small images are shown pixel by pixel,
    large ones smoothed.

    Returns:
        `path`; its folder is created if missing.

    Raises:
        UserError: no images to show, or the file cannot be written.
    """
    count = min(count, len(pairs))
    if count < 1:
        raise UserError("preview", "no images to show", "Check the data set and the count")
    # evenly spread, always the same
    indices = [number * len(pairs) // count for number in range(count)]
    return save_sheet([read_row(pairs, index) for index in indices], path)


def save_sheet(rows: list[Row | UserError], path: Path) -> Path:
    """Write a PNG of these rows, with images opened, or with the reason why there is none.

    Returns:
        `path`; its folder is created if missing.

    Raises:
        UserError: the file cannot be written (73), or the disk is full (74).
    """
    write_output(path, png_of(draw_sheet(rows)))
    return path


def png_of(figure: Figure) -> bytes:
    """A figure as a PNG of 100 dots per inch, without warnings about letters that the font lacks."""
    content = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # matplotlib's font shows Chinese and emoji as boxes
        figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


def read_row(pairs: Pairs, index: int) -> Row | UserError:
    """The row with its image opened, or why it cannot be read."""
    try:
        row = pairs[index]
        return open_row(row["image"], row["captions"], row["image_id"], row["origin"])
    except UserError as error:
        return error


def open_row(image: Any, captions: list[str], title: str, origin: str) -> Row | UserError:
    """A row of a sheet with its image opened here; an unreadable one becomes a cell that says so."""
    try:
        return Row(image=safe_open(image, origin), captions=captions, image_id=title, origin=origin)
    except UserError as error:
        return error


def wrapped(captions: list[str]) -> list[str]:
    """The lines below an image: each caption starts with a dash and continues indented."""
    lines = []
    for caption in captions[:MOST_CAPTIONS]:
        text = textwrap.shorten(caption, MOST_CHARACTERS, placeholder=" ...")
        lines += textwrap.wrap(text, WRAP, initial_indent="- ", subsequent_indent="  ") or ["- (empty)"]
    if len(captions) > MOST_CAPTIONS:
        lines.append(f"  and {len(captions) - MOST_CAPTIONS} more")
    return lines


def draw_sheet(rows: list[Row | UserError]) -> Figure:
    """The sheet, as high as needed for its longest captions."""
    layout = lay_out(rows)
    # not pyplot, which would keep the figure and may need a display
    figure = Figure(figsize=layout.inches, layout="constrained")
    fill_sheet(figure, rows, layout)
    return figure


class Layout(NamedTuple):
    """Layout of a sheet in inches: columns; heights of alternating image and caption rows; width and height."""

    columns: int
    heights: list[float]
    inches: tuple[float, float]


def lay_out(rows: list[Row | UserError]) -> Layout:
    """Compute the layout, each row as high as needed for its longest captions."""
    counts = [0 if isinstance(row, UserError) else len(wrapped(row["captions"])) for row in rows]
    columns = min(COLUMNS, len(rows))
    heights = []
    # a row of images, then a row of captions below it
    for first in range(0, len(rows), columns):
        heights += [IMAGE_INCHES, LINE_INCHES * (max(counts[first : first + columns]) + 2)]
    return Layout(columns, heights, (columns * CAPTION_INCHES, sum(heights)))


def fill_sheet(figure: FigureBase, rows: list[Row | UserError], layout: Layout) -> None:
    """Draw the sheet on a figure, or on a part of one."""
    grid = figure.subplots(len(layout.heights), layout.columns, squeeze=False, height_ratios=layout.heights)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, row in enumerate(rows):
        line, column = divmod(number, layout.columns)
        draw_image(grid[2 * line, column], row)
        text = [] if isinstance(row, UserError) else wrapped(row["captions"])
        print_text(grid[2 * line + 1, column], "\n".join(text))


def draw_image(axes: Axes, row: Row | UserError) -> None:
    """The image under its id, or the reason why there is none."""
    if isinstance(row, UserError):
        print_text(axes, textwrap.fill(f"not readable: {row}", WRAP))
        return
    image = row["image"]
    assert not isinstance(image, bytes | str)
    # an id may contain dollar signs, which would start a formula
    axes.set_title(row["image_id"], fontsize=8, parse_math=False)
    axes.imshow(image, interpolation="nearest" if max(image.size) <= 128 else "antialiased")


def print_text(axes: Axes, text: str, size: float = 7.5) -> None:
    """Print text verbatim from the top left corner, in this size in points: a dollar sign does not start a formula."""
    axes.text(0, 1, text, va="top", fontsize=size, family="monospace", parse_math=False, transform=axes.transAxes)
