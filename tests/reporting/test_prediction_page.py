"""The page of predictions: its size, its words and its colours."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

from maskvlm.objectives.task import Prediction
from maskvlm.reporting.page import GREEN, GREY, RED, Page
from maskvlm.reporting.prediction_page import GAP, SIZE, TEXT, ExampleCell, draw_page, example_page


def make_cell(images: int = 1, **changes: Any) -> ExampleCell:
    whole = {
        "id": "7",
        "text": "what is it",
        "truth": "cat",
        "prediction": "dog",
        "right": 0.0,
        "index": [0],
        "kind": "",
    }
    image = Image.new("RGB", (40, 20), "navy")
    return ExampleCell(Prediction(**{**whole, **changes}), [image] * images)  # type: ignore[typeddict-item]


def words(*cells: ExampleCell) -> list[str]:
    return [text.get_text() for text in draw_page(cells).figure.texts]


def frames(*cells: ExampleCell) -> list[Any]:
    return [axes.patches[0].get_edgecolor()[:3] for axes in draw_page(cells).figure.axes]


def test_words_of_a_cell() -> None:
    assert words(make_cell()) == [
        "Some predictions, at even distances through the split; 0 of these 1 right",
        "what is it", "truth:     cat", "predicted: dog",
    ]  # fmt: skip
    assert words(make_cell(truth="", right=None))[1:] == ["what is it", "predicted: dog"]
    assert words(make_cell(right=None, measured={"cider": 61.25}))[2:] == [
        "truth:     cat",
        "predicted: dog",
        "cider 61.2",
    ]
    assert words(make_cell(right=1.0), make_cell(right=0.3), make_cell(right=None))[0].endswith(
        "; 1.3 of these 2 right"
    )
    assert words(make_cell(right=None))[0].endswith("through the split")


def test_a_long_question_ends_in_dots_and_nothing_is_a_formula() -> None:
    lines = words(make_cell(text="word " * 100))
    assert len(lines) == 1 + 4 + 2
    assert lines[4].endswith("…")
    assert all(len(line) <= 38 for line in lines[1:])
    page = draw_page([make_cell(text="$x_1$ costs $5")]).figure
    assert page.texts[1].get_text() == "$x_1$ costs $5"
    assert not page.texts[1].get_parse_math()


def test_a_short_question_leaves_its_lines_to_the_answers() -> None:
    caption = "a small plain turquoise diamond in the middle and a small purple star on the left"
    lines = words(make_cell(text="image 20", truth=caption, prediction=caption, measured={"cider": 99.6}))[2:]
    assert len(lines) == 3 + 3 + 1
    assert " ".join(lines) == f"truth:     {caption} predicted: {caption} cider 99.6"
    lines = words(make_cell(text="image 20", truth="word " * 100, prediction="word " * 100))[2:]
    assert [line.endswith("…") for line in lines] == [False, False, False, True] * 2


@pytest.mark.parametrize("question", ["what", "word " * 100])
@pytest.mark.parametrize("measured", [{}, {"cider": 1.0}, {"cider": 1.0, "bleu_4": 2.0}])
def test_no_text_reaches_the_next_row(question: str, measured: dict[str, float]) -> None:
    full = make_cell(text=question, truth="word " * 100, prediction="word " * 100, measured=measured)
    page = draw_page([full] * 6).figure
    renderer = FigureCanvasAgg(page).get_renderer()
    second_row = min(axes.get_window_extent(renderer).y1 for axes in page.axes)
    bottoms = [line.get_window_extent(renderer).y0 for line in page.texts]
    assert not [bottom for bottom in bottoms if abs(bottom - second_row) < 3]
    assert sum(bottom > second_row for bottom in bottoms) == 1 + (len(bottoms) - 1) // 2


LONG = "how many of the men in blue shirts stand with their bicycles on the left side of the table?"


def test_a_long_truth_and_a_long_answer_end_in_dots_too() -> None:
    lines = words(make_cell(text="word " * 100, truth=LONG * 2, prediction="word " * 40))[5:]
    assert [line.endswith("…") for line in lines] == [False, True, False, True]
    assert words(make_cell(truth="a b c"))[2] == "truth:     a b c"


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("text", [LONG * 3, "W" * 300, "これは何ですか" * 20, "mm " * 90])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_no_text_is_wider_than_its_column(text: str, images: int) -> None:
    """As it is drawn, in pixels: the letters of a small font take whole ones."""
    page = draw_page([make_cell(images, text=text, truth=text, prediction=text) for _ in range(4)]).figure
    renderer = FigureCanvasAgg(page).get_renderer()
    edge = page.get_size_inches()[0] * page.dpi
    boxes = [axes.get_window_extent(renderer) for axes in page.axes]
    for line in page.texts:
        box = line.get_window_extent(renderer)
        right_of = [other.x0 for other in boxes if other.x0 > box.x0 and other.y0 < box.y1 and box.y0 < other.y1]
        assert box.x1 + 3 < min([edge, *right_of]), line.get_text()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=150), st.integers(1, 4))
@pytest.mark.filterwarnings("ignore:Glyph")
def test_words_of_any_script_are_wrapped_within_the_column(text: str, most: int) -> None:
    page = Page(6, 5, SIZE)
    lines = page.wrap(text, TEXT - GAP, most)
    assert len(lines) <= most
    assert all(page.inches(line) <= TEXT - GAP for line in lines)
    if not (lines and lines[-1].endswith("…")):
        assert "".join("".join(lines).split()) == "".join(text.split())


def test_images_of_different_parts_are_labelled() -> None:
    cell = make_cell(2)._replace(labels=("found", "truth"))
    page = draw_page([cell, make_cell(2)]).figure
    labels = {text.get_text(): text for text in page.texts if text.get_text() in ("found", "truth")}
    assert list(labels) == ["found", "truth"]
    for text, axes in zip(labels.values(), page.axes, strict=False):  # below its own image
        place = axes.get_position(original=True)
        assert text.get_position()[0] == pytest.approx(place.x0)
        assert 0 < place.y0 - text.get_position()[1] < GAP / page.get_size_inches()[1]


def test_colours_are_the_verdict() -> None:
    assert frames(
        make_cell(right=1.0), make_cell(right=0.0), make_cell(right=None), make_cell(right=0.5), make_cell(right=0.3)
    ) == [to_rgb(colour) for colour in (GREEN, RED, GREY, GREEN, RED)]


@pytest.mark.parametrize(
    ("images", "cells", "columns", "rows"), [(1, 1, 3, 1), (1, 7, 3, 3), (2, 3, 2, 2), (3, 4, 2, 2)]
)
def test_the_page_is_as_large_as_its_cells_need(images: int, cells: int, columns: int, rows: int) -> None:
    page = draw_page([make_cell(images) for _ in range(cells)]).figure
    width, height = page.get_size_inches()
    assert width == pytest.approx(columns * (images * 1.37 + 2.6) + 0.4)
    assert height == pytest.approx(rows * 1.49 + 0.7)
    assert len(page.axes) == images * cells
    corners = {tuple(np.round(axes.get_position().p0, 4)) for axes in page.axes}
    assert len(corners) == images * cells  # none over another
    for axes in page.axes:
        box = axes.get_position()
        assert 0 <= box.x0 < box.x1 <= 1
        assert 0 <= box.y0 < box.y1 <= 1


def test_a_page_of_any_script_is_written(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    data = BytesIO()
    Image.new("RGB", (300, 200), "orange").save(data, "JPEG")
    cell = ExampleCell(make_cell(text="これは何ですか 😀", prediction="<b>&").prediction, [data.getvalue()])
    path = example_page([cell, make_cell(2)], tmp_path / "page.png")
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[:2] == (int((1.49 + 0.7) * 100), int((2 * (2 * 1.37 + 2.6) + 0.4) * 100))
    colours = {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()}
    assert (0, 0, 128) in colours  # the navy image
    assert len(colours) > 50
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
