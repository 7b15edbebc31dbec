"""From a task's examples to batches: reading, augmentation, targets, tokens; placeholders for unreadable examples.

The counterpart of `pairs.py` for `ExampleSource`. Shapes: B examples, P images per example, K labels, A answers.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypedDict

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from maskvlm.data.caption_text import clean_caption, stable_id
from maskvlm.data.examples import AnswerTokens, Example, ExampleBatch, Examples, ExampleSource, read_example
from maskvlm.data.images import BadImage, safe_open
from maskvlm.data.pairs import mirrored_tensor, stack_images
from maskvlm.data.sampler import Pick
from maskvlm.data.text import Captioner
from maskvlm.data.transforms import Mirroring, mirror
from maskvlm.data.workers import at
from maskvlm.utils.distributed import mix
from maskvlm.utils.errors import ExitCode, UserError


class ExampleSample(TypedDict):
    """One example with its images as tensors; `problem` is (reason, message) or None."""

    image_PCHW: Tensor
    example: Example
    index: int
    valid: bool
    problem: tuple[str, str] | None
    mirrored: bool | None


def opened_images(example: Example) -> Iterator[Image.Image]:
    """The example's images, decoded. Raises BadImage, which names the file (or the image's id, if it is not a file)
    besides the row, as a row with several images does not say which one is bad, nor in which folder."""
    # a generator, so that the transform takes each image before the next one is decoded
    for image, id in zip(example["images"], example["image_ids"], strict=True):
        try:
            yield safe_open(image, example["origin"])
        except BadImage as bad:
            name = image if isinstance(image, str) else id
            if name in bad.detail:
                raise
            raise BadImage(f"{bad.where} ({name})", bad.reason, bad.detail) from bad


class TrainExamples(Dataset[ExampleSample]):
    """Augmentation seeded by (seed, epoch, index); an example that cannot be read keeps its place with weight 0.
    `mirroring`: of all images of an example, or of none; None: not used."""

    def __init__(
        self, examples: Examples, transform: Any, seed: int, image_size: int, mirroring: Mirroring | None = None
    ) -> None:
        self.examples, self.transform, self.seed, self.image_size = examples, transform, seed, image_size
        self.mirroring = mirroring

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, pick: Pick) -> ExampleSample:
        example = read_example(self.examples, pick.row)
        at(example["origin"])
        text, note = clean_caption(example["text"])
        problem, valid = (f"caption {note}", example["origin"]) if note else None, True
        # seeded by the sample, so that its place in the run and its worker do not matter
        # `devices=[]`: GPU states are not saved, as nothing here draws from them
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(self.seed, pick.epoch, pick.row))
            try:
                if not text:
                    raise BadImage(example["origin"], "empty text", "there is no word in it")
                # An answer too may be wrong for a mirrored image: "left" to "Which way does he look?".
                words = " ".join([text, *example["answers"]])
                images = [self.transform(image, words) for image in opened_images(example)]
                mirrored = None if self.mirroring is None else self.mirroring.draw(words)
            except BadImage as bad:
                blank = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
                # one bad image makes the whole example a placeholder, as its text may be wrong for the rest
                images, problem, valid = [blank] * len(example["images"]), (bad.reason, str(bad)), False
                mirrored = None if self.mirroring is None else False
        # P images of (3, H, W) -> (P, 3, H, W)
        image_PCHW = torch.stack(images)
        return ExampleSample(
            image_PCHW=mirror(image_PCHW) if mirrored else image_PCHW,
            example=example,
            index=pick.row,
            valid=valid,
            problem=problem,
            mirrored=mirrored,
        )


class EvalExamples(Dataset[ExampleSample]):
    """Every example, unaugmented; one that cannot be read is an error, never skipped."""

    def __init__(self, examples: Examples, transform: Any) -> None:
        self.examples, self.transform = examples, transform

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> ExampleSample:
        example = read_example(self.examples, index)
        at(example["origin"])
        if not clean_caption(example["text"])[0]:
            raise UserError(example["origin"], "no words in its text", "Fix or remove the row", ExitCode.BAD_DATA)
        images = [self.transform(image) for image in opened_images(example)]
        return ExampleSample(
            image_PCHW=torch.stack(images), example=example, index=index, valid=True, problem=None, mirrored=None
        )


class CollateExamples:
    """Samples -> ExampleBatch.

    Args:
        captioner: turns texts and answers into tokens.
        source: provides labels and targets.
    """

    def __init__(self, captioner: Captioner, source: ExampleSource) -> None:
        self.captioner, self.source = captioner, source
        self.column = {label: number for number, label in enumerate(source.labels)}

    def __call__(self, samples: Sequence[ExampleSample]) -> ExampleBatch:
        examples = [sample["example"] for sample in samples]
        first = len(samples[0]["image_PCHW"])
        for sample in samples:
            if (images := len(sample["image_PCHW"])) != first:
                what = f"the example has {images} images, but {examples[0]['origin']} has {first}"
                todo = "Give each example of a source as many images"
                raise UserError(sample["example"]["origin"], what, todo, ExitCode.BAD_DATA)
        targets = [self.label_weights(example, "targets") for example in examples]
        ids = [[stable_id(name) for name in example["image_ids"]] for example in examples]
        return ExampleBatch(
            # (B, P, 3, H, W): all examples of a source have as many images
            stack_images([sample["image_PCHW"] for sample in samples]),
            # token_BT, attention_BT, special_BT, word_BT
            *self.captioner([example["text"] for example in examples]),
            self.dense(targets, examples),
            torch.tensor([sample["valid"] for sample in samples]),
            torch.tensor([sample["index"] for sample in samples]),
            # (B, P)
            torch.tensor(ids),
            self.answers([self.label_weights(example, "shares") for example in examples]),
            # without images, which would be sent from worker to main process a second time
            tuple(Example(**{**example, "images": []}) for example in examples),
            tuple(sample["problem"] for sample in samples if sample["problem"]),
            mirrored_tensor([sample["mirrored"] for sample in samples]),
        )

    def label_weights(self, example: Example, method: Literal["targets", "shares"]) -> dict[str, float]:
        """What this method of the source gives for the example's answers.

        Raises:
            UserError: a source of another package gives something else than a dict of numbers.
        """
        given: Any = getattr(self.source, method)(example["answers"])
        try:
            # Numbers of torch and NumPy, too.
            return {label: float(weight) for label, weight in given.items()}
        except (AttributeError, TypeError, ValueError):
            kind = type(self.source)
            todo = f"Return a dict, as maskvlm.data.examples.ExampleSource.{method}"
            what = f"gave {given!r:.60} for the answers {example['answers']!r:.60}"
            raise UserError(f"{kind.__module__}.{kind.__qualname__}.{method}", what, todo) from None

    def dense(self, targets: list[dict[str, float]], examples: list[Example]) -> Tensor:
        """Weights of all labels, [B, K]."""
        target_BK = torch.zeros(len(targets), len(self.column))
        # without classes, as in a regression, a task reads the answers themselves
        if not self.column:
            return target_BK
        # labels that are not listed stay 0; an example without any label is a row of zeros
        for row, (target, example) in enumerate(zip(targets, examples, strict=True)):
            for label, weight in target.items():
                if label not in self.column:
                    choices = ", ".join(list(self.column)[:8]) + (", ..." if len(self.column) > 8 else "")
                    what = f"label '{label}' is none of the {len(self.column)} classes ({choices})"
                    raise UserError(example["origin"], what, "Fix or remove the row", ExitCode.BAD_DATA)
                target_BK[row, self.column[label]] = weight
        return target_BK

    def answers(self, targets: list[dict[str, float]]) -> AnswerTokens:
        """The target answers of all examples, concatenated."""
        # A answers in total; an example has none, one or several
        flat = [(row, label, weight) for row, target in enumerate(targets) for label, weight in target.items()]
        # (A, T)
        tokens = self.captioner([label for _, label, _ in flat])
        owner_A = torch.tensor([row for row, _, _ in flat], dtype=torch.long)
        weight_A = torch.tensor([weight for _, _, weight in flat], dtype=torch.float)
        return AnswerTokens(tokens.token_CT, tokens.attention_CT, owner_A, weight_A)
