"""Assigns samples to batches: a pure function of (seed, position), the same for any number of processes.

One flat order runs through all epochs. A batch may straddle two of them, so no sample is dropped or repeated at the end
of an epoch, and the position in the data is a single number, the samples consumed.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from maskvlm.utils.distributed import mix
from maskvlm.utils.errors import UserError


class Pick(NamedTuple):
    """One sample: its row in the data set, and how often the set has been seen before."""

    row: int
    epoch: int


class FlatOrder:
    """Position -> sample: each epoch is a seeded permutation of all samples.

    Args:
        size: number of samples in the data set.
        seed: seed of the permutations.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> Pick:
        # one endless sequence of positions: epoch 0, then epoch 1, ...
        epoch, place = divmod(position, self.size)
        # Only one permutation is kept: positions are accessed in rising order, so each is drawn once.
        if epoch != self._epoch:
            # its own generator, as the global one must not depend on how far the order was read
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self.size, generator=generator).numpy()
        return Pick(int(self._permutation[place]), epoch)


class FlatBatchSampler(Sampler[list[Pick]]):
    """This process's share of every global batch, from `start` to `steps`.

    Process r takes the r-th contiguous part, so the parts concatenated in rank order are the one-process batch.

    Args:
        order: the flat order.
        batch_size: size of the global batch; must be divisible by `world`.
        steps: number of batches in the whole run.
        rank, world: rank of this process and number of processes.
        start: number of batches already consumed.
    """

    def __init__(
        self, order: FlatOrder, batch_size: int, steps: int, rank: int = 0, world: int = 1, start: int = 0
    ) -> None:
        self.order, self.batch_size, self.steps = order, batch_size, steps
        self.rank, self.world, self.start = rank, world, start

    def __len__(self) -> int:
        """Number of batches in the whole run: a resumed run counts from its start, and so does Lightning."""
        return self.steps

    def __iter__(self) -> Iterator[list[Pick]]:
        share = self.batch_size // self.world
        for step in range(self.start, self.steps):
            # position of this process's first sample in the flat order
            first = step * self.batch_size + self.rank * share
            yield [self.order[position] for position in range(first, first + share)]


def check_share(batch_size: int, passes: int, world: int) -> None:
    """Check that every process gets the same number of samples in every pass: with different shapes, processes would
    wait for each other forever.

    Raises:
        UserError: a global batch cannot be shared evenly.
    """
    if batch_size % (passes * world):
        whom = f"{world} processes x {passes} accumulated passes"
        what = f"{batch_size} pairs cannot be split evenly among {whom}"
        raise UserError("data.batch_size", what, "choose a batch size that they divide")


def evaluation_batches(count: int, most: int, world: int) -> list[list[int]]:
    """The rows of each batch of an evaluation, of the size of `size_for_all`. A last row that would be alone takes one
    of the batch before it, if that leaves two: the metrics compare an image with a wrong one of its batch, and without
    one they would compare the errors of different images.

    Raises:
        UserError: there are fewer rows than processes.
    """
    size, rows = size_for_all(count, most, world), range(count)
    batches = [list(rows[first : first + size]) for first in rows[::size]]
    if len(batches) > 1 and size > 2 and len(batches[-1]) == 1:
        batches[-1].insert(0, batches[-2].pop())
    return batches


def check_limit(option: str, limit: int | float | None) -> None:
    """Check a limit on the batches of an evaluation.

    Raises:
        UserError: it is a share. Lightning takes it of each process's batches, so the metrics would depend on the
            number of processes.
    """
    # Lightning takes 2.0 as 2 batches, and 1.0 as all.
    if isinstance(limit, float) and not limit.is_integer():
        raise UserError(option, f"{limit} is a share", "Give a number of batches (over all processes), or 1.0 for all")


def size_for_all(count: int, most: int, world: int) -> int:
    """Rows in an evaluation batch, such that every process has a batch: without one, Lightning would end it, and the
    others would wait for it forever. It is `most` if that gives at least as many batches as processes, in which case
    the batches are the same as for one process. Else the rows are shared evenly, rounded up if that leaves no process
    without a batch.

    Raises:
        UserError: there are fewer rows than processes.
    """
    if count < world:
        what = f"{count} rows to evaluate are fewer than the {world} processes"
        raise UserError("data", what, "Start fewer processes, or give the split more rows")
    if math.ceil(count / most) >= world:
        return most
    # `world` batches, and no more if possible, as a limit on batches would leave out the last one.
    size = math.ceil(count / world)
    return size if math.ceil(count / size) >= world else count // world
