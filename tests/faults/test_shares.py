"""Rows 44, 62, 64: what processes and data workers are dealt is even by construction, or refused before the start.

That losses, gradients and metrics of two processes are those of one, to the bit in evaluation, is held by
tests/utils/test_distributed.py; here that no process gets less to do than it must have to stay in step.
"""

import math
from itertools import chain

import pytest
from forks import PAIR, Forks, elastic, small
from guards import Build
from hypothesis import given
from hypothesis import strategies as st
from test_processes import ends, free_port

from maskvlm.data.sampler import FlatBatchSampler, FlatOrder, check_share, evaluation_batches, size_for_all
from maskvlm.data.streaming.source import check_shards
from maskvlm.utils.errors import ExitCode, UserError


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 40), st.integers(1, 9))
def test_training_batches_are_even_in_all_processes(world: int, each: int, size: int, steps: int) -> None:
    """Row 62: the same number of batches, all of one size; joined they are those of one process."""
    order = [FlatBatchSampler(FlatOrder(size, 3), world * each, steps, rank, world) for rank in range(world)]
    shares = [list(sampler) for sampler in order]
    assert {len(batches) for batches in shares} == {steps}
    assert {len(batch) for batches in shares for batch in batches} == {each}
    alone = list(FlatBatchSampler(FlatOrder(size, 3), world * each, steps))
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == alone


@pytest.mark.guard("maskvlm.data.sampler:check_share")
@pytest.mark.parametrize(("batch", "passes", "world"), [(8, 1, 3), (8, 3, 2), (2, 2, 2), (6, 4, 1)])
def test_a_batch_that_cannot_be_shared_is_refused(batch: int, passes: int, world: int, build: Build) -> None:
    with pytest.raises(
        UserError, match=f"{batch} pairs cannot be split evenly among {world} processes x {passes} accumulated"
    ):
        check_share(batch, passes, world)


@pytest.mark.guard("maskvlm.data.sampler:size_for_all", gives="args[1]")
@pytest.mark.parametrize(("count", "most", "world"), [(5, 64, 2), (6, 4, 4), (7, 3, 7), (100, 64, 3)])
def test_no_process_is_without_an_evaluation_batch(count: int, most: int, world: int, build: Build) -> None:
    """Row 64: none padded in, none twice. Lightning would end a process that has none, the others wait for it."""
    size = size_for_all(count, most, world)
    whole = [list(range(count))[first : first + size] for first in range(0, count, size)]
    mine = [whole[rank::world] for rank in range(world)]
    assert sorted(chain(*chain(*mine))) == list(range(count))
    assert all(mine)


@pytest.mark.parametrize(("count", "most", "world"), [(250, 64, 4), (65, 64, 2), (128, 64, 2), (128, 64, 1)])
def test_batches_stay_those_of_one_process_where_they_suffice(count: int, most: int, world: int) -> None:
    """Masks and wrong partners depend on what is in a batch: so do the metrics."""
    assert math.ceil(count / most) >= world
    assert size_for_all(count, most, world) == most == size_for_all(count, most, 1)


@pytest.mark.parametrize("world", [2, 3, 4, 6, 8])
def test_a_batch_is_dealt_out_to_all_processes_whole(world: int) -> None:
    """Of a rest, one process would have a second batch, which `limit_val_batches: 1` leaves out."""
    assert math.ceil(250 / size_for_all(250, 250, world)) == world


@given(st.integers(1, 400), st.integers(1, 70), st.integers(1, 9))
def test_no_row_is_alone_where_another_can_be_beside_it(count: int, most: int, world: int) -> None:
    """Its loss has nothing to be compared with: what the right partner gains would be measured on other images."""
    if count < world:
        return
    batches = evaluation_batches(count, most, world)
    size = size_for_all(count, most, world)
    assert [*chain(*batches)] == [*range(count)]
    assert len(batches) == math.ceil(count / size)
    assert all(len(batch) <= size for batch in batches)
    if size > 2 and count > size:
        assert min(map(len, batches)) > 1


def test_fewer_images_than_processes_are_refused() -> None:
    with pytest.raises(UserError, match="3 rows to evaluate are fewer than the 4 processes"):
        size_for_all(3, 64, 4)


@pytest.mark.guard("maskvlm.data.streaming.source:check_shards")
@pytest.mark.parametrize(("shards", "world", "workers"), [(1, 2, 1), (3, 2, 2), (1, 1, 2)])
def test_fewer_shards_than_data_workers_are_refused(shards: int, world: int, workers: int, build: Build) -> None:
    """Row 44: before anything waits."""
    with pytest.raises(UserError, match=f"Cut the set into {world * workers} shards or more, or lower data.workers"):
        check_shards(shards, world, workers)


@pytest.mark.guard("maskvlm.data.sampler:check_share")
def test_two_processes_say_so_and_end(forks: Forks, tmp_path, build: Build) -> None:  # type: ignore[no-untyped-def]
    """A batch of seven for two: without the guard one of them waits for the other, or computes with fewer."""
    words, port = small(tmp_path / "run", *PAIR, "--data.steps=2", "--data.batch_size=7"), free_port()
    started = [forks.start(words, tmp_path / f"rank{n}.txt", elastic(n, port), build) for n in (0, 1)]
    assert ends(started, 20) == [ExitCode.USAGE] * 2
    assert sum(child.output_lines("error: ") != [] for child in started) == 1


@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_frozen_tower_needs_no_search_for_unused_weights(forks: Forks, tmp_path, frozen: str) -> None:  # type: ignore[no-untyped-def]
    """Row 64: losses of weight zero leave heads without a gradient; DistributedDataParallel would stop at the second
    step where that were not so by construction."""
    off = {"image": "--model.task.weight_mim=0", "text": "--model.task.weight_mlm=0"}[frozen]
    words = small(tmp_path / "run", *PAIR, "--data.steps=3", "--trainer.limit_val_batches=0", off)
    port = free_port()
    started = [forks.start(words, tmp_path / f"rank{n}.txt", elastic(n, port)) for n in (0, 1)]
    assert ends(started, 30) == [0, 0]
