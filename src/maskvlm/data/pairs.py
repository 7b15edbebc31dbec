"""From a source's rows to samples: reading, augmentation, one caption or all, placeholders for unreadable rows."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info

from maskvlm.data.batch import Batch, Pairs, Row, check_row
from maskvlm.data.caption_text import caption_id, clean_caption, stable_id
from maskvlm.data.images import BadImage, safe_open
from maskvlm.data.sampler import Pick
from maskvlm.data.text import Captioner
from maskvlm.data.transforms import Mirroring, mirror
from maskvlm.data.workers import at
from maskvlm.utils.distributed import mix
from maskvlm.utils.errors import ExitCode, UserError

Transform = Callable[..., Tensor]


class ProcessShare(NamedTuple):
    """A process's part of every batch. size: its number of pairs per batch."""

    rank: int
    world: int
    size: int


class Sample(TypedDict):
    """One image and the captions shown with it; `problem` is (reason, message) or None. image_CHW: uint8, or normalised
    floats."""

    image_CHW: Tensor
    captions: list[str]
    image_id: str
    index: int
    valid: bool
    problem: tuple[str, str] | None
    foreground: np.ndarray | None
    mirrored: bool | None


class TrainPairs(Dataset[Sample]):
    """`captions` captions per image, with a different one first in each epoch; augmentation is seeded by (seed, epoch,
    index).

    A row that cannot be read becomes a placeholder in the batch (blank, without words, weight 0), so that processes
    stay in step and no other sample moves.

    `mirroring`: draws which images to mirror after the transform, for data that show an image in two versions; None:
    not used.
    """

    def __init__(
        self,
        pairs: Pairs,
        transform: Transform,
        seed: int,
        image_size: int,
        captions: int = 1,
        mirroring: Mirroring | None = None,
    ) -> None:
        self.pairs, self.transform, self.seed, self.image_size = pairs, transform, seed, image_size
        self.captions, self.mirroring = captions, mirroring
        # plain resizing has no such limit, as it needs the whole image
        self.least: int | None = getattr(transform, "least", None)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, pick: Pick) -> Sample:
        return self.sample(self.pairs[pick.row], pick)

    def sample(self, row: Row, pick: Pick) -> Sample:
        """The sample of a row; a source without row numbers picks by numbers of its own."""
        row = check_row(row, pick.row)
        at(row["origin"], row["image_id"])
        # A data worker's generator is used for nothing else, so there is no state to restore.
        with torch.random.fork_rng(devices=[], enabled=get_worker_info() is None):
            # torch.manual_seed would also record the stack for every GPU backend: 0.5 ms, as long as all the rest
            torch.default_generator.manual_seed(mix(self.seed, pick.epoch, pick.row))
            return self._read(row, pick)

    def _read(self, row: Row, pick: Pick) -> Sample:
        there = row["captions"]
        first = first_caption(pick, len(there), self.captions)
        entries = [clean_caption(there[(first + n) % len(there)] if there else "") for n in range(self.captions)]
        captions, note = [text for text, _ in entries], next((note for _, note in entries if note), None)
        if not all(captions):
            return self.hole(pick.row, ("empty caption", f"{row['origin']}: the caption is empty"))
        try:
            # the augmentation looks for colours and directions in all captions shown
            image, text = safe_open(row["image"], row["origin"], self.least), " ".join(captions)
            image_CHW = self.transform(image, text)
            mirrored = None if self.mirroring is None else self.mirroring.draw(text)
        except BadImage as problem:
            return self.hole(pick.row, (problem.reason, str(problem)))
        return Sample(
            image_CHW=mirror(image_CHW) if mirrored else image_CHW,
            captions=captions,
            image_id=row["image_id"],
            index=pick.row,
            valid=True,
            problem=(f"caption {note}", row["origin"]) if note else None,
            foreground=None,
            mirrored=mirrored,
        )

    def hole(self, index: int, problem: tuple[str, str]) -> Sample:
        """A placeholder for a row that cannot be used."""
        return Sample(
            # black; `PairData.normalised` sets it to zero, the mean colour
            image_CHW=torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8),
            # as many captions as any sample, so that C is the same in all processes
            captions=[""] * self.captions,
            # a unique id, as a placeholder shows the same image as no other row
            image_id=f"hole {index}",
            index=index,
            valid=False,
            problem=problem,
            foreground=None,
            mirrored=None if self.mirroring is None else False,
        )


