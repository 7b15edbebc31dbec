"""The data module: one source, loaders for its splits, and the tokenizer if the model has none yet."""

import hashlib
import inspect
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from maskvlm.data.batch import InputSpec, Source
from maskvlm.data.caption_text import clean_caption
from maskvlm.data.contamination import leaks_left_out, without_leaks
from maskvlm.data.example_sets import CollateExamples, EvalExamples, TrainExamples
from maskvlm.data.examples import ExampleBatch, ExampleSource
from maskvlm.data.pairs import Collate, EvalPairs, ProcessShare, TrainPairs
from maskvlm.data.sampler import FlatBatchSampler, FlatOrder, check_limit, check_share, evaluation_batches
from maskvlm.data.subset import fraction_of, hashed_image_ids
from maskvlm.data.text import Captioner, tokenizer_hash, train_tokenizer
from maskvlm.data.transforms import Augment, Mirroring, Normalise, check_augmentation, eval_transform, train_transform
from maskvlm.data.unknown_words import check_unknown, some_captions, some_texts
from maskvlm.data.workers import check_shared, noted_loader
from maskvlm.utils.cores import cores
from maskvlm.utils.distributed import gather_objects, rank, world_size
from maskvlm.utils.errors import Absent, ExitCode, UserError, check_counts, check_least
from maskvlm.utils.overrides import check_overrides

MOST_LISTED = 1000
FEW = 20
"""An evaluation split with fewer rows than this says little: one image of 20 is 5 % of recall."""


