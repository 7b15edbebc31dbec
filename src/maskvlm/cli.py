"""The command line: LightningCLI with this project's classes, links and rules.

`python -m maskvlm fit -c a.yaml -c b.yaml --model.task.image_mask_ratio 0.7`: later files win, then options.
Every class path in a file is a plug-in: its base class is the whole registry.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from maskvlm.config import NEVER, check_yaml, resolve, trusted_packages
from maskvlm.errors import ExitCode, UserError
from maskvlm.explain import explain
from maskvlm.failure import FIRST, process_rank
from maskvlm.lit import LitModel
from maskvlm.run import SaveConfig, claim
from maskvlm.verify import newest_valid

COMMANDS = {
    "fit": "train; evaluates along the way and at the end",
    "validate": "measure a checkpoint on the validation split",
    "test": "measure a checkpoint on the test split",
}
# Said on every run by versions that fit each other; none of them is about what the user did.
KNOWN_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*`?set_vital`? is deprecated.*",
    r".*does not have many workers.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Experiment logs directory .* exists.*",
    r".*The number of training batches .* is smaller than the logging interval.*",
)


class Complaint(Exception):
    """The parser's message, with the names it would have accepted; `explain` makes one line of it."""

    def __init__(self, message: str, known: Iterable[str], siblings: Iterable[str]) -> None:
        self.message, self.known, self.siblings = message, set(known), set(siblings)
        super().__init__(message)


class Parser(LightningArgumentParser):
    """Raises Complaint where the original prints fifty lines of usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)  # --trainer.max_step is a mistake

    def validate(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().validate(*args, **kwargs)
        except KeyError as error:  # the innermost parser knows the names that were possible here
            if getattr(self, "_inner_parser", False) and not hasattr(error, "siblings"):
                error.siblings = option_names(self)  # type: ignore[attr-defined]
            raise

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if getattr(self, "_inner_parser", False):  # caught and tried otherwise by the outer one
            super().error(message, ex)
        causes = list(chain(ex))
        for cause in causes:
            if isinstance(cause, UserError):
                raise cause
        command = next((c.subcommand_parser for c in causes if hasattr(c, "subcommand_parser")), self)
        siblings = next((c.siblings for c in causes if hasattr(c, "siblings")), ())
        raise Complaint(message, option_names(command), siblings) from ex


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what led to it, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def option_names(parser: LightningArgumentParser) -> set[str]:
    """The dotted keys of a parser's options."""
    names = {action.dest for action in parser._actions if action.option_strings}
    return names - {"help", "config", "print_config", "print_shtab"}


