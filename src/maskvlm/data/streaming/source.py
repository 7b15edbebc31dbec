"""Training pairs streamed from shards, without a copy on this machine: tar archives in webdataset's layout, Parquet
files with images, or the Arrow shards of a prepared set, local or at any address supported by fsspec.

Hugging Face `datasets` divides shards among processes and data workers, orders them by epoch and shuffles their rows
through a buffer. Shards are read by the same readers as in preparation, so ids and captions are the same.
"""

import hashlib
import warnings
from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from maskvlm.data.batch import Row, Source
from maskvlm.data.caption_text import stable_id
from maskvlm.data.pairs import ProcessShare, Sample, TrainPairs
from maskvlm.data.prepared.source import Prepared
from maskvlm.data.raw.base import RawRow
from maskvlm.data.sampler import Pick
from maskvlm.data.streaming.remote import ENDINGS, folders_of, list_shards, read_shards
from maskvlm.utils.distributed import mix, rank
from maskvlm.utils.errors import ExitCode, UserError, check_counts

if TYPE_CHECKING:
    import datasets


class StreamedPairs:
    """The training split of a set of shards; its length and ids are not known before it is read.

    Its length is reported as 0.

    Attributes:
        fingerprint: hash of the shards' names and sizes.
    """

    def __init__(self, shards: dict[str, int], name: str, buffer: int, replay: bool) -> None:
        self.shards, self.name, self.buffer, self.replay = [*shards], name, buffer, replay
        # names and sizes without the folder, as the same set may be elsewhere; its content is not read
        facts = sorted((address.rsplit("/", 1)[-1], size) for address, size in shards.items())
        self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return 0

    def epoch(self, seed: int, part: ProcessShare) -> "datasets.IterableDataset":
        """The rows of this process, in the order given by a seed; in a data worker, that worker's rows."""
        import datasets
        from datasets.distributed import split_dataset_by_node

        # the library divides a list in `gen_kwargs`: each item is a shard
        rows = datasets.IterableDataset.from_generator(
            read_shards, gen_kwargs={"shards": self.shards, "name": self.name, "folders": folders_of(self.shards)}
        )
        # One shard at a time feeds the buffer: with ten, the default, reading takes twice as long.
        rows = rows.shuffle(seed=seed, buffer_size=max(1, self.buffer), max_buffer_input_shards=1)
        # after the shuffle, so that all processes shuffle shards alike, and each takes its part
        return split_dataset_by_node(rows, part.rank, part.world)

    def stream(self, reader: TrainPairs, part: ProcessShare, batches: int, start: int, workers: int) -> "StreamSamples":
        """The samples on which one process trains; see `StreamSamples`.

        Raises:
            UserError: there are too few shards for every data worker to have one.
        """
        # a data worker without a shard would yield no batch
        check_shards(len(self.shards), part.world, max(1, workers))
        if rank() == 0:
            # if it is not a multiple, the library lets each process read all shards and keep every n-th row
            if len(self.shards) % part.world:
                print(f"every process reads all {len(self.shards)} shards: not a multiple of {part.world} processes")
            if start and self.replay:
                print(f"skipping the {start} batches already used, to resume at the same place", flush=True)
            elif start:
                print("the order of samples differs after this resume (data.source.replay is false)", flush=True)
        # Lightning's warning is about loaders whose workers all read the same; these do not.
        warnings.filterwarnings("ignore", r"Your `IterableDataset` has `__len__` defined")
        return StreamSamples(self, reader, part, batches, start)

    def first_captions(self, most: int) -> Iterator[str]:
        """Captions of the first `most` readable rows, shard by shard by name: the same for all processes."""
        for record in read_shards(self.shards, self.name, folders_of(self.shards)):
            # `most` counts images
            if most <= 0:
                return
            if record["problem"] is None:
                yield from record["row"].captions
                most -= 1


def check_shards(shards: int, processes: int, workers: int) -> None:
    """Raise UserError if some data worker would have no shard to read."""
    if shards < processes * workers:
        what = f"{shards} shards for {processes} processes with {workers} data workers each"
        todo = f"Cut the set into {processes * workers} shards or more, or lower data.workers"
        raise UserError("data.source.root", what, todo)


class StreamLoader(DataLoader[Sample]):
    """A loader that knows the length of the whole run, and skips the batches between a multiple of the number of its
    workers and the start."""

    dataset: "StreamSamples"

    def __len__(self) -> int:
        # as in `FlatBatchSampler`: Lightning compares it with the batches of the whole run, and ends there
        return self.dataset.batches

    def __iter__(self) -> Any:
        batches = super().__iter__()
        # torch takes batches from its workers in turn, starting with worker 0: reading starts at a multiple of the
        # number of workers, and the batches between it and the start have been consumed
        for _ in range(self.dataset.start % max(1, self.num_workers)):
            next(batches)
        return batches


