"""The command line: LightningCLI with this project's classes, links and rules.

`maskvlm fit -c a.yaml -c b.yaml --model.task.image_mask_ratio 0.7`: later files override earlier ones, options override
files. Every class path in a file is a plug-in: there is no registry besides its base class.
"""

import re
import shutil
import sys
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from maskvlm.checkpoint.integrity import newest_valid
from maskvlm.checkpoint.io import load, save
from maskvlm.checkpoint.model_spec import ModelSpec, portable_yaml, task_yaml
from maskvlm.cli.ask_model import how_to_ask
from maskvlm.cli.from_checkpoint import (
    check_same_task,
    measured_on_scenes,
    parts_left_behind,
    recipe_of_another,
    with_start,
)
from maskvlm.cli.run_length import (
    check_interval,
    check_trainer,
    check_warmup,
    explain_interval_error,
    one_length,
    refuse_two_lengths,
    set_length,
)
from maskvlm.config.given_options import options
from maskvlm.config.parse_errors import explain_message
from maskvlm.config.parser import MODE, CommandParser, Complaint, old_name_lines, parsed, set_up_parsing
from maskvlm.config.safe_yaml import cut
from maskvlm.data.batch import Source
from maskvlm.data.examples import ExampleSource
from maskvlm.data.module import PairData
from maskvlm.training.attempts import attempted, forget
from maskvlm.training.checkpointing import LAST, KeepState, check_finite, ended_by_score
from maskvlm.training.failure import EARLIER, FIRST, failed_first, process_rank
from maskvlm.training.lightning_private import judge_after_evaluations
from maskvlm.training.lit import LitModel
from maskvlm.training.memory_estimate import AUTOCAST, StepSimulation, copies_gradients, estimate_memory
from maskvlm.training.precision import alone, cpu_precision
from maskvlm.training.process_watch import watch
from maskvlm.training.resume import may_go_on, newest_of
from maskvlm.training.run_record import RunRecord, SaveConfig, claim_folder, finish_run, foreign_origin, give_up_folder
from maskvlm.training.sharding import is_sharded
from maskvlm.utils.errors import ExitCode, UserError, check_least
from maskvlm.utils.launch import Stopped
from maskvlm.utils.lock import HELD
from maskvlm.utils.process_memory import keep_freed_memory
from maskvlm.utils.signals import CAUGHT
from maskvlm.utils.whole_files import read_json
from maskvlm.utils.write_errors import writing

COMMANDS = {
    "fit": "Train.",
    "validate": "Evaluate --ckpt_path on the validation split.",
    "test": "Evaluate --ckpt_path on the test split.",
}
AnyCommand = TypeVar("AnyCommand", bound="LightningCommand")


