"""Runs that take a second by the command line: the built-in world, encoders 32 wide. And a line, fitted at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from maskvlm.training.csv_log import rows_in

SMALL: dict[str, Any] = {
    "data.steps": 12,
    "data.batch_size": 4,
    "data.eval_batch_size": 6,
    "data.source.train": 24,
    "data.source.val": 6,
    "model.lr": 1e-3,
    "model.lr_encoders": 1e-3,
    "model.task.weight_words": 0,
    "model.task.rerank_k": 2,
    "model.backbone.image.config": "{patch_size: 16, embed_dim: 32, depth: 1, num_heads: 2}",
    "model.backbone.text.config": "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 64}",
    "trainer.val_check_interval": 3,
    "trainer.log_every_n_steps": 1,
}


def as_words(settings: dict[str, Any]) -> list[str]:
    """Options of a command; in the names of settings dots may be two underscores."""
    return [f"--{key.replace('__', '.')}={value}" for key, value in settings.items()]


def logged(folder: Path, column: str) -> list[tuple[int, str]]:
    """Step and value of each row of a run's log that has this column."""
    rows = rows_in((folder / "metrics.csv").read_bytes())
    return [(int(row["step"]), row[column]) for row in rows if column in row]


class Line(L.LightningModule):
    """One weight; notes the step of each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.evaluated: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("loss", 1.0)
        return (self.weight - batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.evaluated.append(self.trainer.global_step)
        self.log("score", 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class At(L.Callback):
    """Does something at the end of some steps."""

    def __init__(self, do: Callable[[L.Trainer], object], *steps: int) -> None:
        self.do, self.steps = do, steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            self.do(trainer)
