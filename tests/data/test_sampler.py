"""The order of samples: written out, the same for any number of processes, complete in every epoch."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvlm.data.sampler import FlatBatchSampler, FlatOrder, Pick


@given(st.integers(1, 50), st.integers(0, 1000), st.integers(0, 4))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = FlatOrder(size, seed)
    picks = [order[position] for position in range(epoch * size, (epoch + 1) * size)]
    assert {pick.epoch for pick in picks} == {epoch}
    assert sorted(pick.row for pick in picks) == list(range(size))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def epoch(seed: int, number: int) -> list[Pick]:
        return [FlatOrder(100, seed)[position] for position in range(100 * number, 100 * number + 100)]

    orders = [[pick.row for pick in epoch(seed, number)] for seed in (0, 1) for number in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert epoch(0, 1) == epoch(0, 1)
    assert list(range(100)) not in orders


def test_any_position_can_be_asked_for_in_any_order() -> None:
    forward = [FlatOrder(7, 3)[position] for position in range(21)]
    order = FlatOrder(7, 3)
    assert [order[position] for position in reversed(range(21))] == forward[::-1]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 3])
def test_the_parts_joined_in_rank_order_are_the_batches_of_one_process(world: int, start: int) -> None:
    """Ten samples in batches of eight: batches straddle epochs, nothing is dropped or repeated."""
    order = FlatOrder(10, 5)
    samplers = [FlatBatchSampler(order, 8, 6, rank, world, start) for rank in range(world)]
    assert {len(sampler) for sampler in samplers} == {6}  # of the whole run, as Lightning counts
    joined = [list(chain(*parts)) for parts in zip(*samplers, strict=True)]
    flat = [FlatOrder(10, 5)[position] for position in range(48)]
    assert joined == [flat[8 * step : 8 * step + 8] for step in range(start, 6)]


def test_a_sampler_can_be_run_through_again() -> None:
    sampler = FlatBatchSampler(FlatOrder(5, 0), 2, 4)
    assert list(sampler) == list(sampler)