class StreamSamples(IterableDataset[Sample]):
    """Samples for `batches` batches, from the `start`-th on, in repeated passes over the shards, each in another order.

    No process or worker runs out of samples, whatever the shards contain: each continues with its next pass. A resumed
    run skips what was consumed without decoding it, so it needs the same number of processes and data workers to see
    the same samples. A bad row becomes a placeholder, as in `TrainPairs`.

    Args:
        pairs: the streamed split.
        reader: turns rows into samples.
        part: this process's share of a batch.
        batches: number of batches in the whole run.
        start: number of batches already consumed.

    Attributes:
        loader: class of the loader that batches them.
    """

    def __init__(self, pairs: StreamedPairs, reader: TrainPairs, part: ProcessShare, batches: int, start: int) -> None:
        self.pairs, self.reader, self.part, self.batches, self.start = pairs, reader, part, batches, start
        self.loader = StreamLoader

    def __iter__(self) -> Iterator[Sample]:
        # this runs once in each data worker
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # without replay the start is part of the seed, so that the first rows are not shown again
        rows = self._rows(mix(self.reader.seed, *([] if self.pairs.replay or not self.start else [self.start])))
        first = self.start - self.start % workers  # worker 0 makes the first batch after a start, as it made batch 0
        # skip the rows of this worker's batches before `first`: numbers worker, worker + workers, ...
        if self.pairs.replay:
            for _ in range(len(range(worker, first, workers)) * self.part.size):
                next(rows)
        # then the batches still to be made
        for _ in range(len(range(first + worker, self.batches, workers)) * self.part.size):
            yield self._sample(*next(rows))

    def _rows(self, seed: int) -> Iterator[tuple[dict[str, Any], int]]:
        """Endless rows, with the number of the pass."""
        for epoch in count():
            empty = True
            for row in self.pairs.epoch(mix(seed, epoch), self.part):
                empty = False
                yield row, epoch
            # the next pass would be empty too, and the loop would never end
            if empty:
                where, what = self.pairs.shards[0], "a data worker found no training samples in its part of the shards"
                raise UserError(where, what, "Check the shards, or use fewer data workers", ExitCode.BAD_DATA)

    def _sample(self, record: dict[str, Any], epoch: int) -> Sample:
        # a stream has no row numbers, so the hash of the origin seeds the augmentation
        pick = Pick(stable_id(record["origin"]), epoch)
        if record["problem"]:
            return self.reader.hole(pick.row, record["problem"])
        row: RawRow = record["row"]
        plain_row = Row(image=row.image, captions=[*row.captions], image_id=row.image_id, origin=row.origin)
        return self.reader.sample(plain_row, pick)


class Stream(Source):
    """A large set, streamed or stored locally (a `Source`); `streaming` switches between the two.

    Args:
        root: folder of a prepared set, local or at an address (s3://bucket/cc3m); or, only when streaming, shards: a
            path or address, or a list of them, ending in .tar, .tar.gz, .parquet or .arrow, which may contain *.
        evaluate: folder of the prepared set whose `val` and `test` are used for evaluation.
        streaming: read shards as they arrive, without a local copy; needs `data.steps`. False: use the prepared set on
            this disk, in one global order.
        name: name of the set; prefix of the ids of images that have no other id, as in `maskvlm data`.
        buffer: size of the shuffle buffer of each data worker, in rows; 0: the order within a shard.
        replay: a resumed run reads through everything consumed so far, so that it sees the same samples as an
            uninterrupted one; false starts at once with another order of the shards instead.
    """

    def __init__(
        self,
        root: str | list[str],
        evaluate: str,
        streaming: bool = True,
        name: str = "stream",
        buffer: int = 1000,
        replay: bool = True,
    ) -> None:
        check_counts(0, {"data.source.buffer": buffer})
        self.root, self.evaluate, self.streaming, self.name = root, evaluate, streaming, name
        self.buffer, self.replay = buffer, replay

    def split(self, name: str) -> Any:
        """`train` from the shards, every other split from the prepared set for evaluation.

        Raises:
            UserError: no shard is found, or `streaming` is false and the set is not prepared.
        """
        # evaluation needs a length, and every row once
        if name != "train":
            return Prepared(self.evaluate).split(name)
        if self.streaming:
            return StreamedPairs(list_shards(self.root), self.name, self.buffer, self.replay)
        if not isinstance(self.root, str) or "*" in self.root or self.root.endswith(ENDINGS):
            todo = "Prepare it (maskvlm data webdataset FOLDER) and name the set's folder, or stream it"
            what = f"{self.root} is not a prepared set, and only prepared sets can be read from this disk"
            raise UserError("data.source.root", what, todo)
        return Prepared(self.root).split(name)