class LightningCommand(LightningCLI):
    """Parses the arguments, builds model, data and trainer, and runs the subcommand.

    Args:
        arguments: the subcommand and its options.
        start: the `ModelSpec` stored in the checkpoint of --from.
    """

    def __init__(self, arguments: list[str], start: ModelSpec | None = None) -> None:
        self.arguments, self.start = arguments, start
        self.claimed = False  # whether everything in the run's folder was written by this start
        # Lightning would show the first line of a docstring, in the middle of a sentence.
        about = {name: {"description": description} for name, description in COMMANDS.items()}
        super().__init__(
            LitModel,
            PairData,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            parser_class=CommandParser,
            parser_kwargs={"prog": "maskvlm", "parser_mode": MODE} | about,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # it would put class paths into checkpoints
            args=arguments,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        every = LightningCLI.subcommands()
        return {name: every[name] for name in COMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        description = "folder of the run, {run} in files; write --folder under torchrun, which takes --run for its own"
        parser.add_argument("--run", "--folder", type=str, default="checkpoints/run", help=description)
        description = (
            "with several processes: seconds without a sign of life before one counts as frozen (default: 120)"
        )
        parser.add_argument("--patience", type=float | None, default=None, help=description)
        description = "checkpoint to start from: its model, weights and tokenizer, and the heads that fit the task"
        parser.add_argument("--from", type=str | None, default=None, help=description)
        parser.link_arguments("from", "model.backbone.init_args.start")
        # The encoders' input spec is linked to the data; model and data share one seed and one accumulation.
        parser.link_arguments("model.backbone", "data.init_args.spec", compute_fn=input_spec, apply_on="instantiate")
        for encoder in ("image", "text"):
            parser.link_arguments("model.random_init", f"model.backbone.init_args.{encoder}.init_args.random_init")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.link_arguments("data", "model.task.init_args.labels", compute_fn=labels, apply_on="instantiate")
        parser.link_arguments("trainer.accumulate_grad_batches", "data.init_args.accumulate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Checked before --print_config ends the command.
        refuse_two_lengths(self.arguments)
        self.config = parsed(parser, one_length(self.arguments))
        for line in old_name_lines(self.arguments):
            warn(line)
        for line in parts_left_behind(self.start, self.settings.model.task):
            warn(line)
        other = None if self.start is None else recipe_of_another(self.start, self.arguments)
        if other is not None:
            warn(other)
        typed = {option.key for option in options(self.arguments)}
        refuse_linked(typed)
        refuse_idle(typed, self.settings.model.task)
        set_length(self.settings, typed)
        check_trainer(self.settings, typed)
        if self.config.subcommand == "fit":
            check_interval(self.settings)
            check_warmup(self.settings)

    @property
    def settings(self) -> Namespace:
        """The composed configuration of the subcommand."""
        return self.config[self.config.subcommand]

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning's version would replace the model's settings by those in the checkpoint."""

    def before_instantiate_classes(self) -> None:
        settings = self.settings
        folder = Path(settings.run)
        check_least(1, {"patience": settings.get("patience")})
        # 0 turns clipping off; a negative value would do so silently.
        check_least(0, {"trainer.gradient_clip_val": settings.trainer.gradient_clip_val})
        check_cards(settings.trainer)
        check_strategy(settings.trainer.strategy)
        if self.subcommand != "fit":
            settings.verbose = False  # Lightning's table of raw numbers; ours is printed by `Report`
        # An evaluation with --from measures that model; any other needs a checkpoint.
        if self.subcommand == "fit" or settings.get("ckpt_path") or settings["from"] is None:
            settings.ckpt_path = find_checkpoint(settings.get("ckpt_path"), folder, str(self.subcommand))
        if self.subcommand == "fit" and not settings.trainer.fast_dev_run:
            self._stand(settings, folder)
        # Remove the failure note of an earlier command only: another process of this one may have failed by now.
        if process_rank() == 0 and (not EARLIER or failed_first(folder) in EARLIER):
            folder.joinpath(FIRST).unlink(missing_ok=True)

    def _stand(self, settings: Namespace, folder: Path) -> None:
        """Claim the folder, and find the checkpoint that its run resumes from. An error leaves the folder untouched."""
        # Every process looks, which touches nothing; only the first takes the lock.
        named = settings.ckpt_path
        origin = None if named is None else foreign_origin(named, folder)
        own = named is not None and origin is None  # the checkpoint named is one of this folder's
        composed = self.composed()
        if not own:
            may_go_on(folder, composed, origin)
        if process_rank() == 0:
            HELD.take(folder, warn)
        if not own:
            # Checked again under the lock: another run may have trained here in between.
            settings.ckpt_path = newest_of(folder, composed, warn, origin) or named
            if settings.ckpt_path is None and process_rank() == 0:
                # Files that were there before, such as the settings of an earlier start, must not be removed.
                self.claimed = not folder.is_dir() or {path.name for path in folder.iterdir()} <= {"run.lock"}
                claim_folder(folder)

    def composed(self) -> str:
        """The configuration of a training run as YAML, with every default written out."""
        text: str = self._parser("fit").dump(self.settings, skip_none=False)
        return text

    def instantiate_classes(self) -> None:
        """Instantiate with `{run}` filled in. The saved configuration keeps `{run}`, so that it fits other folders."""
        settings = self.settings
        portable = settings.clone()
        if self.subcommand == "fit":
            portable.ckpt_path = None  # the checkpoint that this start resumes from is not a setting of the run
        self.save_config_kwargs = {"portable": portable}
        settings.trainer = fill_in(settings.trainer, settings.run)
        settings.trainer.default_root_dir = settings.run
        if self.subcommand != "fit":
            settings.trainer.logger = False  # Lightning's CSV logger would first delete the training's metrics.csv
        try:
            super().instantiate_classes()
        except BaseException:
            if self.claimed:
                give_up_folder(Path(settings.run))
            raise
        # Taken from the built model, as a checkpoint records the shape of its text encoder.
        written = portable.as_dict()
        self.model.model_yaml = portable_yaml(written, self.model.backbone.text.config)
        self.model.task_yaml = task_yaml(written["model"]["task"])

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """By default, use bf16 on a GPU that supports it, and on a CPU if it is faster there (`precision.py`)."""
        trainer = self.settings.trainer
        if trainer.precision is None:
            kwargs.setdefault("precision", self._precision(trainer))
        try:
            new_trainer = super().instantiate_trainer(**kwargs)
        except UserError:
            raise
        except (TypeError, ValueError, ImportError) as error:  # Lightning's errors for a wrong value
            raise wrong_trainer(error) from error
        except RuntimeError as error:
            if "more than one stateful callback" not in str(error):
                raise
            raise wrong_trainer(error) from error
        for callback in new_trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunRecord | SaveConfig):
                callback.goes_on = self.settings.get("ckpt_path") is not None
            if isinstance(callback, KeepState):
                callback.restores_signals = False  # signals are caught until the last evaluation has ended
        keep_profile(new_trainer, Path(self.settings.run))
        # Without evaluations, callbacks keep judging by what training logs.
        for callback in new_trainer.callbacks if new_trainer.limit_val_batches else ():  # type: ignore[attr-defined]
            judge_after_evaluations(callback)
        watch(new_trainer, Path(self.settings.run), self.settings.get("patience"))
        return new_trainer

    def _precision(self, trainer: Namespace) -> str | None:
        """The precision to use; None: single precision. Several processes on CPUs always use single precision, as each
        would choose its own. A resumed run keeps its precision on any machine: other rounding would change its losses.
        """
        if self.subcommand == "fit" and self.settings.get("ckpt_path") is not None:
            began = read_json(Path(self.settings.run) / "versions.json").get("precision")
            if began is not None:
                return "bf16-mixed" if began == "bf16-mixed" else None
        if trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
            # Emulated bf16 does not count as support.
            return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else None
        one = str(trainer.devices) in ("1", "auto") and trainer.num_nodes == 1 and alone()
        if trainer.accelerator not in ("auto", "cpu") or not one:
            return None
        image = self.model.backbone.image
        length = image.num_patches + image.vit.num_prefix_tokens
        return cpu_precision(image.vit.blocks[-1], length, image.vit.embed_dim, Path(self.settings.run))

    def before_validate(self) -> None:
        """Reject a checkpoint without the task's heads before anything is written, and warn if the data are the default
        and not those of the checkpoint. With --ckpt_path the heads are loaded later."""
        # Another package's data module need not have a source.
        source = getattr(self.datamodule, "source", None)
        if process_rank() == 0 and (line := measured_on_scenes(self.model.history_before, source)):
            warn(line)
        if self.settings.get("ckpt_path") is None:
            try:
                self.model.on_validation_start()
            except UserError:
                check_same_task(self.start, self.settings["from"], self.settings.model.task.class_path)
                raise

    before_test = before_validate

    def before_fit(self) -> None:
        """Print the predicted memory of a step before training starts."""
        trainer: Any = self.trainer
        if process_rank() == 0 and trainer.strategy.root_device.type == "cuda":
            self._tell_memory(trainer, torch.cuda.get_device_properties(trainer.strategy.root_device).total_memory)

    def _tell_memory(self, trainer: Any, card: int) -> None:
        """Print the predicted memory of a step. card: memory of the card in bytes.

        Raises:
            UserError: not even what is kept from step to step fits (69).
        """
        model, data, precision = self.model, self.datamodule, str(trainer.precision)
        # Only for pairs, whose batches all have the same shape, and strategies that keep all parameters on each card.
        pairs = isinstance(data, PairData) and isinstance(data.source, Source)
        whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if not (pairs and whole and precision in AUTOCAST):
            return
        share = max(1, data.share // trainer.world_size)
        simulation = StepSimulation(model.backbone, model.task, precision, data.captions)
        try:
            copied = trainer.world_size > 1 and copies_gradients(trainer.strategy)
            estimate = estimate_memory(simulation, share, model.chunk, card, copied)
        except Exception as error:  # a plug-in that reads the value of a fake tensor; the run itself may work
            print(f"note: the step's memory could not be simulated ({error})", file=sys.stderr, flush=True)
            return
        estimate.check()
        if estimate.fits:
            print(f"note: {estimate}", file=sys.stderr, flush=True)
        else:
            warn(f"{estimate}: {estimate.todo}")

    def after_fit(self) -> None:
        """Save the weights of the last step, then evaluate on the whole validation split, even if evaluations during
        training covered a part of it (limit_val_batches). If `EarlyStopping` ended the run, the best weights are
        evaluated. Metrics that were computed for the last step already are only reported. The last and the best
        checkpoint also get the known images (`LitModel.known_images`) that no evaluation has computed for them."""
        folder = Path(self.trainer.default_root_dir)
        # Asked now: evaluating the best weights restores the callback states stored with them.
        stopped = stopped_before_its_end(self.trainer)
        if self.trainer.checkpoint_callbacks and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            # Weights that are not finite must not become the last checkpoint.
            check_finite(self.trainer, folder)
            self.trainer.save_checkpoint(folder / LAST)
        if not self.trainer.fast_dev_run and self.trainer.limit_val_batches:  # type: ignore[attr-defined]
            limit = self.trainer.limit_val_batches
            in_part = isinstance(limit, int) or limit < 1  # 1 is one batch, 1.0 all of them
            self.trainer.limit_val_batches = 1.0
            if self.model.samples_after_training:
                self.model.known_images = self.model.known_images_by(self.model.state_dict())
                if self.trainer.checkpoint_callbacks:
                    self.trainer.save_checkpoint(folder / LAST)
            best, knew = best_of(self.trainer), self.model.known_images is not None
            if in_part or self.model.samples_after_training:
                # Before the best weights are evaluated: the record of that names their file by its hash.
                self._best_knows_as_much(folder)
            if best is not None:
                why = ", ".join(filter(None, map(ended_by_score, self.trainer.callbacks)))  # type: ignore[attr-defined]
                warn(f"{why}: stopped early at step {self.trainer.global_step}; evaluating {best}")
            self.model.repeats = best is None and not in_part and self.model.evaluated_at == self.trainer.global_step
            self.trainer.validate(self.model, self.datamodule, ckpt_path=best, verbose=False, weights_only=True)
            self.model.repeats = False
            # Save once more if these weights know more images now. The first save must not wait for the evaluation,
            # which may take long: if it is stopped, the last steps must not be lost.
            more = self.model.known_images is not None and (in_part or not knew)
            if more and best is None and self.trainer.checkpoint_callbacks:
                self.trainer.save_checkpoint(folder / LAST)
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if stopped is not None:
            forget(folder)  # it did not crash
            warn(f"{folder}: not finished: {stopped}")
            return
        # Must come last: a run that dies before this line is not finished, and resumes when it is started again.
        trainer: Any = self.trainer
        finish_run(folder, trainer.global_step, trainer.datamodule.total_steps)
        self._tell_end(folder)

    def _best_knows_as_much(self, folder: Path) -> None:
        """Rewrite the best checkpoint's known images to cover the whole validation split: when it was saved, they came
        from the beginning of the split only, or there were none. A checkpoint of sharded weights is left as it is."""
        trainer: Any = self.trainer
        best = Path(best_checkpoint(trainer) or folder / LAST)
        whole = not any(map(is_sharded, self.model.parameters()))
        if trainer.is_global_zero and best.name != LAST and best.is_file() and whole:
            content = load(best)
            if content.get("known_images") is not None or self.model.samples_after_training:
                save(content | {"known_images": self.model.known_images_by(content["state_dict"])}, best)
        trainer.strategy.barrier()

    def _tell_end(self, folder: Path) -> None:
        """Print where the weights are, of which step if not of the last one, and the command to try them."""
        best = Path(best_checkpoint(self.trainer) or folder / LAST)
        # Show the path as the user gave it; Lightning keeps absolute paths.
        best = folder / best.name if best.parent == folder.resolve() else best
        if best.is_file():  # false if checkpoints are turned off
            evaluated = self.trainer.limit_val_batches and best_of(self.trainer) is None
            last, step = self.trainer.global_step, load(best)["global_step"] if evaluated else None
            if step is not None and step != last:
                # Evaluating the best checkpoint gives other numbers than those that the run has just printed.
                print(
                    f"note: the numbers are of the last step, {last} ({LAST}); {best.name} has the weights of step "
                    f"{step}, the best of the evaluations along the way",
                    file=sys.stderr,
                )
            how = how_to_ask(self.model.task, best)
            print(f"{folder}: finished; {f'try it: {how}' if how else best}", file=sys.stderr, flush=True)

    def _run_subcommand(self, subcommand: str) -> None:
        on_cpu = self.trainer.strategy.root_device.type == "cpu"
        memory = keep_freed_memory() if on_cpu else nullcontext()
        # An evaluation or a trial run does not count as an attempt of the training in that folder.
        trains = subcommand == "fit" and not self.settings.trainer.fast_dev_run
        attempt = attempted(Path(self.settings.run)) if trains else nullcontext()
        saved = False
        try:
            with attempt, writing(self.settings.run), explain_interval_error(), memory:
                super()._run_subcommand(subcommand)
        except Stopped:
            saved = True
            raise
        except UserError:  # any other error leaves a report in the folder
            # With several processes the folder tells the others how this one ended.
            alone, begun = self.trainer.world_size == 1, self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
            if self.claimed and alone and not begun:
                give_up_folder(Path(self.settings.run))
            raise
        finally:
            CAUGHT.restore(ending=saved)
            HELD.release()


LINKED = {
    "model.backbone.start": "from=CHECKPOINT",
    "model.backbone.image.random_init": "--model.random_init",
    "model.backbone.text.random_init": "--model.random_init",
    "data.seed": "--seed_everything",
    "data.accumulate": "--trainer.accumulate_grad_batches",
}
"""Settings that another option sets -> that option. jsonargparse ignores a value given for them inside a class."""


def refuse_linked(typed: Collection[str]) -> None:
    """Raises UserError for a typed option that would have no effect, as another option sets it."""
    for key in LINKED:
        if key in typed:
            raise UserError(f"--{key}", "has no effect: another option sets it", f"Give {LINKED[key]}")


IDLE = {
    "image_masking": ("image_mask_ratio", "mask_block", "fully_masked_share"),
    "text_masking": ("text_mask_ratio", "text_mask_most", "whole_word", "keep_and_swap"),
}
"""Arguments of pre-training that take a custom masking -> arguments of the built-in masking that it makes unused."""


def refuse_idle(typed: Collection[str], task: Namespace) -> None:
    """Raises UserError for a typed option of the built-in masking if another masking is used. Files may set such
    options: recipes do, for runs without a custom masking."""
    arguments = task.get("init_args") or Namespace()
    for masking, names in IDLE.items():
        kind = arguments.get(masking)
        for name in names:
            # null turns off an unused option: a study's arms share such options.
            if kind and f"model.task.{name}" in typed and arguments.get(name) is not None:
                what = (
                    f"has no effect: {masking} is {kind['class_path'].rpartition('.')[2]}, which has its own settings"
                )
                raise UserError(f"--model.task.{name}", what, f"Set it there: --model.task.{masking}.NAME")


def stopped_before_its_end(trainer: L.Trainer) -> str | None:
    """For a run that ended with steps left: where and why it stopped, and how to resume it. None if the run reached its
    end or was ended by its score."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    step, steps = trainer.global_step, trainer.datamodule.total_steps  # type: ignore[attr-defined]
    if step >= steps or any(map(ended_by_score, callbacks)):
        return None
    where = f"stopped at step {step} of {steps}"
    remaining = [each.time_remaining() for each in callbacks if isinstance(each, Timer)]
    if any(seconds is not None and seconds <= 0 for seconds in remaining):
        return f"{where}: trainer.max_time was reached; repeat the command with a larger value to resume"
    if trainer.num_training_batches < steps * trainer.accumulate_grad_batches:
        return (
            f"{where}: limited by trainer.limit_train_batches or overfit_batches; without them it counts as another run"
        )
    return f"{where} by a callback; repeat the command to resume"


def best_of(trainer: L.Trainer) -> str | None:
    """The checkpoint to evaluate if `EarlyStopping` ended the run; otherwise None."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    # A run that reached its full length is evaluated with its last weights, whichever are best.
    early = trainer.global_step < trainer.datamodule.total_steps  # type: ignore[attr-defined]
    # A run stopped for another reason, such as trainer.max_time, is evaluated with its last weights, too.
    return best_checkpoint(trainer) if early and any(map(ended_by_score, callbacks)) else None


def best_checkpoint(trainer: L.Trainer) -> str | None:
    """The checkpoint with the best score so far; None if none is kept."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    keepers = (each for each in callbacks if isinstance(each, ModelCheckpoint) and each.best_model_path)
    return next((keeper.best_model_path for keeper in keepers), None)


class Parsed(LightningCommand):
    """Parses and checks the arguments without building anything."""

    def before_instantiate_classes(self) -> None:
        """Claims no folder."""

    def instantiate_classes(self) -> None:
        """Builds nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def wrong_trainer(error: Exception) -> UserError:
    """A one-line error for a value that passes the trainer's types but that Lightning rejects."""
    return UserError("trainer", cut(str(error), 300).rstrip("."), "Correct the keys of trainer")


def warn(text: str) -> None:
    """Print a one-line warning, from the first process only."""
    if process_rank() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def labels(data: Any) -> Any:
    """The labels that the head of a downstream task predicts."""
    return getattr(data, "labels", None)


def input_spec(backbone: Any) -> Any:
    """The encoders' input spec."""
    return backbone.input_spec


def fill_in(value: Any, run: str) -> Any:
    """`value` with every `{run}` in its strings replaced by the run's folder."""
    if isinstance(value, str):
        return value.replace("{run}", run)
    if isinstance(value, list):
        return [fill_in(part, run) for part in value]
    if isinstance(value, Namespace):
        return Namespace({key: fill_in(part, run) for key, part in vars(value).items()})
    return value


def check_cards(trainer: Namespace) -> None:
    """Check that the requested GPUs are there; warn if CUDA cannot use a GPU of this machine.

    Raises:
        UserError: there are too few GPUs (69).
    """
    asleep = torch.version.cuda is not None and not torch.cuda.is_available() and shutil.which("nvidia-smi") is not None
    if asleep and trainer.accelerator == "auto":
        warn("CUDA cannot be initialised although NVIDIA's tools are here: using the CPU; `maskvlm doctor` says why")
    if trainer.accelerator not in ("gpu", "cuda"):
        return
    count, devices = torch.cuda.device_count(), trainer.devices
    wanted = len(devices) if isinstance(devices, list) else int(devices) if str(devices).lstrip("-").isdigit() else 1
    if count < max(1, wanted):
        todo = "Use where=cpu (--trainer.accelerator cpu) or fewer devices"
        what = f"found {count} of {max(1, wanted)} GPUs"
        raise UserError("trainer.devices", what, todo, ExitCode.UNAVAILABLE)


def keep_profile(trainer: Any, folder: Path) -> None:
    """Write the report of `trainer.profiler` to the run's folder, unless it has a file of its own: Lightning would log
    it at a level that is not shown."""
    profiler = trainer.profiler
    if isinstance(profiler, SimpleProfiler | AdvancedProfiler | PyTorchProfiler) and profiler.filename is None:
        profiler.dirpath, profiler.filename = profiler.dirpath or str(folder), "profile"


def check_strategy(strategy: Any) -> None:
    """Raises UserError for a strategy that spawns or forks its processes from this one: objects built by then cannot be
    copied, and such processes could not be watched."""
    if isinstance(strategy, str) and re.search(r"_(spawn|fork|notebook)(_|$)", strategy):
        what = "spawns or forks its processes, which is not supported here"
        raise UserError(f"trainer.strategy={strategy}", what, "Use ddp, or a where= such as gpu8")


def find_checkpoint(name: str | None, folder: Path, command: str) -> str | None:
    """The file that `--ckpt_path` names: a path, or `last` or `best` of the run's folder.

    Raises:
        UserError: it does not exist (66), or an evaluation was requested without naming one (2).
    """
    if name is None:
        if command == "fit":
            return None
        raise UserError(command, "no checkpoint was given", "Give --ckpt_path FILE, or `last` or `best` of --folder")
    # Lightning would open a URL with fsspec and download the file.
    if "://" in name:
        raise UserError("--ckpt_path", f"{name} is an address", "Download the file first")
    if name == "last":
        newest = newest_valid(folder, warn)
        if newest is None:
            todo = "Check --folder, or leave --ckpt_path out"
            raise UserError(folder, "holds no checkpoint to resume from", todo, ExitCode.MISSING_INPUT)
        return str(newest)
    return str(folder / "best.ckpt") if name == "best" else name


def run_command(command: type[AnyCommand], arguments: list[str], allowed: Iterable[str] = ()) -> AnyCommand:
    """Run one command.

    Args:
        command: the class that handles them: LightningCommand, or Parsed to check only.
        arguments: the subcommand and its options.
        allowed: additional packages that class paths in files may come from.

    Raises:
        UserError: one line on what is wrong with the arguments.
    """
    set_up_parsing(arguments, allowed)
    try:
        with with_start(arguments, allowed) as (whole, start):
            return command(whole, start)
    except Complaint as complaint:  # explained in terms of what the user typed: the checkpoint's file is gone by now
        raise explain_message(complaint.message, complaint.known, complaint.siblings, arguments[1:]) from None


def built_source(settings: Namespace) -> Any:
    """The configured data set's reader, without model or trainer."""
    parser = CommandParser(parser_mode=MODE)
    parser.add_subclass_arguments((Source, ExampleSource), "source")
    return parser.instantiate(parser.parse_object({"source": settings.data.init_args.source})).source


def main(arguments: list[str], allowed: list[str]) -> int:
    """Run `fit`, `validate` or `test`; `arguments` begins with its name."""
    run_command(LightningCommand, arguments, allowed)
    return 0
