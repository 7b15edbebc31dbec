"""The user's configuration files and options, and where each key was given.

Nothing here imports torch: errors are found before seconds of imports.
"""

import difflib
import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from maskvlm.config.safe_yaml import MOST_BYTES, MOST_SHOWN, TAG, at_line, check_yaml, cut
from maskvlm.utils.errors import ExitCode, UserError

MOST_NESTED = 4  # of `${oc.env:A,${oc.env:B,c}}`
ADDRESS = re.compile(r'://|"[^"]*\\')
"""What starts an address, or may: in YAML within a string, only double quotes can hide a character by a backslash."""
OTHER_NAMES = {"folder": "run"}  # aliases of options: torchrun (before Python 3.12) claims --run for itself


class KeyPlace(NamedTuple):
    """Where a key was given (`file:line` or option), the dotted key without init_args, and the value's text."""

    where: str
    key: str
    value: str


def read_config_file(name: str) -> yaml.MappingNode:
    """The checked node tree of one `-c` file.

    Raises:
        UserError: anything is wrong with the file or its YAML (names file and line); a key such as `__path__` (77).
    """
    # nodes rather than values, as nodes know their lines
    root = check_yaml(config_text(name), name)
    if root is None:
        raise UserError(name, "is empty", "Write keys into it, such as `model: {lr: 1e-3}`, or leave it out")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{name}:1", "holds no `key: value` lines", "Begin it with a key")
    check_names(root, name)
    return root


def config_text(name: str) -> str:
    """The text of a configuration file.

    Raises:
        UserError: it is missing, not a file or cannot be read (66), too large (77), or not UTF-8 (2).
    """
    path = Path(name)
    try:
        kind = path.stat()
    except (OSError, ValueError) as error:
        # a file with a similar name
        near = nearest(str(path), [str(other) for other in _beside(path)], 0.5)
        what = "no such configuration file" + (f" (did you mean {near}?)" if near else "")
        # ValueError has no errno: a null byte in the name
        if getattr(error, "errno", errno.ENOENT) not in (errno.ENOENT, errno.ENOTDIR):
            what = f"cannot be read ({cut(str(getattr(error, 'strerror', error)))})"
        raise UserError(
            name if len(name) < 4096 else cut(name), what, "Check the path", ExitCode.MISSING_INPUT
        ) from None
    check_plain_file(name, kind)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)  # it may have grown since
    except OSError as error:
        raise UserError(name, f"cannot be read ({error.strerror})", "Fix it", ExitCode.MISSING_INPUT) from None
    if len(content) > MOST_BYTES:
        what = f"{kind.st_size} bytes are too many for a configuration file"
        raise UserError(name, what, f"Keep it under {MOST_BYTES} bytes", ExitCode.REFUSED)
    try:
        # "-sig" drops a byte order mark
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(name, f"not UTF-8 text (byte {error.start})", "Save it as UTF-8") from None


def check_plain_file(name: str, kind: os.stat_result) -> None:
    """Raise UserError for anything but a regular file: a pipe blocks its reader, a device may never end."""
    if not stat.S_ISREG(kind.st_mode):
        raise UserError(name or "-c", "is a folder, pipe or device, not a file", "Give a file", ExitCode.MISSING_INPUT)


def _beside(path: Path) -> list[Path]:
    try:
        return sorted(path.parent.glob("*.yaml"))[:1000]
    except (OSError, ValueError):
        return []


def check_names(node: yaml.Node, where: str) -> None:
    """Reject keys that the parser would take for its own metadata, and class paths that are not strings."""
    if isinstance(node, yaml.MappingNode):
        for key, part in node.value:
            # jsonargparse keeps metadata such as `__path__` next to the values: a file could forge it
            if any(name.startswith("__") for name in key.value.split(".")):
                what = f"the key {cut(key.value)} is not allowed in files"
                raise UserError(at_line(where, key.start_mark), what, "Remove it", ExitCode.REFUSED)
            if key.value == "class_path" and part.tag != TAG + "str":
                what = "class_path is not text"
                raise UserError(at_line(where, key.start_mark), what, "Give the path of a class")
            check_names(part, where)
    elif isinstance(node, yaml.SequenceNode):
        for part in node.value:
            check_names(part, where)


def check_words(arguments: list[str]) -> None:
    """Reject command-line words that no file could hold: they would break anything that records them.

    Raises:
        UserError: bytes that are not UTF-8, control characters other than tabs and line ends (2); more than 100,000
            characters (77).
    """
    for word in arguments:
        if len(word) > MOST_BYTES:
            raise UserError(cut(word), "is too long", "Put long values into a file", ExitCode.REFUSED)
        if yaml.reader.Reader.NON_PRINTABLE.search(word):
            raise UserError(f"command line: {cut(word)}", "is not plain UTF-8 text", "Retype it, or rename the file")


def config_files(arguments: list[str]) -> list[str]:
    """The values of all -c and --config options."""
    files = []
    for index, word in enumerate(arguments):
        if word in ("-c", "--config"):
            # "" for a -c at the end, which is no existing file
            files.append(arguments[index + 1] if index + 1 < len(arguments) else "")
        elif word.startswith(("-c=", "--config=")):
            files.append(word.partition("=")[2])
    return files


