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


def test_smoothed_starts_without_bias_forgets_and_passes_a_slip_over() -> None:
    """What was never a number is none: a loss of 0 would look as if it were learned."""
    means = RunningMeans(0.5)
    assert means.read() == {}
    means.take({"itc": torch.tensor(4.0), "lost": math.nan, "slips": 2.0})
    assert means.read() == pytest.approx({"itc": 4.0, "lost": math.nan, "slips": 2.0}, nan_ok=True)
    means.take({"itc": torch.tensor(1.0), "lost": 1.0, "slips": math.nan})
    assert means.read() == pytest.approx({"itc": (0.5 * 4 + 1) / 1.5, "lost": 1.0, "slips": 2.0})


def test_losses_are_the_terms_alone_and_levels_are_asked_for_the_global_batch() -> None:
    batch_sizes: list[int] = []
    names = ("train/itc", "train/loss", "train/pairs_per_second", "mlm/accuracy")
    trainer: Any = SimpleNamespace(callback_metrics=dict.fromkeys(names, torch.tensor(2.0)), world_size=4)

    def chance_levels(pairs: int) -> dict[str, float]:
        batch_sizes.append(pairs)
        return {"itc": math.log(pairs)}

    losses = LossMeter()
    losses.take(trainer)
    readings = losses.read(trainer, SimpleNamespace(task=SimpleNamespace(chance_levels=chance_levels)), toy_batch(6))  # type: ignore[arg-type]
    assert readings.losses == {"itc": 2.0}
    assert batch_sizes == [24]
    assert readings.levels == pytest.approx({"itc": math.log(24)})


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


def test_numbers_have_three_digits_and_durations_two_parts() -> None:
    values = (4.1589, 0.63651, 0.0985, 123.4, 5200.4, 999.6)
    assert [number(value) for value in values] == ["4.16", "0.637", "0.0985", "123", "5,200", "1,000"]
    seconds = (0, 59.6, 200, 3900, 183600)
    assert [duration(each) for each in seconds] == ["0:00", "1:00", "3:20", "1:05:00", "2 d 03:00"]
