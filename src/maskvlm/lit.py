"""The only LightningModule: it sums and logs the task's losses, and knows none of them."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from maskvlm.data.batch import Batch
from maskvlm.data.module import PairData
from maskvlm.data.text import tokenizer_from_json, tokenizer_json
from maskvlm.distributed import Draw, mix, rank
from maskvlm.errors import UserError, check_least
from maskvlm.model import MaskVLM
from maskvlm.optim import build_adamw, parameter_groups, schedule
from maskvlm.task import Task


class LitModel(L.LightningModule):
    """A backbone, a task, and how they are optimised.

    Args:
        backbone: the two encoders and the two cross encoders.
        task: pre-training or a downstream task; its heads are built here.
        lr: peak learning rate of cross encoders, decoder and heads (3e-4, P).
        lr_encoders: peak learning rate of the two encoders (1e-5, P).
        weight_decay: of weight matrices (0.05, P).
        betas: of AdamW (C).
        warmup: share of the run's steps, or a number of steps from 1 on (paper: 5 of 50 epochs).
        min_lr: where the cosine ends (3e-5, R).
        seed: of masks, negatives and dropout; together with the step it determines them.
        random_init: both encoders start from random weights; the command line hands it on to them.
    """

    def __init__(
        self,
        backbone: MaskVLM,
        task: Task,
        lr: float = 3e-4,
        lr_encoders: float = 1e-5,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: float = 0.1,
        min_lr: float = 3e-5,
        seed: int = 0,
        random_init: bool = False,
    ) -> None:
        super().__init__()
        check_least(0, model__lr=lr, model__lr_encoders=lr_encoders, model__weight_decay=weight_decay)
        check_least(0, model__warmup=warmup, model__min_lr=min_lr)
        if not all(0 <= beta < 1 for beta in betas):
            raise UserError("model.betas", f"{list(betas)} are no decay rates", "Give two numbers from 0 to below 1")
        self.backbone, self.task = backbone, task
        self.lr, self.lr_encoders, self.weight_decay, self.betas = lr, lr_encoders, weight_decay, betas
        self.warmup, self.min_lr, self.seed = warmup, min_lr, seed
        self.metrics: dict[str, float] = {}
        task.build(backbone)

    def setup(self, stage: str) -> None:
        tokenizer = getattr(self.data, "tokenizer", None)
        if tokenizer is not None:
            self.backbone.text.set_tokenizer(tokenizer)

    @property
    def data(self) -> PairData:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        encoders = (self.backbone.image, self.backbone.text)
        groups = parameter_groups(self.backbone, encoders, self.task, self.lr, self.lr_encoders, self.weight_decay)
        optimizer = build_adamw(groups, self.betas, fused=not self.scales_gradients)
        total = self.data.total_steps
        warmup = int(self.warmup if self.warmup >= 1 else self.warmup * total)
        scheduler = schedule(optimizer, total, warmup, self.min_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients are larger than they should be until the optimiser's step: in float16 alone."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip also for a fused optimiser in bfloat16: Lightning refuses, though nothing is scaled there."""
        if self.scales_gradients:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            how = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(self.trainer.precision_plugin, optimizer, gradient_clip_val or 0.0, how)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # Random numbers follow from (seed, pass) alone: a run that goes on later draws what it would have drawn.
        torch.manual_seed(mix(self.seed, batch_idx, rank()))
        self.task.reseed(Draw(self.seed, batch_idx, self.device))
        terms = self.task(self.backbone, batch)
        loss = torch.stack([self.task.weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
        logged = {f"train/{name}": term.detach() for name, term in terms.items()}
        self.log_dict(logged | {"train/loss": loss.detach()}, batch_size=len(batch.image_BCHW))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.task.update(self.backbone, batch)

    def on_validation_epoch_end(self) -> None:
        self.metrics = self.task.compute(self.backbone)
        self.log_dict(self.metrics, sync_dist=False)

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.backbone.text.tokenizer is not None:
            checkpoint["tokenizer"] = tokenizer_json(self.backbone.text.tokenizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "tokenizer" in checkpoint:
            self.backbone.text.set_tokenizer(tokenizer_from_json(checkpoint["tokenizer"]))
