"""The only LightningModule: it sums and logs the task's losses without knowing what they are."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from torch.optim import Optimizer

from maskvlm.checkpoint.model_spec import backbone_yaml, spec_of_modules, task_yaml
from maskvlm.checkpoint.provenance import Origin, Provenance
from maskvlm.checkpoint.warm_start import LineageEntry, part, training_history_of
from maskvlm.config.plain_schema import describe_value
from maskvlm.data.batch import Batch, Source
from maskvlm.data.examples import ExampleBatch, ExampleSource
from maskvlm.data.module import PairData
from maskvlm.data.text import tokenizer_from_json, tokenizer_json
from maskvlm.model.attention_kernel import attend_by_products
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.image_ablation import ImageAblation
from maskvlm.objectives.novelty import evenly_spaced, mean_patch, sample_of
from maskvlm.objectives.task import Task, checked_metrics, checked_terms
from maskvlm.training.optim import begin_late, build_adamw, first_step, keep_settings, parameter_groups, schedule
from maskvlm.training.resume_check import check_resumable, restore
from maskvlm.training.sharding import gather_weights, is_sharded, release_weights, shard, unsharded
from maskvlm.utils.distributed import Draw, mix, rank
from maskvlm.utils.errors import ExitCode, UserError, check_counts, check_least, check_positive_shares

log = logging.getLogger(__name__)


def check_length(trainer: L.Trainer, data: PairData) -> None:
    """Check that a trainer's length matches the data's, which sets the length of a run and with it the order of the
    samples, the learning rate and the progress. The command line takes care of this.

    Raises:
        UserError: they differ.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if trainer.accumulate_grad_batches != data.accumulate:
        what = f"{trainer.accumulate_grad_batches}, and PairData(accumulate) is {data.accumulate}"
        raise UserError("Trainer(accumulate_grad_batches)", what, "Give both the same number")
    if trainer.max_epochs != 1:
        what = f"{trainer.max_epochs}, but a run is one epoch of Lightning"
        raise UserError("Trainer(max_epochs)", what, "Give 1, and set the length in PairData: steps or epochs")
    if trainer.max_steps != -1:
        what = f"{trainer.max_steps}, but the length of a run is the data's"
        raise UserError("Trainer(max_steps)", what, "Leave it out, and give PairData(steps=...)")


def check_source(task: Task, data: PairData) -> None:
    """Check that the data are of the kind that a task takes.

    Raises:
        UserError: pairs were given to a task that takes examples, or examples to one that takes pairs.
    """
    kinds = {Source: "pairs of images and captions", ExampleSource: "examples of a downstream task"}
    read_kind, given_kind = task.source_kind, next((kind for kind in kinds if isinstance(data.source, kind)), None)
    if read_kind is not None and given_kind is not None and given_kind != read_kind:
        what = f"{type(data.source).__name__} gives {kinds[given_kind]}, {type(task).__name__} needs {kinds[read_kind]}"
        raise UserError("data.source", what, "Choose data for the task")


def check_data_labels(task: Task, data: PairData) -> None:
    """Check that a task's labels are those of its data, in the same order: the targets of a batch have one column for
    each label of the data. The command line passes them on; a script gives them itself.

    Raises:
        UserError: they differ.
    """
    own, theirs = getattr(task, "labels", None), data.labels
    # A head that writes its answers has no outputs to mix up. Data without labels have a task of its own, which may
    # divide numbers into classes.
    if not isinstance(own, list | tuple) or not theirs or not task.heads_of_labels():
        return
    # Checkpoints store them as strings.
    own, its = [str(label) for label in own], [str(label) for label in theirs]
    if own == its:
        return
    pairs = enumerate(zip_longest(own, its), 1)
    place, (first, other) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
    what = f"the task's {len(own)} are not the data's {len(its)}: label {place} is {first!r:.60}, not {other!r:.60}"
    raise UserError(f"{type(task).__name__}(labels)", what, "Give the data's own: labels=data.labels")


def check_spec(backbone: MaskVLM, data: PairData) -> None:
    """Check that the data are prepared as the model reads them: with another size, colour scale or text length, every
    metric would be wrong, or the first pass would fail.

    Raises:
        UserError: `PairData(spec)` is another model's. (The tokenizer is checked by `set_tokenizer`.)
    """
    for name in ("image_size", "mean", "std", "text_length"):
        theirs, own = getattr(data.spec, name), getattr(backbone.input_spec, name)
        if theirs != own:
            what = f"{name} is {theirs}, and the model's {own}"
            raise UserError("PairData(spec)", what, "Give the model's own: PairData(spec=model.backbone.input_spec)")


