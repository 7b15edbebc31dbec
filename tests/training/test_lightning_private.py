"""The installed version of Lightning has the private parts that a run which goes on needs, and calls them as it did."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from maskvlm.training import lightning_private as private


class Line(L.LightningModule):
    """One weight, and what happened to it in order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.events: list[Any] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("loss", 1.0)
        return (self.weight - batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.events.append(("evaluated", self.trainer.global_step))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Looks(L.Callback):
    """Asks after each batch."""

    def __init__(self, ask: Callable[[L.Trainer], Any]) -> None:
        self.ask, self.answers = ask, []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.answers.append(self.ask(trainer))


def fit(callback: L.Callback, module: Line | None = None, **settings: Any) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[callback], **settings,
    )  # fmt: skip
    trainer.fit(module or Line(), DataLoader(torch.ones(6, 1)), DataLoader(torch.ones(1, 1)))
    return trainer


def test_of_accumulated_batches_the_last_makes_the_step() -> None:
    looks = Looks(private.is_accumulating)
    fit(looks, accumulate_grad_batches=3, limit_val_batches=0)
    assert looks.answers == [True, True, False] * 2


def test_an_evaluation_follows_every_second_batch() -> None:
    looks = Looks(private.evaluation_is_due)
    fit(looks, val_check_interval=2)
    assert looks.answers == [False, True] * 3


def test_steps_are_counted() -> None:
    looks = Looks(private.batches_that_stepped)
    trainer = fit(looks, limit_val_batches=0)
    assert looks.answers == [0, 1, 2, 3, 4, 5]
    private.count_last_step(trainer)
    assert private.batches_that_stepped(trainer) == trainer.global_step == 6


class Third(L.Callback):
    """Saves after the third batch; of a run that goes on from there asks at its start."""

    def __init__(self, path: Path) -> None:
        self.path, self.answers = path, []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.answers.append(private.batches_that_stepped(trainer))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            self.answers.append(private.batches_that_stepped(trainer))
            trainer.save_checkpoint(self.path)


def test_a_run_that_goes_on_begins_at_the_last_row_that_was_logged(tmp_path: Path) -> None:
    third = Third(tmp_path / "third.ckpt")
    trainer = fit(third, limit_val_batches=0)
    trainer.fit(Line(), DataLoader(torch.ones(6, 1)), ckpt_path=third.path, weights_only=True)
    assert third.answers == [0, 2, 2]


class AtOnce(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        private.evaluate_now(trainer)
        assert trainer.training


def test_an_evaluation_before_the_first_step() -> None:
    module = Line()
    fit(AtOnce(), module, val_check_interval=6)
    assert module.events == [("evaluated", 0), ("evaluated", 6)]


class Scored(Line):
    """Of which an evaluation has a score."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("score", 1.0)


def test_the_best_weights_are_there_when_an_evaluation_ends(tmp_path: Path) -> None:
    """Also at the end of the pass; one that was told otherwise keeps to that."""
    keeper = ModelCheckpoint(tmp_path, "best", "score", mode="max")
    explicit = ModelCheckpoint(tmp_path, "told", "score", save_on_train_epoch_end=True)
    private.judge_after_evaluations(keeper)
    private.judge_after_evaluations(explicit)
    existence: list[bool] = []

    class Late(L.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            existence.append((tmp_path / "best.ckpt").exists())

    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[Late(), keeper, explicit],
    )  # fmt: skip
    trainer.fit(Scored(), DataLoader(torch.ones(2, 1)), DataLoader(torch.ones(1, 1)))
    assert existence == [True]
    assert explicit._save_on_train_epoch_end is True


class Handlers(L.Callback):
    def __init__(self) -> None:
        self.installed = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        private.replace_signal_handlers(trainer, self.install)

    def install(self) -> None:
        self.installed += 1


def test_handlers_are_installed_in_the_place_of_lightnings() -> None:
    handlers = Handlers()
    fit(handlers, limit_val_batches=0)
    assert handlers.installed == 1


@pytest.mark.parametrize("interval", [1, 4])
def test_a_row_is_handed_to_the_loggers_when_it_is_its_turn(interval: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def log(trainer: L.Trainer) -> None:
        with monkeypatch.context() as patch:
            connector = trainer._logger_connector
            patch.setattr(connector, "log_metrics", lambda metrics, step=None: rows.append(trainer.global_step))
            private.log_this_step(trainer)

    looks = Looks(log)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, callbacks=[looks],
        enable_model_summary=False, log_every_n_steps=interval, default_root_dir="/nonexistent", logger=[Silent()],
    )  # fmt: skip
    trainer.fit(Line(), DataLoader(torch.ones(6, 1)))
    assert rows == ([1, 2, 3, 4, 5, 6] if interval == 1 else [4])


class Silent(L.pytorch.loggers.logger.DummyLogger):
    """Logs nowhere."""