class PairData(L.LightningDataModule):
    """Images with texts: captions for pre-training and retrieval, or the examples of a downstream task.

    Args:
        source: the data set's reader.
        spec: linked from the backbone; not set by hand.
        batch_size: pairs (or examples) in a global batch, over all processes and accumulated passes.
        steps: length of the run in batches. Exactly one of `steps` and `epochs` must be given.
        epochs: length of the run in passes over the training images (each with `captions` of its captions).
        seed: seed of order, captions and augmentation.
        workers: data loading processes; 0 loads in the main process. None: with a GPU, this process's share of the
            cores (under SLURM its task's cores minus two), at most 12; without a GPU 0, as the cores are busy anyway.
        eval_batch_size: images (with all their captions) in an evaluation batch.
        accumulate: passes that share a global batch; must equal trainer.accumulate_grad_batches.
        augment: augment training images: crop, mirror and RandAugment, as set below. `false`: only resize them.
            `mirror`: resize them and mirror half of them, with nothing else changed, so that features of frozen blocks
            can still be cached (`model.backbone.image.feature_cache`), in twice the space; `caption_aware` applies.
        crop_scale: minimum and maximum share of the image's area that a random crop keeps.
        randaugment: number of RandAugment operations and their magnitude (0 to 30), or None for none.
        colour: whether RandAugment may change colours.
        flip: mirror half of the images.
        caption_aware: do not change colours if the caption names a colour, nor mirror if it names a side (English
            words).
        captions: captions shown with each image of a training batch, consecutive in the image's list. The first of them
            changes in each pass until every caption of the image has been first once. In pre-training, contrast uses
            all that are shown; masked words and matching use only the first.
        max_bad_fraction: the run stops if more than this share of the samples could not be read, counted in each
            process from its 1,000th sample on; it also stops if none of the first 16 or more could be read (unless this
            is 1 or more). In a stream, an unreadable shard (or the rest of one) counts as one sample, as its size is
            not known.
        fraction: train on this part of the training images, chosen by `seed`; a smaller part is a subset of a larger.
        held_out: splits of prepared sets (`data/coco/test`) whose images must not be trained on (`contamination.py`).
        contamination: what to do if some are in the training data: `refuse` to start, or `drop` them.
        max_unknown: largest share of a source's words that may be unknown to the tokenizer; a run with more does not
            start.

    Raises:
        UserError: `source` or `spec` is of another type, neither or both of steps and epochs are given, a number is out
            of range, or there are too many workers for the cores (2).
    """

    def __init__(
        self,
        source: Source | ExampleSource,
        spec: InputSpec,
        batch_size: int = 512,
        steps: int | None = None,
        epochs: float | None = None,
        seed: int = 0,
        workers: int | None = None,
        eval_batch_size: int = 64,
        accumulate: int = 1,
        augment: Augment = True,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        randaugment: tuple[int, int] | None = (2, 7),
        colour: bool = True,
        flip: bool = True,
        caption_aware: bool = True,
        captions: int = 1,
        max_bad_fraction: float = 0.01,
        fraction: float = 1.0,
        held_out: list[str] | None = None,
        contamination: str = "refuse",
        max_unknown: float = 0.5,
    ) -> None:
        super().__init__()
        if isinstance(source, type | str) or not isinstance(spec, InputSpec):
            what = f"source is {_kind(source)} and spec {_kind(spec)}"
            todo = "Give a Source or an ExampleSource, and the model's backbone.input_spec"
            raise UserError("PairData", what, todo)
        check_overrides(source, ExampleSource if isinstance(source, ExampleSource) else Source)
        if isinstance(source, ExampleSource) and inspect.isfunction(getattr(type(source), "labels", None)):
            where = f"{type(source).__module__}.{type(source).__qualname__}.labels"
            raise UserError(where, "is a method", "Make it a property: write @property above it")
        if (steps is None) == (epochs is None):
            todo = "Set exactly one of the two, the other to null, such as --data.epochs null --data.steps 500"
            raise UserError("data", f"steps is {steps} and epochs is {epochs}", todo)
        check_least(0, {"data.epochs": epochs})
        if epochs == 0:
            raise UserError("data.epochs", "0 is not greater than 0", "Give a number above 0")
        check_counts(1, {"data.batch_size": batch_size, "data.steps": steps, "data.eval_batch_size": eval_batch_size})
        check_counts(1, {"data.accumulate": accumulate, "data.captions": captions})
        check_counts(0, {"data.workers": workers})
        check_least(0, {"data.max_bad_fraction": max_bad_fraction, "data.max_unknown": max_unknown})
        # Each is a process with all libraries in memory: thousands would freeze the machine before the first step.
        if workers is not None and workers > (most := max(64, 8 * cores())):
            raise UserError("data.workers", f"{workers} are too many for {cores()} cores", f"Give at most {most}")
        check_augmentation(crop_scale, randaugment, flip, augment)
        self.source, self.spec, self.batch_size = source, spec, batch_size
        self.steps, self.epochs, self.seed, self.workers = steps, epochs, seed, workers
        self.eval_batch_size, self.accumulate, self.max_bad_fraction = eval_batch_size, accumulate, max_bad_fraction
        self.captions, self.fraction, self.max_unknown = captions, fraction, max_unknown
        self.held_out, self.contamination = held_out or [], contamination
        self._normalise = Normalise(spec)
        # in the order of `train_transform`'s arguments after `spec`
        self.augment = (crop_scale, randaugment, colour, flip, caption_aware, augment)
        self.mirroring = Mirroring(caption_aware) if augment == "mirror" else None
        self.tokenizer: PreTrainedTokenizerFast | None = spec.tokenizer
        self._begin()
        self.splits: dict[str, Any] = {}
        self.share_looked_at = 1.0  # share of the images of the split evaluated last

    # ------------------------------------------------------------------ set-up

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The classes of a downstream task's head; None for a source of pairs."""
        return self.source.labels if isinstance(self.source, ExampleSource) else None

    @property
    def versions(self) -> int | None:
        """Number of versions in which a training image is shown; None if it looks different each time."""
        return {False: 1, "mirror": 2}.get(self.augment[-1])

    def _begin(self) -> None:
        """Reset the counts; when a run is resumed, the checkpoint later restores its position."""
        # samples that could not be read or had to be repaired: how many, and which, by reason
        self.problems: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.samples = 0
        self.start = 0  # batches (passes, if several share a step) already consumed by a resumed run

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._begin()  # also if these data were used for training before
        needed = ["test" if stage == "test" else "val"]
        # without a tokenizer, evaluation also needs the training captions, to train one
        needed += ["train"] if stage == "fit" or self.tokenizer is None else []
        absent, splits = Absent(), {}
        for name in needed:
            # one error names the missing files of all splits
            with absent.noted():
                splits[name] = self._checked(name, self.source.split(name))
        absent.check()
        if "train" in splits:
            # leaks are dropped first, so that the fraction is of the images that may be trained on
            pairs = without_leaks(splits["train"], self.held_out, self.contamination)
            splits["train"] = fraction_of(pairs, self.fraction, self.seed)
        new = needed[0] not in self.splits  # not the evaluation that ends a run
        # the splits of another stage stay
        self.splits |= splits
        if self.tokenizer is None:
            # Deterministic, so all processes get the same tokenizer without communication.
            texts = some_texts if isinstance(self.source, ExampleSource) else some_captions
            self.tokenizer = train_tokenizer(texts(self.splits["train"]), self.spec.vocab_size)
        captioner = Captioner(self.tokenizer, self.spec.text_length)
        if stage == "fit":
            check_unknown(self.splits["train"], captioner, self.max_unknown)
        else:
            # Only reported: the evaluation runs in any case.
            check_unknown(self.splits[needed[0]], captioner, 1.0, "measured")
        evaluates = self.trainer is None or self.trainer.limit_val_batches != 0
        # a streamed split has length 0
        if new and evaluates and rank() == 0 and 0 < (rows := len(self.splits[needed[0]])) < FEW:
            unit = "example" if isinstance(self.source, ExampleSource) else "image"
            what = f"the {needed[0]} split has only {rows} {unit}{'' if rows == 1 else 's'}"
            print(f"warning: {what}: its numbers mean little; hold out hundreds to compare models", flush=True)

    def _checked(self, name: str, split: Any) -> Any:
        """A split of the source, which may be of another package. Raises UserError if it is no split, or is empty."""
        where = f"{type(self.source).__module__}.{type(self.source).__qualname__}.split('{name}')"
        # A streamed split gives its rows in an order of its own.
        rows = "stream" if hasattr(split, "stream") else "__getitem__"
        # Of the class first: to ask the object computes the fingerprint.
        parts = (rows, "__len__", "fingerprint")
        missing = [each for each in parts if not hasattr(type(split), each) and not hasattr(split, each)]
        if missing:
            kind = "examples.Examples" if isinstance(self.source, ExampleSource) else "batch.Pairs"
            what = f"gave a {_kind(split)} without {missing[0]}"
            raise UserError(where, what, f"Return an object with all members of maskvlm.data.{kind}")
        # A streamed split has length 0. Nobody reads the validation split of a training without evaluations.
        unread = name == "val" and self.trainer is not None and self.trainer.limit_val_batches == 0
        if isinstance(self.source, ExampleSource) and rows == "__getitem__" and not unread and not len(split):
            raise UserError(where, "has no examples", "Check the files that it reads", ExitCode.BAD_DATA)
        return split

    def _read(self, name: str) -> Any:
        """A split that `setup` has read. Raises UserError: it has not, as in a script without a trainer."""
        if name not in self.splits:
            stage = {"train": "fit", "val": "validate", "test": "test"}[name]
            todo = f"Call data.setup('{stage}') before you ask for its batches"
            raise UserError("PairData", f"the {name} split has not been read yet", todo)
        return self.splits[name]

    def token_counts(self, most: int = 2000) -> Tensor:
        """How often each token occurs in the texts of at most `most` training rows, [tokenizer entries]; start, end and
        padding do not count."""
        assert self.tokenizer is not None
        captioner = Captioner(self.tokenizer, self.spec.text_length)
        texts = some_texts if isinstance(self.source, ExampleSource) else some_captions
        tokens = captioner([clean_caption(text)[0] for text in texts(self.splits["train"], most)])  # token_CT: (C, T)
        return torch.bincount(tokens.token_CT[~tokens.special_CT], minlength=len(self.tokenizer))

    def fingerprint(self) -> dict[str, Any]:
        """Identifies the data of this run: each split's content hash and size, and the tokenizer's hash."""
        card: dict[str, Any] = {
            name: {"sha": pairs.fingerprint, "pictures": len(pairs) or None} for name, pairs in self.splits.items()
        }
        if self.tokenizer is not None:
            card["tokenizer"] = tokenizer_hash(self.tokenizer)
        # sorted keys, so that the order in which the splits were set up does not change the hash
        card["sha"] = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
        return card

    def hashed_image_ids(self, split: str) -> Tensor | None:
        """63-bit hashes of a split's image ids, sorted and unique; None if its source does not know them without
        opening the images."""
        ids = hashed_image_ids(self.splits[split])
        # 63 bits fit torch's signed integers
        return None if ids is None else torch.from_numpy(ids.astype("int64"))

    def left_out(self) -> dict[str, int] | None:
        """Held-out split -> number of training rows left out for showing its images; None if nothing is held out."""
        return leaks_left_out(self.splits["train"], self.held_out) if self.held_out else None

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run.

        Raises:
            UserError: it is given in epochs of a streamed set, whose length is not known.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        # a streamed split has length 0
        if not len(self.splits["train"]):
            what = "the length of a streamed set is not known, so its passes cannot be counted"
            raise UserError("data.epochs", what, "Set data.steps instead, and data.epochs to null")
        # as typed, since 1.1 * 100 is more than 110 in floats
        return math.ceil(Fraction(str(self.epochs)) * len(self.splits["train"]) / self.batch_size)

    # ------------------------------------------------------------------ position of a run

    @property
    def share(self) -> int:
        """Pairs of all processes in one pass; `accumulate` of them are a global batch."""
        return self.batch_size // self.accumulate

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, and the samples that could not be read so far; all processes call it."""
        # The run is one Lightning epoch, so the epoch's count of batches is the position in the data.
        # `processed` rather than `completed`, which counts a batch only after the callbacks that may save.
        progress = self.trainer.fit_loop.epoch_loop.batch_progress if self.trainer else None
        rows = self.bad_rows() | {"left_out": None}  # the reader determines it again
        batches: int = progress.current.processed if progress else 0  # type: ignore[attr-defined]
        data = self.splits["train"].fingerprint if "train" in self.splits else None
        dealt = self._dealt()
        state = {"batches": batches, "share": self.share, "data": data, "rows": rows}
        return state if dealt is None else {**state, "dealt": dealt}

    def _dealt(self) -> list[int] | None:
        """The number of processes, and of data workers per process, for a stream that is replayed on resuming; None for
        other data, whose order does not depend on them."""
        pairs: Any = self.splits.get("train")
        if not hasattr(pairs, "stream") or not pairs.replay:
            return None
        return [world_size(), self._readers()]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at a checkpoint's position. Raises UserError if the data (65), the size of a pass, or the numbers of
        processes and data workers that share a replayed stream (2) have changed."""
        # evaluation starts from the beginning of its own split
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        if state_dict["data"] != (data := self.splits["train"].fingerprint):
            what = f"the training data ({data}) are not those that the checkpoint was trained on ({state_dict['data']})"
            todo = "Restore them, or start a new run --from this checkpoint"
            raise UserError("data", what, todo, ExitCode.BAD_DATA)
        # the position is counted in passes, so it is meaningless for passes of another size
        if state_dict["share"] != self.share:
            what = f"a pass has {self.share} pairs, but in the checkpoint {state_dict['share']}"
            todo = "Use the same batch_size and accumulate, or start a new run --from this checkpoint"
            raise UserError("data.batch_size", what, todo)
        # not in checkpoints of older versions
        before, now = state_dict.get("dealt"), self._dealt()
        if before and now and before != now:
            what = f"the stream is split among {_parts(now)}, in the checkpoint among {_parts(before)}"
            what += ": the samples would differ"
            todo = "Use the same numbers (--data.workers), or start a new run --from this checkpoint"
            raise UserError("data.workers", what, todo)
        self.start, rows = state_dict["batches"], state_dict["rows"]
        if rank() == 0:  # the counts are of all processes
            self.samples, self.problems, self.examples = rows["samples"], Counter(rows["problems"]), rows["examples"]

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> DataLoader[Any]:
        pairs, share = self._read("train"), self.share
        check_share(self.batch_size, self.accumulate, world_size())
        # a batch of the loader is a pass; `accumulate` passes make one optimiser step
        batches = self.total_steps * self.accumulate
        transform = train_transform(self.spec, *self.augment, normalise=False)
        # streamed: the shards determine the order
        if hasattr(pairs, "stream"):
            reader = TrainPairs(pairs, transform, self.seed, self.spec.image_size, self.captions, self.mirroring)
            part = ProcessShare(rank(), world_size(), share // world_size())
            samples = pairs.stream(reader, part, batches, self.start, self._readers())
            waits = {} if not self.start else {"timeout": 0}  # skipping consumed samples takes time
            return self._loader(samples, part.size, samples.loader, batch_size=part.size, **waits)
        # by row number: one global order, distributed over the processes
        order = FlatOrder(len(pairs), self.seed)
        sampler = FlatBatchSampler(order, share, batches, rank(), world_size(), self.start)
        data: Dataset[Any]
        if isinstance(self.source, ExampleSource):
            data = TrainExamples(pairs, transform, self.seed, self.spec.image_size, self.mirroring)
        else:
            data = TrainPairs(pairs, transform, self.seed, self.spec.image_size, self.captions, self.mirroring)
        return self._loader(data, share // world_size(), batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation(self._read("val"), "limit_val_batches")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation(self._read("test"), "limit_test_batches")

    def _evaluation(self, pairs: Any, option: str) -> DataLoader[Any]:
        """Loader of an evaluation split. Each process takes its own batches: no image is added as padding or counted
        twice, and a batch (whose content determines masks and negatives) is the same for any number of processes for
        which there are enough batches of `eval_batch_size`. option: the trainer's limit on the number of such batches,
        here over all processes (Lightning counts per process: more processes would then evaluate more images, and
        recall would fall).

        Raises:
            UserError: the limit is a share.
        """
        count, limit = len(pairs), getattr(self.trainer, option, 1.0)
        check_limit(f"trainer.{option}", limit)
        if isinstance(limit, int) and limit:
            count = min(count, max(limit * self.eval_batch_size, world_size()))
        self.share_looked_at = count / max(1, len(pairs))
        batches = evaluation_batches(count, self.eval_batch_size, world_size())
        # whole batches, in turn
        return self._measured(pairs, batches[rank() :: world_size()], max(map(len, batches), default=0))

    def validation_rows(self, rows: list[int]) -> DataLoader[Any]:
        """Loader of the given rows of the validation split, all in this process."""
        size = self.eval_batch_size
        return self._measured(self.splits["val"], [[*rows[at : at + size]] for at in range(0, len(rows), size)], size)

    def _measured(self, pairs: Any, batches: list[list[int]], size: int) -> DataLoader[Any]:
        """Loader of the given batches of a split for evaluation, each of at most `size` rows."""
        transform = eval_transform(self.spec, normalise=False)
        data: Dataset[Any]
        if isinstance(self.source, ExampleSource):
            data = EvalExamples(pairs, transform)
        else:
            data = EvalPairs(pairs, transform, self.spec.image_size)
        return self._loader(data, size, batch_sampler=batches)

    def _loader(
        self, data: Dataset[Any], size: int, kind: type[DataLoader[Any]] = DataLoader, **kwargs: Any
    ) -> DataLoader[Any]:
        """size: samples in a batch of this process."""
        assert self.tokenizer is not None
        captioner = Captioner(self.tokenizer, self.spec.text_length)
        collate: Callable[..., Any] = Collate(captioner)
        if isinstance(self.source, ExampleSource):
            collate = CollateExamples(captioner, self.source)
        # one byte for each of 3 colours
        if workers := self._readers():
            # All examples of a source have the same number of images.
            images = len(data.examples[0]["images"]) if isinstance(data, TrainExamples | EvalExamples) else 1
            batch_bytes = 3 * self.spec.image_size**2 * size * images
            check_shared(batch_bytes, workers, getattr(self.trainer, "num_devices", 1))
        return noted_loader(kind, data, collate, workers, pin_memory=self._on_gpu(), **kwargs)

    def _on_gpu(self) -> bool:
        strategy = getattr(self.trainer, "strategy", None)
        return strategy is not None and strategy.root_device.type == "cuda"

    def _readers(self) -> int:
        if self.workers is not None or not self._on_gpu():
            return self.workers or 0
        strategy: Any = self.trainer.strategy  # type: ignore[union-attr]
        # A SLURM task has its own cores, two of which are for the training itself (`cli/slurm.py`).
        if isinstance(getattr(strategy, "cluster_environment", None), SLURMEnvironment):
            return max(1, min(12, int(os.environ.get("SLURM_CPUS_PER_TASK") or cores()) - 2))
        return min(12, cores() // max(1, self.trainer.num_devices))  # type: ignore[union-attr]

    # ------------------------------------------------------------------ batches on the device

    def normalised(self, batch: Any) -> Any:
        """A batch with normalised images. Loaders return uint8, a quarter of the size of floats to pass between
        processes and to copy to the device; float images are assumed to be normalised."""
        name = "image_BPCHW" if isinstance(batch, ExampleBatch) else "image_BCHW"
        pixels = getattr(batch, name)
        if pixels.is_floating_point():
            return batch
        image, valid_B = self._normalise(pixels), batch.valid_B
        # a placeholder has the mean colour: zero after normalising, for which there is no byte value
        image.masked_fill_(~valid_B.view(-1, *[1] * (image.ndim - 1)), 0)
        if self.trainer is not None:
            # Lightning converts floats before the copy, when there were none yet
            image = self.trainer.precision_plugin.convert_input(image)
        return batch._replace(**{name: image})

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalise the batch; in training, also count its bad samples.

        Raises:
            UserError: more than `max_bad_fraction` of at least 1,000 samples, or all of at least 16, could not be read
                (65).
        """
        batch = self.normalised(batch)
        if not getattr(self.trainer, "training", True):
            return batch
        # only in training: evaluation raises for a sample that it cannot read
        self.samples += len(batch.valid_B)
        for reason, message in batch.problems:
            self.problems[reason] += 1
            listed = self.examples.setdefault(reason, [])
            if len(listed) < MOST_LISTED and message not in listed:  # a bad row comes back every epoch
                listed.append(message)
        # a reason "caption ..." is a repaired caption, whose sample is used
        unread = sum(n for reason, n in self.problems.items() if not reason.startswith("caption "))
        # with fewer samples the share says little, and one bad row at the start would end the run; but if none of the
        # first ones can be read, a short run would finish without having learned anything
        many = self.samples >= 1000 and unread > self.max_bad_fraction * self.samples
        none = self.samples >= 16 and unread >= self.samples and self.max_bad_fraction < 1
        if batch.problems and (many or none):
            what = f"{unread} of {self.samples} samples could not be read, first: {batch.problems[0][1]}"
            todo = "fix the data or raise data.max_bad_fraction"
            raise UserError("training data", what, todo, ExitCode.BAD_DATA)
        return batch

    def bad_rows(self) -> dict[str, Any]:
        """Samples skipped or repaired so far by reason, and which they are (the first 1,000 per reason); also what the
        reader left out."""
        left_out = {name: dict(getattr(pairs, "skipped", {})) for name, pairs in self.splits.items()}
        counts: Counter[str] = Counter()
        # collective: every process must get here, and gather in the same order
        for part in gather_objects(self.problems):
            counts.update(part)  # type: ignore[call-overload]
        samples = sum(gather_objects(self.samples))  # type: ignore[arg-type]
        examples: dict[str, list[str]] = {}
        for shard in gather_objects(self.examples):
            for reason, messages in shard.items():  # type: ignore[attr-defined]
                examples[reason] = list(dict.fromkeys([*examples.get(reason, []), *messages]))[:MOST_LISTED]
        return {"samples": samples, "problems": dict(counts), "examples": examples, "left_out": left_out}


def _kind(value: Any) -> str:
    """A value for a message: an object by its class."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _parts(dealt: list[int]) -> str:
    """Processes and data workers of each, in words."""
    return f"{dealt[0]} processes with {dealt[1]} data workers each"