def given_places(arguments: list[str]) -> list[KeyPlace]:
    """Every key given by files and options; the one that takes effect comes last."""
    places: list[KeyPlace] = []
    for name in config_files(arguments):
        root = read_config_file(name)
        if root is not None:
            places += _keys(root, name, "")
    return places + options(arguments)


def options(arguments: list[str]) -> list[KeyPlace]:
    """Every `--key value` and `--key=value` of the command line."""
    places = []
    for index, word in enumerate(arguments):
        if word.startswith("--") and word != "--config":
            # both forms: `--key=value` and `--key value`
            option, equals, value = word.partition("=")
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            # `--trainer.callbacks+` appends to a list: the same key
            key = _flat(option[2:].rstrip("+"))
            places.append(KeyPlace(option, OTHER_NAMES.get(key, key), value if equals else following))
    return places


def _keys(node: yaml.Node, name: str, parent: str) -> Iterator[KeyPlace]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = _flat(f"{parent}.{key.value}".strip(".").rstrip("+"))
            text = value.value if isinstance(value, yaml.ScalarNode) else ""
            # marks count lines from 0
            yield KeyPlace(f"{name}:{key.start_mark.line + 1}", dotted, text)
            yield from _keys(value, name, dotted)
    elif isinstance(node, yaml.SequenceNode):
        for part in node.value:
            # items of a list are under the list's own key
            yield from _keys(part, name, parent)


def _flat(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != "init_args")


def find_place(key: str, places: list[KeyPlace], value: str | None = None) -> KeyPlace | None:
    """The last place that gives `key` (or a longer key that ends with it), preferably with this value."""
    key = _flat(key)
    fits = [place for place in places if place.key == key or place.key.endswith("." + key)]
    # among several places that give the key, the one whose value the message names
    exact = [place for place in fits if value is not None and place.value == value]
    candidates = exact or fits
    return candidates[-1] if candidates else None


def nearest(word: str, names: Iterable[str], least: float) -> str | None:
    """The name most similar to `word`; None if no similarity reaches `least` (0 to 1), or the word is too long."""
    # difflib is quadratic in the length
    near = [] if len(word) > 2 * MOST_SHOWN else difflib.get_close_matches(word, names, 1, least)
    return near[0] if near else None


def fill_environment(value: Any, where: str, typed: bool = False, nested: int = 0, before: str = "") -> Any:
    """`value` with every `${oc.env:NAME}` and `${oc.env:NAME,default}` in its strings replaced by that variable.

    The content of a variable is plain text: nothing in it is replaced again. A default may contain such a reference.

    Args:
        where: the file, for messages.
        typed: typed by the user, who may send a variable anywhere; a file may not.
        nested, before: nesting depth of this text in defaults, and the file's text before it.

    Raises:
        UserError: a variable is not set, or contains control characters or `${` (2); another kind of `${...}`, or a
            variable within an address (77).
    """
    if isinstance(value, dict):
        return {key: fill_environment(part, where, typed) for key, part in value.items()}
    if isinstance(value, list):
        return [fill_environment(part, where, typed) for part in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    # `done` is never searched again: the content of a variable stays plain text
    done, start = "", value.find("${")
    while start >= 0:
        end = _closing(value, start)
        # the variable's name, and whether a default follows
        name = re.match(r"\$\{oc\.env:([A-Za-z_]\w*)[,}]", value[start:])
        if name is None or end < 0 or nested > MOST_NESTED:
            what = f"{cut(value)} uses more than an environment variable"
            raise UserError(where, what, "Write ${oc.env:NAME} or ${oc.env:NAME,default}", ExitCode.REFUSED)
        content = os.environ.get(name[1])
        # the file's own text: a variable itself may well contain an address
        before += value[:start]
        if content is not None and not typed and ADDRESS.search(before):
            what = f"sends the environment variable {name[1]} to an address"
            raise UserError(where, what, "Write its value there, or type the option", ExitCode.REFUSED)
        if content is None and value[start + name.end() - 1] == ",":
            # the default is between the comma and the closing brace
            content = fill_environment(value[start + name.end() : end], where, typed, nested + 1, before)
            before += content
        if content is None:
            todo = "Set it, or give a default: ${oc.env:NAME,default}"
            raise UserError(where, f"Environment variable '{cut(name[1])}' not found", todo)
        if not content.isprintable() or "${" in content:
            raise UserError(where, f"the environment variable {name[1]} holds {cut(content)}", "Set it to plain text")
        done, value = done + value[:start] + content, value[end + 1 :]
        start = value.find("${")
    return done + value


def environment_names(text: str) -> list[str]:
    """The environment variables that a text refers to, without duplicates."""
    return [*dict.fromkeys(re.findall(r"\$\{oc\.env:([A-Za-z_]\w*)", text))]


def _closing(text: str, start: int) -> int:
    """Position of the brace that closes the first one opened after `start`; -1 if there is none."""
    depth = 0
    # braces nest: ${oc.env:A,${oc.env:B,c}}
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    return -1
