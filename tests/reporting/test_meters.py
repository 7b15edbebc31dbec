"""Meters: smoothed losses, the clock, time left, and how numbers are written."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toys import toy_batch

from maskvlm.reporting.meters import LossMeter, RunningMeans, StepSpeed, ThroughputMeter, TimeLeft, duration, number


class Ticks:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_smoothed_starts_without_bias_and_forgets() -> None:
    smoothed = RunningMeans(0.5)
    assert smoothed.read() == {}
    smoothed.take({"itc": torch.tensor(4.0), "itm": 1.0})
    assert smoothed.read() == {"itc": 4.0, "itm": 1.0}
    smoothed.take({"itc": torch.tensor(1.0), "itm": 1.0})
    assert smoothed.read() == pytest.approx({"itc": (0.5 * 4 + 1) / 1.5, "itm": 1.0})


def test_smoothed_starts_anew_when_a_name_comes() -> None:
    smoothed = RunningMeans(0.5)
    smoothed.take({"itc": 4.0})
    smoothed.take({"itc": 1.0, "mlm": 2.0})
    assert smoothed.read() == {"itc": 1.0, "mlm": 2.0}


def test_losses_are_the_terms_alone_and_levels_are_asked_for_the_global_batch() -> None:
    batch_sizes: list[int] = []
    trainer: Any = SimpleNamespace(
        callback_metrics={
            "train/itc": torch.tensor(2.0),
            "train/loss": torch.tensor(9.0),
            "train/pairs_per_second": torch.tensor(80.0),
            "mlm/accuracy": torch.tensor(60.0),
        },
        world_size=4,
    )

    def chance_levels(pairs: int) -> dict[str, float]:
        batch_sizes.append(pairs)
        return {"itc": math.log(pairs)}

    losses = LossMeter()
    losses.take(trainer)
    readings = losses.read(trainer, SimpleNamespace(task=SimpleNamespace(chance_levels=chance_levels)), toy_batch(6))  # type: ignore[arg-type]
    assert readings.losses == {"itc": 2.0}
    assert batch_sizes == [24]
    assert readings.levels == pytest.approx({"itc": math.log(24)})


def test_a_module_without_a_task_has_no_levels() -> None:
    trainer: Any = SimpleNamespace(callback_metrics={"train/vqa": torch.tensor(2.0)}, world_size=1)
    losses = LossMeter()
    losses.take(trainer)
    assert losses.read(trainer, SimpleNamespace(), toy_batch(2)) == ({"vqa": 2.0}, {})  # type: ignore[arg-type]


def test_the_clock_tells_waiting_from_working_and_starts_anew() -> None:
    now = Ticks()
    clock = ThroughputMeter(now)
    for start, end in ((10.0, 13.0), (14.0, 16.0)):  # the wait before the first batch is not known
        now.time = start
        clock.batch_starts()
        now.time = end
        clock.batch_ends(30)
    assert clock.read() == StepSpeed(60 / 6, 1 / 6)
    assert clock.read() == StepSpeed(0.0, 0.0)


def test_the_clock_leaves_out_what_interrupts_training() -> None:
    now = Ticks()
    clock = ThroughputMeter(now)
    now.time = 1.0
    clock.batch_starts()
    now.time = 2.0
    clock.batch_ends(10)
    clock.interrupt()
    now.time = 100.0  # a validation
    clock.batch_starts()
    now.time = 101.0
    clock.batch_ends(10)
    assert clock.read() == StepSpeed(10.0, 0.0)


def test_a_save_costs_speed_and_is_no_waiting() -> None:
    now = Ticks()
    clock = ThroughputMeter(now)
    for start, end in ((1.0, 2.0), (5.0, 6.0), (8.0, 9.0)):  # three seconds with a save, then two of waiting
        now.time = start
        clock.batch_starts()
        now.time = end
        clock.batch_ends(16)
        if start == 1.0:
            clock.saves()
    assert clock.read() == StepSpeed(48 / 8, 2 / 8)


def test_time_left_follows_the_pace_since_the_first_step() -> None:
    now = Ticks()
    time_left = TimeLeft(now)
    now.time = 60.0  # a minute of compiling
    assert time_left.seconds(1, 101) is None
    now.time = 80.0
    assert time_left.seconds(11, 101) == 180.0
    assert time_left.seconds(101, 101) == 0.0
    assert time_left.seconds(12, math.inf) is None


def test_time_left_follows_the_latest_kind_of_steps() -> None:
    """Ten steps of a second, then ten of five."""
    now = Ticks()
    time_left = TimeLeft(now)
    assert time_left.seconds(0, 40, ("itc",)) is None
    now.time = 10.0
    assert time_left.seconds(10, 40, ("itc",)) == 30.0
    now.time = 15.0
    assert time_left.seconds(11, 40, ("itc", "mlm")) is None
    now.time = 65.0
    assert time_left.seconds(21, 40, ("itc", "mlm")) == 95.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4.1589, "4.16"),
        (0.63651, "0.637"),
        (0.0985, "0.0985"),
        (123.4, "123"),
        (4, "4.00"),
        (5200.4, "5,200"),
        (999.6, "1,000"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (45, "0:45"), (59.6, "1:00"), (200, "3:20"), (3900, "1:05:00"), (183600, "2 d 03:00")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_was_never_a_number_is_none_and_one_slip_is_passed_over() -> None:
    """A loss of 0 would look as if it were learned."""
    means = RunningMeans(0.5)
    means.take({"lost": math.nan, "slips": 2.0})
    assert math.isnan(means.read()["lost"])
    means.take({"lost": math.inf, "slips": math.nan})
    assert math.isnan(means.read()["lost"])
    assert means.read()["slips"] == 2.0
    means.take({"lost": 1.0, "slips": 2.0})
    assert means.read() == {"lost": 1.0, "slips": 2.0}  # what came before has no weight
