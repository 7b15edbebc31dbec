"""From a source's rows to samples: reading, augmentation, one caption or all, holes for what cannot be read."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from maskvlm.data.batch import Batch, Pairs, Row
from maskvlm.data.images import BadImage, safe_open
from maskvlm.data.sampler import Pick
from maskvlm.data.text import Captioner, caption_id, clean_caption, stable_id
from maskvlm.data.transforms import ToTensor
from maskvlm.data.workers import at
from maskvlm.utils.distributed import mix
from maskvlm.utils.errors import ExitCode, UserError

Transform = Callable[..., Tensor]


class ProcessShare(NamedTuple):
    """A process's part of every batch. size: its pairs in one."""

    rank: int
    world: int
    size: int


class Sample(TypedDict):
    """One image and the captions shown with it; `problem` is (reason, message) or None. image_CHW: normalised floats,
    or bytes that `Collate` normalises."""

    image_CHW: Tensor
    captions: list[str]
    image_id: str
    index: int
    valid: bool
    problem: tuple[str, str] | None
    foreground: np.ndarray | None


class TrainPairs(Dataset[Sample]):
    """One caption an image (or `captions` of them), others each epoch; augmentation seeded by (seed, epoch, index).

    A row that cannot be read becomes a hole that keeps its place in the batch (blank, without words, weight 0),
    so that processes stay in step and no other sample moves.
    """

    def __init__(self, pairs: Pairs, transform: Transform, seed: int, image_size: int, captions: int = 1) -> None:
        self.pairs, self.transform, self.seed, self.image_size = pairs, transform, seed, image_size
        self.captions = captions
        # plain resizing has neither: it wants the whole image, and makes the tensor itself
        self.least: int | None = getattr(transform, "least", None)
        self.augment: Callable[[Image.Image, str], Image.Image] | None = getattr(transform, "augment", None)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, pick: Pick) -> Sample:
        return self.sample(self.pairs[pick.row], pick)

    def sample(self, row: Row, pick: Pick) -> Sample:
        """What is shown of a row; a source without rows by number picks by numbers of its own."""
        at(row["origin"], row["image_id"])
        # The generator of a data worker serves nothing else, so there is no state to bring back.
        with torch.random.fork_rng(devices=[], enabled=get_worker_info() is None):
            # torch.manual_seed would also note the stack for every GPU backend: 0.5 ms, as long as all the rest
            torch.default_generator.manual_seed(mix(self.seed, pick.epoch, pick.row))
            return self._read(row, pick)

    def _read(self, row: Row, pick: Pick) -> Sample:
        there = row["captions"]
        # Each epoch goes on where the last one ended in the list of captions.
        # The row is added so that images begin at different places of it.
        first = pick.epoch * self.captions + pick.row
        shown = [clean_caption(there[(first + n) % len(there)] if there else "") for n in range(self.captions)]
        captions, note = [text for text, _ in shown], next((note for _, note in shown if note), None)
        if not all(captions):
            return self.hole(pick.row, ("empty caption", f"{row['origin']}: the caption is empty"))
        try:
            # the augmentation looks for colours and sides in all captions that are shown
            image, text = safe_open(row["image"], row["origin"], self.least), " ".join(captions)
            # bytes where possible: a quarter to hand on, and `Collate` normalises them while it copies
            image_CHW = self.transform(image, text) if self.augment is None else as_bytes(self.augment(image, text))
        except BadImage as problem:
            return self.hole(pick.row, (problem.reason, str(problem)))
        return Sample(
            image_CHW=image_CHW,
            captions=captions,
            image_id=row["image_id"],
            index=pick.row,
            valid=True,
            problem=(f"caption {note}", row["origin"]) if note else None,
            foreground=None,
        )

    def hole(self, index: int, problem: tuple[str, str]) -> Sample:
        """Keeps the place of a row that cannot be used."""
        return Sample(
            # normalised floats: zero is the mean colour
            image_CHW=torch.zeros(3, self.image_size, self.image_size),
            # as many captions as any sample, so that C is the same in all processes
            captions=[""] * self.captions,
            # an id of its own: a hole shows the same image as no other row
            image_id=f"hole {index}",
            index=index,
            valid=False,
            problem=problem,
            foreground=None,
        )


