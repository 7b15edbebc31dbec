"""Small stand-ins for the tests of downstream tasks: questions about squares, batches of noise, whole runs in a second.

Shapes: B examples, P images an example, T tokens, K labels, A answers of all examples.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from PIL import Image
from toys import LENGTH, SIZE, VOCAB, tokens, toy_backbone

from maskvlm.data.batch import InputSpec
from maskvlm.data.examples import AnswerTokens, Example, ExampleBatch, ExampleSource
from maskvlm.data.module import PairData
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.classification import Classification
from maskvlm.objectives.task import Task
from maskvlm.training.checkpoint_io import SafeCheckpointIO
from maskvlm.training.lit import LitModel
from maskvlm.utils.distributed import Draw
from tasks.vqa.task import Vqa

LABELS = ("red", "green", "blue")
FIRST = {"train": (0, 16), "val": (12, 7), "test": (100, 5)}
"""Number of the first image, and of examples: four images of `val` are images of `train`."""


def example(number: int, count: int = 1, **changes: Any) -> Example:
    """Squares in the label's colour, and what is asked of them."""
    label = LABELS[number % 3]
    whole = {
        "images": [Image.new("RGB", (SIZE, SIZE), label) for _ in range(count)],
        "image_ids": [f"toy {number} {place}" for place in range(count)],
        "text": f"is number {number} red or green or blue",
        "answers": [label],
        "id": str(1000 + number),
        "kind": "even" if number % 2 == 0 else "odd",
        "group": "",
        "origin": f"toy.json:{number}",
    }
    return Example(**{**whole, **changes})  # type: ignore[typeddict-item]


class ToySplit:
    """Examples over a list."""

    def __init__(self, rows: list[Example], fingerprint: str = "toy") -> None:
        self.rows, self.fingerprint = rows, fingerprint
        self.skipped: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Example:
        return self.rows[index]

    def image_ids(self) -> Iterator[str]:
        return (name for row in self.rows for name in row["image_ids"])


class Questions(ExampleSource):
    """Sixteen questions to train on, seven for validation, five for the test.

    Args:
        images: of an example. names: the labels. changes: of single rows, by split and place in it.
    """

    def __init__(
        self, images: int = 1, names: tuple[str, ...] = LABELS, changes: dict[str, dict[int, Any]] | None = None
    ) -> None:
        self.images, self.names, self.changes = images, names, changes or {}

    @property
    def labels(self) -> tuple[str, ...]:
        return self.names

    def split(self, name: str) -> ToySplit:
        first, size = FIRST[name]
        other = self.changes.get(name, {})
        rows = [example(first + n, self.images, **other.get(n, {})) for n in range(size)]
        return ToySplit(rows, f"toy {name}")


class Nameless(Questions):
    """Cannot tell its images without opening them."""

    def split(self, name: str) -> Any:
        examples: Any = super().split(name)
        examples.image_ids = None
        return examples


def example_batch(rows: int = 5, images: int = 1, holes: tuple[int, ...] = (), seed: int = 0) -> ExampleBatch:
    """Noise images with random questions; each has one to three answers of one to three words, with weights."""
    generator = torch.Generator().manual_seed(seed)

    def words(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(5, VOCAB, (length,), generator=generator).tolist()

    owner = [row for row in range(rows) for _ in range(1 + row % 3)]
    answers = tokens([words(1, 3) for _ in owner])
    text = tokens([words(3, LENGTH - 2) for _ in range(rows)])
    image_BPCHW = torch.randn(rows, images, 3, SIZE, SIZE, generator=generator)
    valid_B = torch.ones(rows, dtype=torch.bool)
    for hole in holes:
        image_BPCHW[hole], valid_B[hole] = 0.0, False
    return ExampleBatch(
        image_BPCHW,
        text["token_CT"], text["attention_CT"], text["special_CT"], text["word_CT"],
        torch.eye(3)[torch.arange(rows) % 3],
        valid_B,
        torch.arange(rows),
        torch.arange(rows * images).view(rows, images),
        AnswerTokens(
            answers["token_CT"], answers["attention_CT"], torch.tensor(owner),
            torch.rand(len(owner), generator=generator) + 0.1,
        ),
        tuple(example(row, images) for row in range(rows)),
    )  # fmt: skip


def take_examples(batch: ExampleBatch, first: int, last: int) -> ExampleBatch:
    """The examples from `first` to before `last`, text and answers trimmed to the longest that is left."""
    rows = slice(first, last)
    longest = int(batch.attention_BT[rows].sum(1).max())
    names = ("image_BPCHW", "target_BK", "valid_B", "index_B", "image_id_BP", "examples")
    text = ("token_BT", "attention_BT", "special_BT", "word_BT")
    inside_A = (batch.answers.owner_A >= first) & (batch.answers.owner_A < last)
    end = int(batch.answers.attention_AT[inside_A].sum(1).max())
    answers = AnswerTokens(
        batch.answers.token_AT[inside_A, :end], batch.answers.attention_AT[inside_A, :end],
        batch.answers.owner_A[inside_A] - first, batch.answers.weight_A[inside_A],
    )  # fmt: skip
    parts = {name: getattr(batch, name)[rows] for name in names}
    return ExampleBatch(**parts, **{name: getattr(batch, name)[rows, :longest] for name in text}, answers=answers)


def matters(backbone: MaskVLM, task: Task) -> None:
    """Weights far from their small start values, so that everything in a step matters."""
    torch.manual_seed(5)
    for _, parameter in (*backbone.named_parameters(), *task.named_parameters()):
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.4)
        else:
            parameter.data += 0.2 * torch.randn_like(parameter)


def build(kind: str, **settings: Any) -> tuple[MaskVLM, Task]:
    """A toy backbone with `classes`, or VQA's head `generate` or `classify`; everything matters in its step."""
    backbone, head = toy_backbone(), cast(Any, kind)
    task = Classification(LABELS, **settings) if kind == "classes" else Vqa(LABELS, head, **settings)
    task.build(backbone)
    matters(backbone, task)
    task.set_uniform(Draw(7, 0, "cpu"))
    return backbone, task


# ---------------------------------------------------------------------- whole runs


def bare_backbone(start: Path | None = None, **settings: Any) -> MaskVLM:
    """A backbone without a tokenizer of its own, or one that starts from a checkpoint."""
    backbone = toy_backbone(length=24, vocab=150, start=None if start is None else str(start), **settings)
    if start is None:
        backbone.text.tokenizer = None
    return backbone


def data_for(backbone: MaskVLM, source: Any, steps: int = 2, **settings: Any) -> PairData:
    spec: InputSpec = backbone.input_spec
    plain = {"batch_size": 4, "eval_batch_size": 3, "augment": False}
    return PairData(source, spec, steps=steps, **{**plain, **settings})


def trainer_in(folder: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """Quiet, on the CPU, without Lightning's own files."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1}
    fixed = {"accelerator": "cpu", "max_epochs": 1, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    both = {**quiet, **fixed, "enable_checkpointing": False, "default_root_dir": str(folder), **settings}
    return L.Trainer(**both, callbacks=list(callbacks), plugins=[SafeCheckpointIO()])


def fit(model: LitModel, data: PairData, path: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """Train without evaluation and leave a checkpoint."""
    trainer = trainer_in(path.parent, *callbacks, limit_val_batches=0)
    trainer.fit(model, data, **settings)
    trainer.save_checkpoint(path)
    return trainer