class Command(LightningCLI):
    """Parses the arguments, builds model, data and trainer, and runs the subcommand.

    Args:
        arguments: the subcommand and its options.
    """

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        super().__init__(
            LitModel,
            L.LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"parser_mode": "maskvlm"},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # it would put class paths into checkpoints
            args=arguments,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        every = LightningCLI.subcommands()
        return {name: every[name] for name in COMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run", type=str, default="checkpoints/run", help="the run's folder; {run} in files"
        )
        # What the encoders know goes to the data once; one seed and one number of passes rule both sides.
        parser.link_arguments(
            "model.backbone", "data.init_args.spec", compute_fn=input_spec, apply_on="instantiate"
        )
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.link_arguments("trainer.accumulate_grad_batches", "data.init_args.accumulate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Lightning's own would replace the model's settings by those inside the checkpoint."""

    def before_instantiate_classes(self) -> None:
        settings = self.config[self.config.subcommand]
        folder = Path(settings.run)
        check_device(settings.trainer)
        settings.ckpt_path = find_checkpoint(settings.get("ckpt_path"), folder, str(self.subcommand))
        if self.subcommand == "fit" and process_rank() == 0 and not settings.trainer.fast_dev_run:
            folder.joinpath(FIRST).unlink(missing_ok=True)
            if settings.ckpt_path is None:
                claim(folder)

    def instantiate_classes(self) -> None:
        """With `{run}` filled in; the saved configuration keeps it, so that it fits another folder too."""
        written = self.config
        self.config = written.clone()
        settings = self.config[self.config.subcommand]
        settings.trainer = fill_in(settings.trainer, settings.run)
        settings.trainer.default_root_dir = settings.run
        super().instantiate_classes()
        self.config = written


class Parsed(Command):
    """Parses and checks the arguments, and builds nothing."""

    def before_instantiate_classes(self) -> None:
        """Nothing is claimed."""

    def instantiate_classes(self) -> None:
        """Nothing is built."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""

    @property
    def settings(self) -> Namespace:
        """The composed configuration of the subcommand."""
        return self.config[self.config.subcommand]


def input_spec(backbone: Any) -> Any:
    """What the encoders know about inputs."""
    return backbone.input_spec


def fill_in(value: Any, run: str) -> Any:
    """`value` with every `{run}` in its texts replaced by the run's folder."""
    if isinstance(value, str):
        return value.replace("{run}", run)
    if isinstance(value, list):
        return [fill_in(part, run) for part in value]
    if isinstance(value, Namespace):
        return Namespace({key: fill_in(part, run) for key, part in vars(value).items()})
    return value


def check_device(trainer: Namespace) -> None:
    """A card that is asked for must be there.

    Raises:
        UserError: it is not (69).
    """
    if trainer.accelerator not in ("gpu", "cuda"):
        return
    found, asked = torch.cuda.device_count(), trainer.devices
    wanted = len(asked) if isinstance(asked, list) else int(asked) if str(asked).lstrip("-").isdigit() else 1
    if found < max(1, wanted):
        todo = "Use WHERE=cpu (--trainer.accelerator cpu) or fewer devices"
        what = f"found {found} of {max(1, wanted)} GPUs"
        raise UserError("trainer.devices", what, todo, ExitCode.UNAVAILABLE)


def find_checkpoint(asked: str | None, folder: Path, command: str) -> str | None:
    """The file that `--ckpt_path` means: a path, or `last` or `best` of the run's folder.

    Raises:
        UserError: it is not there (66), or an evaluation was asked for without naming one (2).
    """
    if asked is None:
        if command == "fit":
            return None
        raise UserError(
            command, "no checkpoint is named", "Give --ckpt_path FILE, or `last` or `best` of --run"
        )
    if "://" in asked:
        raise UserError("--ckpt_path", f"{asked} is an address", "Download the file first")
    if asked == "last":
        found = newest_valid(folder, warnings.warn)
        if found is None:
            todo = "Check --run, or leave --ckpt_path out"
            raise UserError(folder, "holds no checkpoint to go on from", todo, ExitCode.MISSING_INPUT)
        return str(found)
    return str(folder / "best.ckpt") if asked == "best" else asked


def load_text(text: str) -> Any:
    """YAML of files and option values: checked first, then `${oc.env:NAME,default}` filled in."""
    check_yaml(text, "configuration")
    value = get_loader("yaml")(text)
    return resolve(value) if "${" in text else value


def prepare(arguments: list[str], allowed: Iterable[str] = ()) -> None:
    """What holds for every command: whose classes may be named, and a calm console."""
    set_loader("maskvlm", load_text)
    set_parsing_settings(
        import_path_denylist=["*", *NEVER], import_path_allowlist=trusted_packages(arguments, allowed)
    )
    for pattern in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # devices found, seeds set, why it stopped


def run(arguments: list[str], allowed: Iterable[str] = (), command: type[Command] = Command) -> Command:
    """Run one command.

    Args:
        arguments: the subcommand and its options.
        allowed: further packages that class paths in files may come from.
        command: Parsed to check only.

    Raises:
        UserError: whatever is wrong with the arguments, in one line.
    """
    prepare(arguments, allowed)
    try:
        return command(arguments)
    except Complaint as complaint:
        raise explain(complaint.message, complaint.known, complaint.siblings, arguments[1:]) from None