def as_bytes(image: Image.Image) -> Tensor:
    """An RGB image as bytes, (3, H, W), a quarter of its floats."""
    # (H, W, 3) -> (3, H, W), a view
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class EvalPairs(Dataset[Sample]):
    """Every image with all its captions; a row that cannot be read is an error, never skipped."""

    def __init__(self, pairs: Pairs, transform: Transform, image_size: int) -> None:
        self.pairs, self.transform, self.image_size = pairs, transform, image_size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        row = self.pairs[index]
        at(row["origin"], row["image_id"])
        # here an empty caption is left out, not shown: it could be retrieved by nobody
        captions = [text for text, _ in map(clean_caption, row["captions"]) if text]
        if not captions:
            raise UserError(row["origin"], "no caption with words", "Mend or remove the row", ExitCode.BAD_DATA)
        # only the built-in world knows where its objects are
        object_mask = getattr(self.pairs, "object_mask", None)
        return Sample(
            image_CHW=self.transform(safe_open(row["image"], row["origin"])),
            captions=captions,
            image_id=row["image_id"],
            index=index,
            valid=True,
            problem=None,
            foreground=object_mask(index, self.image_size) if object_mask else None,
        )


class Collate:
    """Samples -> Batch; captions are turned into tokens here, padded to the longest of the batch.

    Args:
        captioner: captions to tokens.
        normalise: for images that come as bytes.
    """

    def __init__(self, captioner: Captioner, normalise: ToTensor | None = None) -> None:
        self.captioner, self.normalise = captioner, normalise

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        # C captions, those of an image one after the other
        captions = [caption for sample in samples for caption in sample["captions"]]
        counts = torch.tensor([len(sample["captions"]) for sample in samples])
        # B masks of (H, W), or none
        grounds = [sample["foreground"] for sample in samples if sample["foreground"] is not None]
        return Batch(
            self.image_batch([sample["image_CHW"] for sample in samples]),
            # token_CT, attention_CT, special_CT, word_CT
            *self.captioner(captions),
            # owner_C: [0, 0, 1, 1, ...]
            torch.arange(len(samples)).repeat_interleave(counts),
            torch.tensor([stable_id(sample["image_id"]) for sample in samples]),
            torch.tensor([caption_id(caption) for caption in captions]),
            torch.tensor([sample["valid"] for sample in samples]),
            torch.tensor([sample["index"] for sample in samples]),
            # (B, H, W), only where every image has one
            torch.from_numpy(np.stack(grounds)) if len(grounds) == len(samples) else None,
            tuple(sample["problem"] for sample in samples if sample["problem"]),
            tuple(captions),
        )

    def image_batch(self, images: list[Tensor]) -> Tensor:
        """The images of a batch as floats; in a data worker written where the main process reads them (as torch's
        own collation does), which saves 0.5 ms of 2.2 an image of 224 pixels."""
        size = (len(images), *images[0].shape)
        # 4 bytes a float; outside of a worker there is nobody to share with
        shared = torch.UntypedStorage._new_shared(4 * math.prod(size)) if get_worker_info() else None
        image_BCHW = torch.empty(size) if shared is None else torch.empty(0).set_(shared).view(size)
        for place, image_CHW in zip(image_BCHW, images, strict=True):
            if image_CHW.dtype == torch.uint8:
                assert self.normalise is not None
                self.normalise.fill(place, image_CHW.numpy())
            else:
                # floats: a hole, or an image that the transform made a tensor of
                place.copy_(image_CHW)
        return image_BCHW
