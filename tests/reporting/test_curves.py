"""`curves.png`: what is drawn where, and that it is drawn whatever was logged."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maskvlm.reporting.curves import curves, draw_curves, read_rows, series, smooth

LOSSES = [
    {
        "step": step,
        "train/mim": 0.5 / (step + 1),
        "train/itc": 4.0 - step / 50,
        "level/itc": 4.159,
        "train/loss": 9.0,
    }
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
    return {
        "step": step,
        "retrieval/pictures": images,
        "retrieval/tr_r1": value,
        "retrieval/itc_tr_r1": value / 2,
    }


def drawn(rows: Any, **levels: float) -> dict[str, Any]:
    """Panels by title."""
    return {axes.get_title(): axes for axes in draw_curves(rows, levels).axes if axes.get_title()}


def test_a_csv_is_read_without_its_empty_cells(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/itc,mlm/accuracy\n9,4.1,\n19,,60.5\n")
    assert read_rows(path) == [{"step": 9, "train/itc": 4.1}, {"step": 19, "mlm/accuracy": 60.5}]


def test_series_leave_out_what_was_not_measured() -> None:
    rows = [{"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "a": math.nan}, {"step": 4, "a": 5.0}]
    assert series(rows, "a") == ([1, 4], [2.0, 5.0])
    assert series(rows, "b") == ([], [])


@given(st.lists(st.floats(-1e3, 1e3), max_size=30), st.integers(0, 10))
def test_smoothing_stays_within_the_values_and_starts_at_the_first(values: list[float], reach: int) -> None:
    means = smooth(values, reach)
    assert len(means) == len(values)
    assert means[:1] == values[:1]
    assert all(min(values) - 1e-6 <= mean <= max(values) + 1e-6 for mean in means)
    assert smooth(values, 0) == values


def test_smoothing_is_a_mean_of_both_sides() -> None:
    assert smooth([0.0, 3.0, 6.0, 0.0, 0.0], 1) == [0.0, 3.0, 3.0, 2.0, 0.0]


def test_each_loss_has_a_panel_with_its_level() -> None:
    panels = drawn(LOSSES + RATES + SPEED, mim=0.5)
    assert list(panels) == [
        "ITC: contrast",
        "MIM: masked pixels",
        "learning rate",
        "pairs per second (waiting for data: 3 %)",
    ]
    values, _, level = panels["ITC: contrast"].lines
    assert list(values.get_ydata()) == [row["train/itc"] for row in LOSSES]
    assert level.get_label() == "knows nothing: 4.16"
    assert level.get_linestyle() == "--"
    assert list(level.get_ydata()) == pytest.approx([4.159] * 50)
    assert panels["MIM: masked pixels"].lines[2].get_label() == "knows nothing: 0.500"
    assert [line.get_label() for line in panels["learning rate"].lines] == ["encoders", "rest"]
    assert {axes.get_xlim() for axes in panels.values()} == {(0.0, 1.02 * 99)}


def test_a_loss_without_a_level_is_drawn_alone() -> None:
    (panel,) = drawn([{"step": step, "train/vqa": 3.0} for step in range(3)]).values()
    assert panel.get_title() == "vqa"
    assert len(panel.lines) == 2


def test_recall_among_other_images_is_not_joined() -> None:
    panels = drawn([recalls(10, 64, 40.0), recalls(20, 64, 60.0), recalls(20, 500, 45.0)])
    panel = panels["recall@1, %, of 64 images (stars: 500)"]
    panel_lines = [(list(line.get_ydata()), line.get_marker(), line.get_linestyle()) for line in panel.lines]
    assert ([40.0, 60.0], "o", "-") in panel_lines
    assert ([45.0], "*", "None") in panel_lines
    assert ([20.0, 30.0], "o", ":") in panel_lines


def test_held_out_metrics_show_the_right_partner_and_the_wrong_one() -> None:
    row = {
        "mlm/accuracy": 60.0,
        "mlm/accuracy_wrong_image": 50.0,
        "mim/mse": 0.1,
        "mim/mse_wrong_text": 0.2,
        "a/b": 1.0,
    }
    panels = drawn([{"step": step, **row} for step in (1, 2)])
    assert list(panels) == ["masked words right, %", "squared error of masked pixels", "a"]
    words = {line.get_label(): list(line.get_ydata()) for line in panels["masked words right, %"].lines}
    assert words["right image"] == [60.0, 60.0]
    assert words["wrong image"] == [50.0, 50.0]
    assert [line.get_label() for line in panels["a"].lines] == ["b"]


def test_a_task_shows_what_it_is_judged_by_first_and_the_level_of_each() -> None:
    """Kinds of examples stand in the table: there are dozens of some."""
    kinds = {f"x/accuracy/{kind}{end}": 50.0 for kind in "abcdefg" for end in ("", "_majority")}
    judged = {"x/accuracy": 60.0, "x/accuracy_majority": 40.0, "x/accuracy_ceiling": 99.0, "x/consistency": 70.0}
    row = kinds | judged | {"x/consistency_chance": 6.0, "x/examples": 200.0, "score": 70.0}
    axes = drawn([{"step": step, **row} for step in (1, 2)])["x"]
    lines = [(line.get_label(), line.get_ydata()[0], line.get_linestyle()) for line in axes.lines]
    assert [(y, style) for _, y, style in lines] == [(70.0, "-"), (6.0, "--"), (60.0, "-"), (40.0, "--")]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["consistency", "chance level", "accuracy"]


def test_a_task_without_percentages_shows_its_metrics() -> None:
    panel = drawn([{"step": step, "y/mean_error": 3.0, "y/examples": 200.0} for step in (1, 2)])["y"]
    assert [line.get_label() for line in panel.lines] == ["mean_error"]


def test_a_rate_without_decay_is_drawn_where_it_has_no_twin() -> None:
    rows = [{"step": s, "lr-AdamW/encoders (no decay)": 1e-5, "lr-AdamW/rest": 1e-3} for s in (1, 2)]
    assert len(drawn(rows)["learning rate"].lines) == 2
    rows = [{**row, "lr-AdamW/rest (no decay)": 5e-4} for row in rows]
    assert len(drawn(rows)["learning rate"].lines) == 2


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        ([], (462, 330)),
        (LOSSES[:1], (924, 330)),
        (LOSSES + RATES + SPEED + [recalls(99, 64, 40.0)], (1386, 627)),
    ],
)
def test_whatever_was_logged_becomes_an_image(
    rows: list[dict[str, float]], size: tuple[int, int], tmp_path: Path
) -> None:
    path = curves(rows, tmp_path / "curves.png", title="$run_1")  # a dollar sign starts no formula
    assert Image.open(path).size == size
