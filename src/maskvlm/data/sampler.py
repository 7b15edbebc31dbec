"""Which samples make which batch: a pure function of (seed, position), the same for any number of processes.

One flat order runs through all epochs; a batch may straddle two of them, so no sample is dropped or repeated
at an epoch's end and the position in the data is one number, the samples consumed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from maskvlm.distributed import mix


class Pick(NamedTuple):
    """One sample: its row in the data set and how often the set was seen before."""

    row: int
    epoch: int


class FlatOrder:
    """Position -> sample: each epoch is a seeded permutation of all samples.

    Args:
        size: samples in the data set.
        seed: of the permutations.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> Pick:
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self.size, generator=generator).numpy()
        return Pick(int(self._permutation[place]), epoch)


class FlatBatchSampler(Sampler[list[Pick]]):
    """This process's share of every global batch, from `start` to `steps`.

    Process r takes the r-th contiguous part, so the parts joined in rank order are the one-process batch.

    Args:
        order: the flat order.
        batch_size: global batch; must divide by `world`.
        steps: batches in the whole run.
        rank, world: this process and how many there are.
        start: batches already consumed.
    """

    def __init__(
        self, order: FlatOrder, batch_size: int, steps: int, rank: int = 0, world: int = 1, start: int = 0
    ) -> None:
        self.order, self.batch_size, self.steps = order, batch_size, steps
        self.rank, self.world, self.start = rank, world, start

    def __len__(self) -> int:
        """Of the whole run: a run that goes on counts from its beginning, and so does Lightning."""
        return self.steps

    def __iter__(self) -> Iterator[list[Pick]]:
        share = self.batch_size // self.world
        for step in range(self.start, self.steps):
            first = step * self.batch_size + self.rank * share
            yield [self.order[position] for position in range(first, first + share)]