def check_labels(task: Task, theirs: Sequence[str] | None, path: str) -> None:
    """Check that the labels of a checkpoint's head are the task's, which come from the data. With another order, or
    other labels of the same number, every metric would be wrong.

    Args:
        theirs: labels of the checkpoint; None if it has none.
        path: path of the checkpoint.

    Raises:
        UserError: they differ, and the task has heads that depend on them (65).
    """
    # Checkpoints store them as strings.
    labels = None if getattr(task, "labels", None) is None else [str(label) for label in task.labels]  # type: ignore[union-attr]
    if theirs is None or labels is None or not task.heads_of_labels() or [*theirs] == labels:
        return
    pairs = enumerate(zip_longest(theirs, labels), 1)
    place, own, other = next((place, own, other) for place, (own, other) in pairs if own != other)
    what = f"its head predicts {len(theirs)} labels, which are not the data's {len(labels)}: label {place} is"
    what += f" {_shown(own)} in the checkpoint and {_shown(other)} in the data"
    todo = "Evaluate it on data with its own labels, such as the answers file in its run's folder"
    raise UserError(path, what, todo, ExitCode.BAD_DATA)


def _shown(label: str | None) -> str:
    return "missing" if label is None else describe_value(label)


def class_path(kind: type) -> str:
    """Import path of a class, as used in configurations."""
    return f"{kind.__module__}.{kind.__qualname__}"


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of all gradients, including those sharded over processes."""
    return unsharded(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


class StepJudge(Protocol):
    """Interface of an object that checks a step before it is made (`step_guard.StepGuard`)."""

    def judge(self, optimizer: Optimizer, norm: Tensor, scaled: bool) -> None:
        """Let the coming update through, or turn it into a no-op; see `step_guard.StepGuard.judge`."""
        ...


class LitModel(L.LightningModule):
    """A backbone, a task, and how they are optimised.

    Args:
        backbone: the two encoders and the two cross encoders.
        task: pre-training or a downstream task; its heads are built here if it has none.
        lr: peak learning rate of cross encoders, decoder and heads (3e-4, P).
        lr_encoders: peak learning rate of the two encoders (1e-5, P).
        weight_decay: weight decay of weight matrices (0.05, P).
        betas: betas of AdamW (C).
        warmup: length of the warm-up, as a share of the steps in which a parameter is trained (the whole run, except
            for tasks with phases, see `Task.late`) or, from 1 on, as a number of steps (paper: 5 of 50 epochs).
        min_lr: final learning rate of the cosine (3e-5, R); a rate with a lower peak keeps its peak after warm-up.
        stable: share of the steps after warm-up in which the rates stay at their peak before the cosine begins, 0 to
            below 1 (warm-up, stable, decay, as in 2404.06395; paper: 0).
        seed: seed of masks, negatives and dropout, which it determines together with the step.
        lr_cross: peak learning rate of the two cross encoders; None uses `lr` (fine-tuning: the encoders' rate, R).
        random_init: start both encoders from random weights; the command line passes it on to them.
        layer_decay: learning rate of an encoder block, as a share of that of the block above it (1: all alike).
        chunk: pairs that a process computes at a time; None: all. The losses are those of the whole batch, memory is
            that of one chunk plus the batch's features, and a step costs a third more, see `objectives/chunks.py`.
        compile: compile the blocks for training steps, see `training/compiled.py`; evaluations are not compiled. The
            first step takes a minute or more.

    Raises:
        UserError: a number is out of range, the backbone or task is not of its class, or `chunk` is given and the task
            does not support it.
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
        lr_cross: float | None = None,
        layer_decay: float = 1.0,
        chunk: int | None = None,
        compile: bool = False,
        stable: float = 0.0,
    ) -> None:
        super().__init__()
        check_least(0, {"model.lr": lr, "model.lr_encoders": lr_encoders, "model.weight_decay": weight_decay})
        check_least(0, {"model.lr_cross": lr_cross})
        check_counts(1, {"model.chunk": chunk})
        check_least(0, {"model.warmup": warmup, "model.min_lr": min_lr})
        if not 0 <= stable < 1:
            raise UserError("model.stable", f"{stable} is out of range", "Give a number from 0 to below 1")
        check_positive_shares({"model.layer_decay": layer_decay})
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise UserError("model.betas", f"{list(betas)} are not decay rates", "Give two numbers from 0 to below 1")
        if not isinstance(backbone, MaskVLM) or not isinstance(task, Task):
            what = f"{type(backbone).__name__} and {type(task).__name__} were given"
            raise UserError("LitModel", what, "Give a backbone (maskvlm.model.maskvlm.MaskVLM), then a task")
        self.backbone, self.task = backbone, task
        self.lr, self.lr_encoders, self.weight_decay, self.betas = lr, lr_encoders, weight_decay, betas
        self.lr_cross, self.layer_decay, self.chunk = lr_cross, layer_decay, chunk
        self.compiled = compile  # `compile` is a method of modules
        self.warmup, self.stable, self.min_lr, self.seed = warmup, stable, min_lr, seed
        self.metrics: dict[str, float] = {}
        self.model_yaml: str | None = None
        self.task_yaml: str | None = None
        self._entry: LineageEntry | None = None
        self._known_images: Tensor | None = None
        self._loaded: tuple[LineageEntry, ...] | None = None
        self._before: tuple[LineageEntry, ...] | None = None  # of trainings of this backbone in this process
        self.trained = False
        self.measured_step: int | None = None  # step of the weights being evaluated; None: this run's current step
        self.evaluated_at: int | None = None  # step of the last evaluation within a training
        self.repeats = False  # the evaluation repeats that one: its metrics hold
        self.guard: StepJudge | None = None
        self.terms: tuple[str, ...] = ()  # names of the loss terms of the latest step
        self.weighted_S: Tensor | None = None  # their values, weighted
        self.has_gradient: dict[str, bool] = {}  # of each term, when it first appeared
        # The heads must exist before those of a checkpoint are loaded.
        new = task.build_once(backbone)
        self.counts_words = new  # whether the heads still need the token frequencies
        if chunk is not None:
            task.compute_in_chunks(chunk)
        self.warm_started = self._warm_start() if new else set(task.state_dict())
        self.train()  # Lightning keeps the mode, and a loaded model is in evaluation mode

    def _warm_start(self) -> set[str]:
        """Load the heads of the checkpoint that the backbone starts from, except those for other labels."""
        origin, labels = self.backbone.origin, getattr(self.task, "labels", None)
        if origin is None:
            # A task that needs a checkpoint's heads says so.
            return self.task.warm_start({})
        heads = origin.heads
        if origin.labels is not None and labels is not None and origin.labels != tuple(labels):
            others = self.task.heads_of_labels()
            heads = {name: value for name, value in heads.items() if not name.startswith(others)}
        # The module keeps no second copy of the heads' tensors.
        self.backbone.origin = origin._replace(heads={})
        # Log a note if a loss of the same task has been left out, but not if another task does not use the heads.
        same_task = bool(origin.history) and origin.history[-1].task == class_path(type(self.task))
        unused = {name.partition(".")[0] for name in origin.heads} - {name for name, _ in self.task.named_children()}
        if same_task and unused and rank() == 0:
            todo = "to keep training them, give their losses a weight or list them in model.task.losses"
            log.warning("%s", f"note: unused heads of the checkpoint: {', '.join(sorted(unused))}; {todo}")
        return self.task.warm_start(heads)

    @property
    def provenance(self) -> Provenance:
        """Where every tensor comes from, heads included."""
        own = self.task.state_dict()
        source = self.backbone.origin.path if self.backbone.origin else ""
        heads = Provenance({name: Origin("loaded", tuple(own[name].shape), source) for name in self.warm_started})
        return (self.backbone.provenance.under("backbone") | heads.under("task")).complete(self)

    def setup(self, stage: str) -> None:
        """Set the data's tokenizer, and whatever else the start of a run needs from the data.

        Raises:
            UserError: there is no PairData; the data are of another kind than the task takes; the lengths contradict
                each other; a feature cache was requested for images that are augmented or streamed.
        """
        self.trained |= stage == "fit"
        if stage == "fit":
            # Left over from an earlier training of this model.
            self.measured_step, self.evaluated_at, self._entry = None, None, None
            self._before, self._loaded = self.backbone.trained_on or self._loaded, None
        elif self.trainer.global_step == 0 and self.history:  # weights trained by another run or trainer are evaluated
            self.measured_step = self.history[-1].steps
        if not isinstance(self.data, PairData):
            raise UserError("trainer", "has no PairData", "Pass one: trainer.fit(model, PairData(...))")
        check_source(self.task, self.data)
        check_spec(self.backbone, self.data)
        if stage == "fit":
            check_data_labels(self.task, self.data)  # an evaluation compares words
            check_length(self.trainer, self.data)
            self.task.freeze_unreached(self.backbone)
        # Before an evaluation too, so that it uses the same attention as the run.
        if self.trainer.strategy.root_device.type == "cpu" and str(self.trainer.precision) == "bf16-mixed":
            attend_by_products(self)
        tokenizer = getattr(self.data, "tokenizer", None)
        if tokenizer is not None:
            self.backbone.text.set_tokenizer(tokenizer)
        if stage == "fit":
            if self.counts_words:
                # Once: a second training would overwrite what the first one learned.
                self.task.use_token_counts(self.data.token_counts)
                self.counts_words = False
            if self.backbone.image.feature_cache is not None:
                self._open_feature_cache()

    def configure_model(self) -> None:
        """Shard the weights if the trainer's strategy does so (`sharding.py`); called before each fit and evaluation.

        Raises:
            UserError: `compile` is set as well.
        """
        if self.device_mesh is not None and not isinstance(self, FSDPModule):
            if self.compiled:
                what = "blocks cannot be compiled while weights are sharded"
                raise UserError("model.compile", what, "Set it to false, or use a `where` without shards")
            shard(self, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Compile the blocks if requested. Log a note if a batch is split into passes (the contrastive loss then
        compares only the pairs of a pass), if a pass has a single image, and if a batch is larger than the data set."""
        if self.compiled:
            from maskvlm.training.compiled import compile_blocks  # it loads torch's compilers, which takes a second

            compile_blocks(self)
        passes, batch = self.data.accumulate, self.data.batch_size
        if passes > 1 and self.task.compares_examples and rank() == 0:
            what = f"gradients are accumulated over {passes} passes, so contrast and hard negatives use only the"
            what += (
                f" {batch // passes} pairs of each pass, not all {batch}; with model.chunk instead they use all of them"
            )
            log.warning("%s", f"note: {what}")
        if self.data.share == 1 and self.task.compares_examples and rank() == 0:
            what = "note: a pass has one image: contrast has no other to compare it with, and matching no negative,"
            log.warning("%s", f"{what} unless from a queue; give a larger --data.batch_size")
        rows = len(self.data.splits["train"])  # 0 for a streamed set, whose size is not known
        if 0 < rows < batch and rank() == 0:
            kind, steps = "images" if self.data.labels is None else "examples", self.data.total_steps
            what = f"a batch of {batch} is larger than the {rows} training {kind}: a step shows each of them"
            what += f" {batch / rows:.1f} times, and the run has {steps} step{'' if steps == 1 else 's'}"
            log.warning("%s", f"note: {what}; give a smaller --data.batch_size")

    def _open_feature_cache(self) -> None:
        """Open the cache of the frozen blocks' features. Raises UserError if images are augmented or streamed."""
        versions = self.data.versions
        if versions is None:
            what = "an augmented image looks different each time, so its features cannot be cached"
            todo = "Set data.augment to false or mirror, or model.backbone.image.feature_cache to null"
            raise UserError("model.backbone.image.feature_cache", what, todo)
        train = self.data.splits["train"]
        if not len(train):
            what, todo = (
                "rows of a streamed set have no row numbers",
                "Set it to null, or prepare the set with maskvlm data",
            )
            raise UserError("model.backbone.image.feature_cache", what, todo)
        # An example of NLVR has two images.
        rows = len(train) * versions * getattr(self.task, "images_per_example", 1)
        image = self.backbone.image
        # What features depend on besides the frozen weights, which the cache adds itself.
        # The fingerprint of examples covers their texts and image names, but the image files may have changed since.
        photos = getattr(train, "image_identity", "")
        follows = (train.fingerprint, photos, image.name, image.config, image.image_size, image.mean, image.std)
        # Caches of earlier versions, which did not mirror, keep their names.
        follows = (*follows, str(self.trainer.precision), *(["mirrored"] if versions == 2 else []))
        image.frozen_blocks.open_cache(repr(follows), rows)

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int) -> None:
        """Record on the backbone the data it was trained on, so that later uses report it even if this run dies."""
        self.backbone.trained_on = self.history

    def on_validation_start(self) -> None:
        """Check that all heads are there, as an evaluation needs them. A training may start without them, and a loaded
        checkpoint brings them all."""
        if not self.trained and self._loaded is None and self.backbone.origin is not None:
            self._check_heads(self.backbone.origin.path)
        if not self.repeats:
            self.task.begin_evaluation()
        gather_weights(self)

    def on_validation_end(self) -> None:
        release_weights(self)

    on_test_start, on_test_end = on_validation_start, on_validation_end

    def _check_heads(self, path: str) -> None:
        missing = [name for name, _ in self.task.named_parameters() if name not in self.warm_started]
        if not missing:
            return
        check_labels(self.task, None if self.backbone.origin is None else self.backbone.origin.labels, path)
        name = type(self.task).__name__
        what = f"holds no heads of {name} ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})"
        todo = "Fine-tune it first: maskvlm finetune ... from=this file; or name the task that it was fine-tuned on"
        raise UserError(path, what, todo, ExitCode.BAD_DATA)

    @property
    def data(self) -> PairData:
        """The trainer's data module."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        encoders = (self.backbone.image, self.backbone.text)
        rates = (self.lr, self.lr_encoders, self.weight_decay, self.lr_cross, self.layer_decay)
        share, late, stopping = self.task.training_phases(self.backbone)
        groups = parameter_groups(self.backbone, encoders, self.task, *rates, late, stopping)
        # Only fused kernels read the guard's flag. In float16 Lightning unscales gradients before they are clipped,
        # which it does not do for a fused optimiser.
        optimizer = build_adamw(groups, self.betas, fused=not self.scales_gradients)
        # Not Lightning's `estimated_stepping_batches`, which builds the loaders in order to count.
        total = self.data.total_steps
        self.late_step = first_step(share, total)
        self.check_phases(groups, total)
        scheduler = schedule(optimizer, total, self.warmup, self.min_lr, self.late_step, self.stable)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def check_phases(self, groups: Sequence[Mapping[str, Any]], total: int) -> None:
        """Check that each part of the model is trained for longer than its warm-up; logs a warning if a part is not
        trained at all, or if the learning rate never falls.

        Raises:
            UserError: a warm-up given in steps is longer than the part of the run in which some parameters are trained.
        """
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        late = any(group.get("late") for group in groups)
        lengths = {total}
        lengths |= {total - self.late_step} if late else set()
        lengths |= {self.late_step} if any(group.get("stopping") for group in groups) else set()
        shortest = min(length for length in lengths if length)
        if self.warmup >= 1 and self.warmup > shortest:
            what = f"{self.warmup:g} steps, but some parameters are trained for {shortest} of the run's {total}"
            raise UserError("model.warmup", what, f"Give at most {shortest}, or a share below 1")
        if late and self.late_step == total and rank() == 0:
            what = f"warning: the first phase takes all {total} steps; losses that start after it are not trained"
            log.warning("%s", f"{what}, and what they measure is chance. Give more steps, or a smaller share to it")
        # The encoders' lower rates stay at their peak on purpose, as in the paper.
        if 0 < self.lr < self.min_lr and rank() == 0:
            what = f"warning: model.min_lr {self.min_lr:g} is above model.lr {self.lr:g}: the rate will not fall"
            log.warning("%s", f"{what} after its warm-up. Give model.min_lr, such as {self.lr / 10:g}")

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients are scaled up until the optimiser's step: only in float16."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients, also for a fused optimiser in bfloat16: Lightning refuses this, although nothing is scaled
        there. Clipping by norm and the guard share one norm, so there is a single pass over the gradients."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        by_norm = GradClipAlgorithmType(gradient_clip_algorithm or "norm") == GradClipAlgorithmType.NORM
        limit = gradient_clip_val or 0.0
        if limit > 0 and by_norm:
            # The norm before clipping. If it is not finite the gradients are unusable, and a guard skips the step.
            norm = gradient_norm(parameters)
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        elif self.guard is not None:
            # Before clipping by value, which would hide an infinite gradient.
            norm = gradient_norm(parameters)
        if limit > 0 and not by_norm:
            nn.utils.clip_grad_value_(parameters, limit)
        if self.guard is not None:
            self.guard.judge(optimizer, norm, self.scales_gradients)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.trainer.global_step == self.late_step:
            begin_late(self.trainer.optimizers[0])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # Random numbers depend on (seed, pass) alone, so a resumed run draws what it would have drawn without stopping.
        torch.manual_seed(mix(self.seed, batch_idx, rank()))
        # batch_idx counts over the whole run, which is one epoch to the trainer (conf/base.yaml, data/sampler.py).
        self.task.set_uniform(Draw(self.seed, batch_idx, self.device))
        self.task.run_progress = self.trainer.global_step / max(1, self.data.total_steps)
        terms = checked_terms(self.task, self.task(self.backbone, batch))
        self.terms = tuple(terms)
        if self.known_images is not None:
            self.known_images = None  # computed with the weights before this step
        for name, term in terms.items():
            self.has_gradient.setdefault(name, term.requires_grad)
        weighted_S = torch.stack([self.task.weights.get(name, 1.0) * term for name, term in terms.items()])
        self.weighted_S = weighted_S.detach()
        loss = weighted_S.sum()
        # Logged unweighted, so that each can be compared with its chance level.
        logged = {f"train/{name}": term.detach() for name, term in terms.items()}
        self.log_dict(logged | {"train/loss": loss.detach()}, batch_size=len(batch.valid_B))
        return loss

    # Evaluations have other sizes, modes and masks, and would be compiled again.
    @torch.compiler.set_stance("force_eager")
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not self.repeats:
            self.task.update(self.backbone, batch)

    @torch.compiler.set_stance("force_eager")
    def on_validation_epoch_end(self) -> None:
        trains = self.trainer.state.fn == TrainerFn.FITTING
        if not self.repeats:
            with self.trainer.precision_plugin.val_step_context():  # Lightning opens it only for steps
                metrics = self.task.compute(self.backbone)
            self.metrics = checked_metrics(self.task, metrics, trains)
        if trains:
            self.evaluated_at = self.trainer.global_step
        # Every process already has the global metrics, so there is nothing to average.
        self.log_dict(self.metrics, sync_dist=False)

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *_: Any, **__: Any) -> "LitModel":
        """Not supported: Lightning would build the classes named in the file, and this project's files name none.

        Raises:
            UserError: always; the message says how to build a model from the file (2).
        """
        what = "holds only data: LitModel.load_from_checkpoint has no arguments to build a model with"
        todo = "MaskVLM.from_pretrained(path) builds it: its .backbone and .task are those of LitModel(backbone, task)"
        raise UserError(str(checkpoint_path), what, todo)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # What a reader of this one file needs besides the tensors: tokenizer, model spec, labels, training history.
        if self.backbone.text.tokenizer is not None:
            checkpoint["tokenizer"] = tokenizer_json(self.backbone.text.tokenizer)
        if self.model_yaml is None and (spec := spec_of_modules(self.backbone, self.task)) is not None:
            # When used without the command line, which takes it from the configuration.
            self.model_yaml = backbone_yaml(spec)
            self.task_yaml = None if spec.task is None else task_yaml(spec.task)
        if self.model_yaml is not None:
            checkpoint["model"] = self.model_yaml
        if self.task_yaml is not None:
            checkpoint["task"] = self.task_yaml
        if getattr(self.task, "labels", None) is not None:
            checkpoint["labels"] = [str(label) for label in self.task.labels]  # type: ignore[union-attr]
        checkpoint["lineage"] = [entry.plain() for entry in self.history]
        if self.known_images is not None:
            checkpoint["known_images"] = self.known_images
        if state := self.task.resume_state():
            checkpoint["task_state"] = state

    @property
    def known_images(self) -> Tensor | None:
        """Features of validation images, used to tell which inputs are far from the model's data (`novelty.py`); None
        if none were computed with the current weights."""
        return self._known_images if self._measure is None else self._measure.known_images

    @known_images.setter
    def known_images(self, feature_ND: Tensor | None) -> None:
        if self._measure is None:
            self._known_images = feature_ND
        else:
            self._measure.known_images = feature_ND

    @property
    def _measure(self) -> Any:
        """The task's metrics, if their evaluation computes features of the images (pre-training's does)."""
        measure = getattr(self.task, "measure", None)
        return measure if hasattr(measure, "known_images") else None

    @property
    def samples_after_training(self) -> bool:
        """Whether `known_images` has to be computed after training: pre-training's evaluations do it themselves, and a
        control that sees no images has none. False for sharded weights."""
        sees_images = not any(isinstance(part, ImageAblation) for part in self.task.modules())
        return self._measure is None and sees_images and not any(map(is_sharded, self.parameters()))

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # as evaluations
    def known_images_by(self, state: Mapping[str, Tensor]) -> Tensor:
        """Features of images spread over the validation split, computed with the weights of a checkpoint; each image
        counts once, however many examples are about it.

        Args:
            state: the `state_dict` of a checkpoint of this model.
        """
        device, image = self.trainer.strategy.root_device, self.backbone.image.to(self.trainer.strategy.root_device)
        weights = {name: value.to(device) for name, value in part(state, "backbone.image.").items()}
        loader = self.data.validation_rows(evenly_spaced(len(self.data.splits["val"])))
        features, was_training = dict[int, Tensor](), image.training
        image.eval()
        with self.trainer.precision_plugin.val_step_context():
            for batch in loader:
                batch = self.data.normalised(self.data.transfer_batch_to_device(batch, device, 0))
                if isinstance(batch, ExampleBatch):
                    # (B, P, 3, H, W) -> (B * P, 3, H, W)
                    image_BCHW, id_B = batch.image_BPCHW.flatten(0, 1), batch.image_id_BP.flatten()
                else:
                    image_BCHW, id_B = batch.image_BCHW, batch.image_id_B
                feature_BD = mean_patch(functional_call(image, weights, (image_BCHW,))).cpu()
                for number, feature_D in zip(id_B.tolist(), feature_BD, strict=True):
                    features.setdefault(number, feature_D)
        image.train(was_training)
        return sample_of(torch.stack([*features.values()]))

    @property
    def history_before(self) -> tuple[LineageEntry, ...]:
        """The data that the weights had seen before this run; if it trains nothing, as recorded in a checkpoint."""
        for known in (self._loaded, self._before):
            if known is not None:
                return known
        return self.backbone.origin.history if self.backbone.origin else ()

    @property
    def history(self) -> tuple[LineageEntry, ...]:
        """The data that the weights have seen so far."""
        if self.trained and self.trainer.global_step > 0:
            return (*self.history_before, self._own_entry())
        # The trainer has made no step: an evaluation after a training by another trainer, or before the first step.
        known = self.backbone.trained_on
        return self.history_before if known is None else known

    def _own_entry(self) -> LineageEntry:
        """This run's training data; its ids are hashed once."""
        if self._entry is None:
            kind, source = type(self.task), type(self.data.source)
            ids = self.data.hashed_image_ids("train")
            images = len(self.data.splits["train"]) if ids is None else len(ids)
            task, data = class_path(kind), class_path(source)
            sha, held_out = self.data.splits["train"].fingerprint, self.data.left_out()
            self._entry = LineageEntry(task, data, sha, images, 0, ids, held_out)
        # For a run that `EarlyStopping` ended, the best weights are evaluated.
        return self._entry._replace(steps=self.measured_step or self.trainer.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the state that Lightning will restore against this run before any of it is. Raises UserError (65)."""
        # Without a trainer the property `trainer` raises.
        path = "checkpoint" if self._trainer is None else str(self.trainer.ckpt_path)
        check_labels(self.task, checkpoint.get("labels"), path)
        if self.trained and self.trainer.state.fn == TrainerFn.FITTING:
            optimizer_config = self.configure_optimizers()
            optimizer: Any = optimizer_config["optimizer"]
            scheduler: Any = optimizer_config["lr_scheduler"]["scheduler"]  # type: ignore[index]
            check_resumable(checkpoint, self.trainer, optimizer, scheduler)
            keep_settings(checkpoint["optimizer_states"], checkpoint["lr_schedulers"], optimizer, scheduler)
            if "task_state" in checkpoint:
                restore(self.task, checkpoint["task_state"], str(self.trainer.ckpt_path))
        if "tokenizer" in checkpoint:
            self.backbone.text.set_tokenizer(tokenizer_from_json(checkpoint["tokenizer"]))
        if self._trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            self.measured_step = checkpoint.get("global_step")
        self.known_images = checkpoint.get("known_images")  # until the next step or evaluation
        history = self.backbone.trained_on = training_history_of(checkpoint)
        # Not for a trainer that evaluates what another one has trained: it adds no entry.
        adds_own = self.trained and (self.trainer.state.fn == TrainerFn.FITTING or self.trainer.global_step > 0)
        if adds_own and history and history[-1][:3] == self._own_entry()[:3]:
            history = history[:-1]  # a resumed run writes its own entry again
        self._loaded = history
