"""Setup shared by all commands: how arguments are parsed, which classes files may name, and a quiet console."""

import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NoReturn, get_args

from jsonargparse import Namespace, _common, set_loader, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from maskvlm.config.allowed_classes import Verdicts
from maskvlm.config.given_options import (
    KeyPlace,
    check_words,
    config_files,
    fill_environment,
    find_place,
    given_places,
    options,
)
from maskvlm.config.old_names import current, current_key
from maskvlm.config.safe_yaml import LARGEST, NotPlain, cut, read_yaml
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.launch import STUDY

MODE = "maskvlm"  # parser mode: YAML through `load_text`
GROUPS = ("trainer", "model")
"""Keys that contain keys. The parser would take a string there for a file name, and read that file."""
OUTPUTS = ("save_dir", "dirpath", "default_root_dir", "root_dir", "run", "name", "version", "sub_dir", "filename")
"""Keys of output folders of the trainer and the run, and of names that are appended to them."""
OUTSIDE = re.compile(r"://|::|:/*$")
"""Part of an address, or of a string that becomes one: fsspec also treats a::b as an address."""
# Issued on every run by compatible versions; none of them is about what the user did.
KNOWN_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*`?set_vital`? is deprecated.*",
    r".*does not have many workers.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Experiment logs directory .* exists.*",
    r".*It is recommended to use .self\.log.*sync_dist=True.*",  # each process has the metrics of all
    r".*torch\.distributed\.nn\.functional\.all_gather is deprecated.*",  # its successor is private
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*`broadcast_buffers` is deprecated.*",  # torch 2.10 does not have its successor
    r".*FSDP2-wrapped module .* returned a view tensor.*",  # keys and values, which are never written to
)


class Complaint(Exception):
    """The parser's message, with the names it would have accepted; `explain_message` turns it into one line."""

    def __init__(self, message: str, known: Iterable[str], siblings: Iterable[str]) -> None:
        self.message, self.known, self.siblings = message, set(known), set(siblings)
        super().__init__(message)