def first_caption(pick: Pick, count: int, shown: int) -> int:
    """Index of the first caption of a sample; the others follow it in the image's list. Masked words and matching use
    only the first one: in `count` epochs each caption is first once.

    Args:
        count: number of captions of the image.
        shown: number of captions in a sample.
    """
    if not count:
        return 0
    # Each epoch continues where the last one ended. If that returns to the start too early, as with 2 of 4 captions, it
    # is shifted by one.
    turn = count // math.gcd(count, shown)
    further = pick.epoch // turn if turn < count else 0
    # The row is added so that images start at different captions.
    return (pick.epoch * shown + further + pick.row) % count


class EvalPairs(Dataset[Sample]):
    """Every image with all its captions; a row that cannot be read is an error, never skipped."""

    def __init__(self, pairs: Pairs, transform: Transform, image_size: int) -> None:
        self.pairs, self.transform, self.image_size = pairs, transform, image_size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        row = check_row(self.pairs[index], index)
        at(row["origin"], row["image_id"])
        # empty captions are left out here, as nothing could retrieve them
        captions = [text for text, _ in map(clean_caption, row["captions"]) if text]
        if not captions:
            raise UserError(row["origin"], "no caption has any words", "Fix or remove the row", ExitCode.BAD_DATA)
        # only the built-in scenes know where their objects are
        object_mask = getattr(self.pairs, "object_mask", None)
        return Sample(
            image_CHW=self.transform(safe_open(row["image"], row["origin"])),
            captions=captions,
            image_id=row["image_id"],
            index=index,
            valid=True,
            problem=None,
            foreground=object_mask(index, self.image_size) if object_mask else None,
            mirrored=None,
        )


class Collate:
    """Samples -> Batch; captions are tokenized here and padded to the longest of the batch.

    Args:
        captioner: turns captions into tokens.
    """

    def __init__(self, captioner: Captioner) -> None:
        self.captioner = captioner

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        # C captions, those of an image next to each other
        captions = [caption for sample in samples for caption in sample["captions"]]
        counts = torch.tensor([len(sample["captions"]) for sample in samples])
        # B masks of (H, W), or none
        grounds = [sample["foreground"] for sample in samples if sample["foreground"] is not None]
        return Batch(
            stack_images([sample["image_CHW"] for sample in samples]),
            # token_CT, attention_CT, special_CT, word_CT
            *self.captioner(captions),
            # owner_C: [0, 0, 1, 1, ...]
            torch.arange(len(samples)).repeat_interleave(counts),
            torch.tensor([stable_id(sample["image_id"]) for sample in samples]),
            torch.tensor([caption_id(caption) for caption in captions]),
            torch.tensor([sample["valid"] for sample in samples]),
            torch.tensor([sample["index"] for sample in samples]),
            # (B, H, W), only if every image has one
            torch.from_numpy(np.stack(grounds)) if len(grounds) == len(samples) else None,
            tuple(sample["problem"] for sample in samples if sample["problem"]),
            tuple(captions),
            mirrored_tensor([sample["mirrored"] for sample in samples]),
        )


def mirrored_tensor(mirrored: Sequence[bool | None]) -> Tensor | None:
    """`Batch.mirrored_B` from the samples' flags, which are all None or none of them."""
    return None if mirrored[0] is None else torch.tensor(mirrored)


def stack_images(images: list[Tensor]) -> Tensor:
    """Stack the images of a batch: uint8, or floats if the transform returns them. In a data worker torch writes them
    directly to shared memory."""
    # a placeholder is uint8 even among floats
    dtype = functools.reduce(torch.promote_types, (image.dtype for image in images))
    stacked: Tensor = default_collate([image.to(dtype) for image in images])
    return stacked
