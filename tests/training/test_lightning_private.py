"""The installed version of Lightning has the private parts that a run which goes on needs, and calls them as it did."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from training.small_runs import Line

from maskvlm.training import lightning_private as private


class Looks(L.Callback):
    """Asks what the program asks, at the start and after each batch."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.installed, self.rows, self.answers, self.kept = 0, list[int](), list[Any](), list[bool]()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        private.replace_signal_handlers(trainer, self.install)

    def install(self) -> None:
        self.installed += 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.answers.append(private.batches_that_stepped(trainer))
        private.evaluate_now(trainer)
        assert trainer.training

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        asked = (private.is_accumulating(trainer), private.evaluation_is_due(trainer))
        self.answers.append((*asked, private.batches_that_stepped(trainer)))
        with self.monkeypatch.context() as patch:
            connector = trainer._logger_connector
            patch.setattr(connector, "log_metrics", lambda *_, **__: self.rows.append(trainer.global_step))
            private.log_this_step(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.kept.append((self.folder / "best.ckpt").exists())


class Silent(L.pytorch.loggers.logger.DummyLogger):
    """Logs nowhere."""


def test_the_parts_are_there_and_are_called_when_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six passes, two for each step; evaluated before the first and after every second. The best weights are there when
    an evaluation ends, also the last one; a callback that was told otherwise keeps to that."""
    keeper = ModelCheckpoint(tmp_path, "best", "score", mode="max")
    explicit = ModelCheckpoint(tmp_path, "told", "score", save_on_train_epoch_end=True)
    for callback in (keeper, explicit):
        private.judge_after_evaluations(callback)
    looks, module = Looks(tmp_path, monkeypatch), Line()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=[Silent()],
        num_sanity_val_steps=0, callbacks=[looks, keeper, explicit], accumulate_grad_batches=2, val_check_interval=6,
        log_every_n_steps=2, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.ones(6, 1)), DataLoader(torch.ones(1, 1)))
    first, *answers = looks.answers
    assert first == 0
    assert [accumulating for accumulating, _, _ in answers] == [True, False] * 3
    assert [due for _, due, _ in answers] == [False] * 5 + [True]
    assert [steps for _, _, steps in answers] == [0, 0, 1, 1, 2, 2]
    assert module.evaluated == [0, 3]
    assert looks.rows == [2]
    assert looks.kept == [True]
    assert explicit._save_on_train_epoch_end is True
    assert looks.installed == 1
    private.count_last_step(trainer)
    assert private.batches_that_stepped(trainer) == trainer.global_step == 3
