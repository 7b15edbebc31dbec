"""The order of samples: the same for any number of processes, complete in every epoch."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvlm.data.sampler import FlatBatchSampler, FlatOrder


@given(st.integers(1, 50), st.integers(0, 1000), st.integers(0, 4))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = FlatOrder(size, seed)
    picks = [order[position] for position in range(epoch * size, (epoch + 1) * size)]
    assert {pick.epoch for pick in picks} == {epoch}
    assert sorted(pick.row for pick in picks) == list(range(size))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    """In whatever order the positions are asked for."""
    forward = {seed: [FlatOrder(100, seed)[position] for position in range(200)] for seed in (0, 1)}
    order = FlatOrder(100, 0)
    assert [order[position] for position in reversed(range(200))] == forward[0][::-1]
    epochs = [[pick.row for pick in picks[start : start + 100]] for picks in forward.values() for start in (0, 100)]
    assert len({tuple(rows) for rows in [*epochs, range(100)]}) == 5


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 3])
def test_the_parts_joined_in_rank_order_are_the_batches_of_one_process(world: int, start: int) -> None:
    """Ten samples in batches of six: batches straddle epochs, nothing is dropped or repeated."""
    order = FlatOrder(10, 5)
    samplers = [FlatBatchSampler(order, 6, 7, rank, world, start) for rank in range(world)]
    assert {len(sampler) for sampler in samplers} == {7}  # of the whole run, as Lightning counts
    joined = [list(chain(*parts)) for parts in zip(*samplers, strict=True)]
    flat = [FlatOrder(10, 5)[position] for position in range(42)]
    assert joined == [flat[6 * step : 6 * step + 6] for step in range(start, 7)]
    assert list(samplers[0]) == list(samplers[0])  # a sampler can be run through again
