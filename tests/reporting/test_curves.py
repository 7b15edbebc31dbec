"""`curves.png`: what is drawn where, and that it is drawn whatever was logged."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maskvlm.reporting.curves import curves, draw_curves, read_rows, smooth

LOSSES = [
    {"step": step, "train/mim": 0.5 / (step + 1), "train/itc": 4.0 - step / 50, "level/itc": 4.159, "train/loss": 9.0}
    for step in range(0, 100, 2)
]
RATES: list[dict[str, float]] = [
    {"step": step, "lr-AdamW/encoders": 1e-5, "lr-AdamW/rest": 3e-4, "lr-AdamW/rest (no decay)": 3e-4}
    for step in (0, 99)
]
SPEED: list[dict[str, float]] = [
    {"step": step, "train/pairs_per_second": 80.0, "train/data_wait": wait} for step, wait in ((0, 0.02), (99, 0.04))
]


def recalls(step: int, images: float, value: float) -> dict[str, float]:
    return {"step": step, "retrieval/pictures": images, "retrieval/tr_r1": value, "retrieval/itc_tr_r1": value / 2}


def drawn(rows: Any, **levels: float) -> dict[str, Any]:
    """Panels by title."""
    return {axes.get_title(): axes for axes in draw_curves(rows, levels).axes if axes.get_title()}


def test_what_is_logged_is_read_without_empty_cells_and_smoothed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/itc,mlm/accuracy\n9,4.1,\n19,,60.5\n")
    assert smooth([0.0, 3.0, 6.0, 0.0, 0.0], 1) == [0.0, 3.0, 3.0, 2.0, 0.0]
    assert read_rows(path) == [{"step": 9, "train/itc": 4.1}, {"step": 19, "mlm/accuracy": 60.5}]


def test_each_loss_has_a_panel_with_its_level() -> None:
    panels = drawn(LOSSES + RATES + SPEED, mim=0.5)
    titles = ["ITC: contrast", "MIM: masked pixels", "learning rate", "pairs per second (waiting for data: 3 %)"]
    assert list(panels) == titles
    values, _, level = panels["ITC: contrast"].lines
    assert list(values.get_ydata()) == [row["train/itc"] for row in LOSSES]
    assert level.get_label() == "knows nothing: 4.16"
    assert level.get_linestyle() == "--"
    assert list(level.get_ydata()) == pytest.approx([4.159] * 50)
    assert panels["MIM: masked pixels"].lines[2].get_label() == "knows nothing: 0.500"
    assert [line.get_label() for line in panels["learning rate"].lines] == ["encoders", "rest"]
    assert {axes.get_xlim() for axes in panels.values()} == {(0.0, 1.02 * 99)}


def test_recall_among_other_images_is_not_joined() -> None:
    panels = drawn([recalls(10, 64, 40.0), recalls(20, 64, 60.0), recalls(20, 500, 45.0)])
    panel = panels["recall@1, %, of 64 images (stars: 500)"]
    panel_lines = [(list(line.get_ydata()), line.get_marker(), line.get_linestyle()) for line in panel.lines]
    assert ([40.0, 60.0], "o", "-") in panel_lines
    assert ([45.0], "*", "None") in panel_lines
    assert ([20.0, 30.0], "o", ":") in panel_lines


def test_whatever_was_logged_becomes_an_image(tmp_path: Path) -> None:
    for rows, size in (([], (462, 330)), (LOSSES + RATES + SPEED + [recalls(99, 64, 40.0)], (1386, 627))):
        path = curves(rows, tmp_path / "curves.png", title="$run_1")  # a dollar sign starts no formula
        assert Image.open(path).size == size
