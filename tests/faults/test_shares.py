"""What processes and data workers are dealt is even by construction, or refused before the start.

That losses, gradients and metrics of two processes are those of one is held by tests/utils/test_distributed.py; here
that no process gets less to do than it must have to stay in step.
"""

import math
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvlm.data.sampler import check_share, evaluation_batches, size_for_all
from maskvlm.data.streaming.source import check_shards
from maskvlm.utils.errors import UserError


@pytest.mark.parametrize(("batch", "passes", "world"), [(8, 1, 3), (8, 3, 2), (2, 2, 2), (6, 4, 1)])
def test_a_batch_that_cannot_be_shared_is_refused(batch: int, passes: int, world: int) -> None:
    with pytest.raises(UserError, match="cannot be split evenly"):
        check_share(batch, passes, world)
    check_share(passes * world * 2, passes, world)


@given(st.integers(1, 400), st.integers(1, 70), st.integers(1, 9))
def test_no_process_is_without_an_evaluation_batch_and_no_row_alone(count: int, most: int, world: int) -> None:
    """None padded in, none twice. Lightning would end a process that has none, and the others wait for it. The loss of
    a row that is alone has nothing to be compared with."""
    if count < world:
        with pytest.raises(UserError, match="fewer than the"):
            size_for_all(count, most, world)
        return
    batches, size = evaluation_batches(count, most, world), size_for_all(count, most, world)
    assert [*chain(*batches)] == [*range(count)]
    assert len(batches) == math.ceil(count / size) >= world
    assert all(len(batch) <= size <= most for batch in batches)
    if size > 2 and count > size:
        assert min(map(len, batches)) > 1
    if math.ceil(count / most) >= world:  # masks and wrong partners depend on what is in a batch: so do the metrics
        assert size == most


@pytest.mark.parametrize(("shards", "world", "workers"), [(1, 2, 1), (3, 2, 2), (1, 1, 2)])
def test_fewer_shards_than_data_workers_are_refused(shards: int, world: int, workers: int) -> None:
    """Before anything waits."""
    with pytest.raises(UserError, match=f"{world * workers} shards"):
        check_shards(shards, world, workers)
    check_shards(world * workers, world, workers)
