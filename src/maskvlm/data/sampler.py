"""Which samples make which batch: a pure function of (seed, position), the same for any number of processes.

One flat order runs through all epochs; a batch may straddle two of them, so no sample is dropped or repeated
at an epoch's end and the position in the data is one number, the samples consumed.
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
        # one endless sequence of positions: epoch 0, then epoch 1, ...
        epoch, place = divmod(position, self.size)
        # One permutation is kept: positions are asked for in rising order, so each is drawn once.
        if epoch != self._epoch:
            # its own generator: the global one must not depend on how far the order was read
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
        """Number of batches in the whole run: a resumed run counts from its beginning, and so does Lightning."""
        return self.steps

    def __iter__(self) -> Iterator[list[Pick]]:
        share = self.batch_size // self.world
        for step in range(self.start, self.steps):
            # position of this process's first sample in the flat order
            first = step * self.batch_size + self.rank * share
            yield [self.order[position] for position in range(first, first + share)]


def check_share(batch_size: int, passes: int, world: int) -> None:
    """Every process must get the same number of samples in every pass: processes with other shapes wait for ever.

    Raises:
        UserError: a global batch cannot be dealt out so.
    """
    if batch_size % (passes * world):
        whom = f"{world} processes x {passes} accumulated passes"
        what = f"{batch_size} pairs cannot be split evenly among {whom}"
        raise UserError("data.batch_size", what, "choose a batch size that they divide")


def size_for_all(count: int, most: int, world: int) -> int:
    """Rows in an evaluation batch, such that no process is left without a batch: Lightning would end it there, and the
    others would wait for it for ever. `most` where that gives as many batches as processes, or more: they are then
    those of one process. Else fewer: the rows shared out, rounded up if that leaves none without.

    Raises:
        UserError: there are fewer rows than processes.
    """
    if count < world:
        what = f"{count} images are fewer than the {world} processes that evaluate them"
        raise UserError("data", what, "Start fewer processes, or set trainer.limit_val_batches to 0")
    if math.ceil(count / most) >= world:
        return most
    # `world` batches, and no more where that is possible: a limit of batches would leave out the last one.
    size = math.ceil(count / world)
    return size if math.ceil(count / size) >= world else count // world
