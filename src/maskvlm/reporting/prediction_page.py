"""A page of examples: images, question, truth and prediction; right predictions are green, wrong ones red."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskvlm.data.images import safe_open
from maskvlm.objectives.task import Prediction
from maskvlm.reporting.page import BLACK, GREEN, GREY, RED, Page, Segment

COLUMNS = 3
IMAGE, TEXT, MARGIN, LINE, GAP = 1.25, 2.6, 0.2, 0.15, 0.12  # inches
CELL_LINES, QUESTION_LINES = 9, 4  # maximum lines beside an image, and of a question
SIZE = 8  # points of the font


class ExampleCell(NamedTuple):
    """A prediction with its images (encoded bytes, paths or Pillow images) and, optionally, a label for each."""

    prediction: Prediction
    images: Sequence[Any]
    labels: Sequence[str] = ()


def example_page(cells: Sequence[ExampleCell], path: Path) -> Path:
    """Write a PNG; rows are filled from left to right.

    Returns:
        `path`.
    """
    return draw_page(cells).save(path)


def draw_page(cells: Sequence[ExampleCell]) -> Page:
    """Cells of equal size, as wide as the example with the most images needs."""
    most = max(len(cell.images) for cell in cells)
    columns = COLUMNS if most == 1 else 2
    # Rounded up.
    rows = -(-len(cells) // columns)
    cell_width, cell_height = most * (IMAGE + GAP) + TEXT, IMAGE + 2 * GAP
    size = (columns * cell_width + 2 * MARGIN, rows * cell_height + 2 * MARGIN + 2 * LINE)
    page = Page(*size, SIZE)
    # The truth of a test split may be unpublished.
    known = [cell.prediction["right"] for cell in cells if cell.prediction["right"] is not None]
    right = f"; {sum(known):.3g} of these {len(known)} right" if known else ""
    title = f"Some predictions, at even distances through the split{right}"
    page.line(MARGIN, MARGIN, [Segment(title, bold=True)])
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        draw_cell(page, MARGIN + column * cell_width, MARGIN + 2 * LINE + row * cell_height, cell, most)
    return page


def draw_cell(page: Page, left: float, top: float, cell: ExampleCell, most: int) -> None:
    """Draw the images side by side, their labels below, and the text to their right."""
    prediction = cell.prediction
    # `right` may be a fraction (VQA): from one half on it counts as right.
    colour = GREY if prediction["right"] is None else GREEN if prediction["right"] >= 0.5 else RED
    for place, image in enumerate(cell.images):
        page.image(left + place * (IMAGE + GAP), top, IMAGE, safe_open(image, prediction["id"]), colour)
    for place, label in enumerate(cell.labels):
        page.line(left + place * (IMAGE + GAP), top + IMAGE + GAP / 3, [Segment(label, GREY)])
    # The question, the truth if known, the prediction.
    question = page.wrap(prediction["text"] or " ", TEXT - GAP, QUESTION_LINES)
    answers = [(f"truth:     {prediction['truth']}", GREY)] if prediction["truth"] else []
    answers.append((f"predicted: {prediction['prediction']}", colour))
    measured = [(f"{name} {value:.1f}", GREY) for name, value in prediction.get("measured", {}).items()]
    # A short question leaves more lines to the answers, which are long where they are captions.
    most_lines = max(1, (CELL_LINES - len(question) - len(measured)) // len(answers))
    lines = [(line, BLACK) for line in question]
    lines += [(line, shade) for words, shade in answers for line in page.wrap(words, TEXT - GAP, most_lines)]
    lines += measured
    for number, (line, shade) in enumerate(lines):
        words = Segment(line, shade, bold=shade in (GREEN, RED))
        page.line(left + most * (IMAGE + GAP), top + number * LINE, [words])