class CommandParser(LightningArgumentParser):
    """Raises Complaint instead of printing fifty lines of usage.

    Attributes:
        nulls: see `keep_nulls`.
    """

    nulls: ClassVar[list[str]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # --trainer.max_step is an error; strings inside values are read by our reader too
        super().__init__(*args, allow_abbrev=False, **{"parser_mode": MODE} | kwargs)

    @property
    def _default_env(self) -> bool:
        """Only `${oc.env:NAME}` reads the environment, whatever JSONARGPARSE_DEFAULT_ENV says."""
        return False

    @_default_env.setter
    def _default_env(self, default_env: bool) -> None:
        """Set by the base class."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument whose value is never taken for the name of a file: files are only read with -c."""
        return super().add_argument(*args, **without_files(kwargs))

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        """Add arguments as `add_argument` does: no value is taken for the name of a file."""
        names = super().add_class_arguments(*args, **without_files(kwargs))
        whole_before_float(self)
        return names

    def add_subclass_arguments(self, *args: Any, **kwargs: Any) -> Any:
        """Add arguments as `add_argument` does: no value is taken for the name of a file."""
        # the base method has no such setting, so it is applied afterwards
        super().add_subclass_arguments(*args, **kwargs)
        forget_files(self)

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        """The configuration as YAML, also for --print_config."""
        # a clone, so that the configuration itself stays as parsed
        clone = cfg.clone()
        keep_nulls(clone)
        return super().dump(clone, *args, **kwargs)

    def instantiate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> Namespace:
        """Instantiate as the base class does, but keep the errors that classes raise about their own arguments. For an
        argument with several possible types, such as a data set's reader, the base class keeps only the error of the
        first type. Errors of Lightning's classes are shown to the user too.

        Raises:
            UserError: the error of a class.
        """
        refused: list[UserError] = []

        def build(kind: type, *positional: Any, **named: Any) -> Any:
            try:
                return kind(*positional, **named)
            except UserError as error:
                refused.append(error)
                raise
            except Exception as error:
                # A logger whose package is missing, or a wrong value of the right type. In other classes it is a bug.
                if kind.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning"):
                    raise
                refused.append(UserError(kind.__name__, cut(str(error), 300).rstrip("."), "Correct it in trainer"))
                raise refused[-1] from error

        try:
            return super().instantiate(namespace, *args, instantiators=[(build, object, True)], **kwargs)
        except ValueError as error:
            failed = error
        # Outside the handler, where the two could become each other's cause.
        raise refused[0] if refused else failed

    def validate(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().validate(*args, **kwargs)
        except KeyError as error:  # the innermost parser knows the valid names here
            if getattr(self, "_inner_parser", False) and not hasattr(error, "siblings"):
                # carried by the exception itself: `error` of the outer parser finds it there
                error.siblings = option_names(self)  # type: ignore[attr-defined]
            raise

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if (
            getattr(self, "_inner_parser", False) and not self.exit_on_error
        ):  # the outer parser catches it and tries another way
            super().error(message, ex)
        # a UserError among the causes has a better message than the parser's
        causes = list(chain(ex))
        for cause in causes:
            if isinstance(cause, UserError):
                raise cause
        # the subcommand's parser knows its options, the outermost one only the commands
        command = next((c.subcommand_parser for c in causes if hasattr(c, "subcommand_parser")), self)
        siblings = next((c.siblings for c in causes if hasattr(c, "siblings")), ())
        raise Complaint(message, option_names(command), siblings) from ex


def without_files(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an argument whose value is never taken for the name of a file."""
    return settings | {"sub_configs": False}


def forget_files(parser: CommandParser) -> None:
    """Apply `without_files` to existing arguments; those of a class have no setting for it."""
    for action in parser._actions:
        # a private attribute of jsonargparse, as there is no setting
        if hasattr(action, "_enable_path"):
            action._enable_path = False


def whole_before_float(parser: CommandParser) -> None:
    """Read `1` as a whole number where both kinds are allowed: one batch, not all of them.

    Python keeps one object for `Optional[Union[int, float]]` and `Optional[Union[float, int]]`, whichever came first.
    pandas has the second: imported before Lightning, it would make `--trainer.limit_val_batches 1` a share.
    """
    for action in parser._actions:
        # a private attribute of jsonargparse, as a class's types cannot be replaced
        if set(get_args(getattr(action, "_typehint", None))) == {int, float, type(None)}:
            action._typehint = int | float | None  # type: ignore[attr-defined]


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes, the first cause last."""
    while error is not None:
        yield error
        # `raise ... from`, else the exception being handled
        error = error.__cause__ or error.__context__


def option_names(parser: LightningArgumentParser) -> set[str]:
    """The dotted keys of a parser's options."""
    names = {action.dest for action in parser._actions if action.option_strings}
    return names - {"help", "config", "print_config", "print_shtab"}


def load_text(text: str, path: str | None = None) -> Any:
    """The values of the YAML in a file, an option or a string.

    Args:
        text: YAML.
        path: the file's name; in files, environment variables are filled in.
    """
    if path is not None:
        return fill_environment(read_yaml(text, path), path)
    # of an option, or a string inside a value, where variables have already been filled in
    value = read_yaml(text, "configuration")
    if isinstance(value, dict) and value and all(part is None for part in value.values()):
        words = set(text.strip(" {}").replace(" ", "").split(","))
        if words == set(value) or text.strip() == f"{next(iter(value))}:":
            return text  # such as {run}, which stands for the run's folder and is not a mapping
    return value


def set_up_parsing(arguments: list[str], allowed: Iterable[str] = ()) -> None:
    """Set up parsing for every command: which classes may be named, and a quiet console."""
    # only NotPlain tells the parser to take the text as is; other errors pass through it
    set_loader("maskvlm", load_text, (NotPlain,))
    # enables the check; its verdicts are replaced below, where jsonargparse has no setting
    set_parsing_settings(import_path_denylist=["*"])
    build_typed_values_alone()
    _common.parsing_settings["import_path_verdicts"] = Verdicts(arguments, allowed)
    for pattern in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # devices found, seeds set, why it stopped


def build_typed_values_alone() -> None:
    """Where any value is allowed, such as in a dict, keep a mapping with a class_path a mapping."""
    set_parsing_settings(instantiate_subclass_spec_in_any=False)


def parsed(parser: LightningArgumentParser, arguments: list[str]) -> Namespace:
    """The composed configuration.

    Args:
        parser: parser of all commands.
        arguments: the command and its options.

    Raises:
        Complaint: the parser rejects the arguments.
        UserError: files are missing (66) or not plain YAML, strings are given in place of keys, numbers are out of
            range, a variable of the environment is not set (2); a file names another one, an address as an output
            folder, or a file is too large (77).
    """
    check_words(arguments)
    for place in given_places(arguments[1:]):
        check_group(place)
    words = [
        # file names stay as they are; the strings inside files are filled in by `load_text`
        word if word in config_files(arguments) else _current_word(fill_environment(word, "command line", typed=True))
        for word in arguments
    ]
    CommandParser.nulls = nulls_of(words[1:])
    try:
        config = parser.parse_args(words)
        keep_nulls(config[config.subcommand])
        # after parsing, as strings have only now become numbers
        check_written_numbers(config[config.subcommand])
        check_seed(config[config.subcommand].seed_everything)
        check_outputs(config[config.subcommand], arguments, words)
    # an integer too large for a float
    except OverflowError:
        raise UserError("configuration", "a number is out of range", "Give one that fits 64 bits") from None
    return config


def nulls_of(words: list[str]) -> list[str]:
    """Keys that the command line sets to null in the end."""
    # the last of repeated options takes effect
    last = {option.key: option.value for option in options(words)}
    return [key for key, value in last.items() if value in ("null", "~")]


def keep_nulls(settings: Namespace) -> None:
    """Keep `--key null` as null. jsonargparse passes an option of a nested class on as a string, so where a string is
    allowed it becomes "None": a folder of that name, for example."""
    for key in CommandParser.nulls:
        place: Any = settings
        *parents, name = key.split(".")
        for part in parents:
            place = place.get(part) if isinstance(place, Namespace) else None
            # keys leave out `init_args`
            place = place.init_args if isinstance(place, Namespace) and "init_args" in place else place
        if isinstance(place, Namespace) and place.get(name) == "None":
            place[name] = None


def _current_word(word: str) -> str:
    """A word of the command line, with class paths and options of earlier versions under their current names."""
    option, equals, value = word.partition("=")
    if not option.startswith("--"):
        return current(word)
    return f"--{current_key(option[2:])}{equals}{current(value)}"


def old_name_lines(arguments: list[str]) -> Iterator[str]:
    """A line for each option given under its name in an earlier version."""
    for place in given_places(arguments[1:]):
        if (new := current_key(place.key)) != place.key:
            yield f"{place.where}: {place.key} is called {new} now"


def check_group(place: KeyPlace) -> None:
    """Reject a string in place of keys, and a file that names another: the parser would read either."""
    # an option's place is its name, a file's is file:line
    if place.key == "config" and not place.where.startswith("-"):
        raise UserError(place.where, "a file may not name another", "Give that file with -c", ExitCode.REFUSED)
    # a mapping typed as one value is fine
    if place.key in GROUPS and place.value and not isinstance(_keys(place.value), dict):
        where = place.where if place.where.startswith("-") else f"{place.where}: {place.key}"
        # `lr:1e-3` is a text to YAML.
        key, colon, value = str(place.value).partition(":")
        spaced = f"Write a space behind the colon: {cut(key)}: {cut(value)}"
        todo = spaced if colon and key.isidentifier() and value else "Give keys of it, and files with -c"
        raise UserError(where, f"{cut(place.value)} does not fit", todo)


def _keys(text: str) -> Any:
    try:
        return read_yaml(text, "configuration")
    except NotPlain:
        return text


def check_seed(seed: bool | int) -> None:
    """Check that the seed is one that numpy accepts."""
    if not 0 <= int(seed) < 2**32:
        raise UserError("seed_everything", f"{seed} is out of range", "Give 0 to 4294967295")


def check_outputs(settings: Namespace, arguments: list[str], words: list[str]) -> None:
    """Reject addresses as output folders, to which Lightning would connect, unless the user typed them; values from
    files, including a study's file, do not count as typed. Checks the parsed values, however they were written.

    Args:
        settings: parsed settings of the subcommand.
        arguments: as given, to name the place of a rejected value.
        words: the arguments with the environment filled in.

    Raises:
        UserError: an address that was not typed for this key (77).
    """
    typed = [] if STUDY in os.environ else options(words)
    for key, text in [("run", settings.run), *_texts(settings.trainer, "trainer")]:
        # a run's folder that is an address was typed, or has already been rejected
        filled = text.replace("{run}", "" if OUTSIDE.search(settings.run) else settings.run)
        own = any(f"{key}.".startswith(f"{option.key}.") and text in option.value for option in typed)
        if key.rpartition(".")[2] in OUTPUTS and OUTSIDE.search(filled) and not own:
            place = find_place(key, given_places(arguments), text)
            where = f"{place.where}: {key}" if place else key
            what, todo = f"{cut(text)} is an address", "Name a folder here, or type the option"
            raise UserError(where, what, todo, ExitCode.REFUSED)


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every string under `key`, with its dotted key without init_args."""
    if isinstance(value, Namespace | dict):
        for name, part in (vars(value) if isinstance(value, Namespace) else value).items():
            yield from _texts(part, key if name == "init_args" else f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part, key)
    elif isinstance(value, str):
        yield key, value


def check_written_numbers(value: Any, key: str = "") -> None:
    """Raise UserError for integers beyond 64 bits: where a number is expected, strings of any length are parsed."""
    if isinstance(value, Namespace | dict):
        for name, part in (vars(value) if isinstance(value, Namespace) else value).items():
            check_written_numbers(part, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for part in value:
            check_written_numbers(part, key)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(key.replace("init_args.", ""), "a number is out of range", "Give one that fits 64 bits")
