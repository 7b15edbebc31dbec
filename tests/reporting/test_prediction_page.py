"""The page of predictions: its size, its words and its colours."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from maskvlm.objectives.task import Prediction
from maskvlm.reporting.page import GREEN, GREY, RED
from maskvlm.reporting.prediction_page import ExampleCell, draw_page, example_page


def make_cell(images: int = 1, **changes: Any) -> ExampleCell:
    whole: dict[str, Any] = {"id": "7", "text": "what is it", "truth": "cat", "prediction": "dog", "right": 0.0}
    image = Image.new("RGB", (40, 20), "navy")
    return ExampleCell(Prediction(**{**whole, "index": [0], "kind": "", **changes}), [image] * images)  # type: ignore[typeddict-item]


def words(*cells: ExampleCell) -> list[str]:
    return [text.get_text() for text in draw_page(cells).figure.texts]


def test_words_of_a_cell() -> None:
    assert words(make_cell()) == [
        "Some predictions, at even distances through the split; 0 of these 1 right",
        "what is it", "truth:     cat", "predicted: dog",
    ]  # fmt: skip
    assert words(make_cell(right=None, measured={"cider": 61.25}))[2:] == [
        "truth:     cat", "predicted: dog", "cider 61.2",
    ]  # fmt: skip
    counted = words(make_cell(right=1.0), make_cell(right=0.3), make_cell(right=None))[0]
    assert counted.endswith("; 1.3 of these 2 right")


def test_colours_are_the_verdict() -> None:
    figure = draw_page([make_cell(right=right) for right in (1.0, 0.0, None, 0.5, 0.3)]).figure
    colours = [axes.patches[0].get_edgecolor()[:3] for axes in figure.axes]
    assert colours == [to_rgb(colour) for colour in (GREEN, RED, GREY, GREEN, RED)]


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
