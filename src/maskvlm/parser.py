"""What holds for every command before its arguments are understood: how they are parsed, whose classes may be
named in files, and a calm console."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from jsonargparse import get_loader, set_loader, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from maskvlm.config import NEVER, check_yaml, resolve, trusted_packages
from maskvlm.errors import UserError

MODE = "maskvlm"  # of parsing: YAML through `load_text`
# Said on every run by versions that fit each other; none of them is about what the user did.
KNOWN_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*`?set_vital`? is deprecated.*",
    r".*does not have many workers.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Experiment logs directory .* exists.*",
    r".*It is recommended to use .self\.log.*sync_dist=True.*",  # each process has the metrics of all
    r".*torch\.distributed\.nn\.functional\.all_gather is deprecated.*",  # its successor is private
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


def load_text(text: str) -> Any:
    """YAML of files and option values: checked first, then `${oc.env:NAME,default}` filled in."""
    check_yaml(text, "configuration")
    value = get_loader("yaml")(text)
    return resolve(value) if "${" in text else value


def prepare(arguments: list[str], allowed: Iterable[str] = ()) -> None:
    """What holds for every command: whose classes may be named, and a calm console."""
    set_loader("maskvlm", load_text)
    set_parsing_settings(import_path_denylist=["*", *NEVER], import_path_allowlist=trusted_packages(arguments, allowed))
    for pattern in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # devices found, seeds set, why it stopped
