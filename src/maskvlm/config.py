"""Configuration files from anybody, and one clear line for whatever is wrong in them or on the command line.

Nothing here imports torch: what can be refused is refused before seconds of imports.
"""

import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from maskvlm.errors import ExitCode, UserError

MOST_BYTES, MOST_NODES = 100_000, 20_000  # a composed configuration has 5 kB and 400 nodes
KINDS = ("str", "int", "float", "bool", "null", "map", "seq", "timestamp")
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in KINDS}
PACKAGES = ("maskvlm", "tasks", "lightning", "torch", "torchvision", "torchmetrics")
# Inside those, what loads or builds code.
NEVER = ("torch.hub", "torch.load", "torch.serialization", "torch.utils.cpp_extension", "torch.package")

OTHER_NAMES = {"folder": "run"}  # options by another name: torchrun (before Python 3.12) claims --run for itself


class Place(NamedTuple):
    """Where a key was given (`file:line` or option), the dotted key without init_args, the value's text."""

    where: str
    key: str
    value: str


def check_yaml(text: str, where: str) -> yaml.Node | None:
    """Refuse what is not plain, small YAML, before any of it is built.

    Returns:
        The tree of nodes, which know their lines; None for an empty text.

    Raises:
        UserError: too large, aliases that multiply, a tag that asks for an object (77);
            not YAML, a key given twice (2).
    """
    if len(text) > MOST_BYTES:
        raise UserError(where, f"{len(text)} characters of YAML", "Make it smaller", ExitCode.REFUSED)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{where}:{line}", f"not YAML ({error.problem})", "Mend the line") from None
    except yaml.YAMLError as error:
        raise UserError(where, f"not YAML ({str(error).splitlines()[0]})", "Save it as UTF-8 text") from None
    except RecursionError:
        raise UserError(where, "nested too deeply", "Write it flat", ExitCode.REFUSED) from None
    if root is not None:
        _size(root, where, {})
    return root


def _size(node: yaml.Node, where: str, sizes: dict[int, int]) -> int:
    """Nodes that `node` unfolds to. Each is visited once: an alias bomb costs no more than its text."""
    place = f"{where}:{node.start_mark.line + 1}"
    if node.tag not in PLAIN_TAGS:
        raise UserError(place, f"the tag {node.tag} is not allowed", "Write plain values", ExitCode.REFUSED)
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise UserError(place, "an alias to the value it is in", "Write the value out", ExitCode.REFUSED)
        return sizes[id(node)]
    sizes[id(node)] = 0  # being visited
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(place, f"the key {twice} is given twice", "Keep one of them")
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    sizes[id(node)] = size = 1 + sum(_size(part, where, sizes) for part in parts)
    if size > MOST_NODES:
        raise UserError(place, "aliases that multiply into a huge value", "Write it out", ExitCode.REFUSED)
    return size


def read_config(name: str) -> yaml.Node | None:
    """The checked tree of one `-c` file; raises UserError with file and line."""
    path = Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(str(path), map(str, path.parent.glob("*.yaml")), 1, 0.5)
        what = "no such configuration file" + (f" (did you mean {near[0]}?)" if near else "")
        raise UserError(name, what, "Check the path", ExitCode.MISSING_INPUT)
    if path.stat().st_size > MOST_BYTES:
        what = f"{path.stat().st_size} bytes are no configuration file"
        raise UserError(name, what, f"Keep it under {MOST_BYTES} bytes", ExitCode.REFUSED)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(name, f"not UTF-8 text (byte {error.start})", "Save it as UTF-8") from None
    except OSError as error:
        raise UserError(name, f"cannot be read ({error.strerror})", "Mend it", ExitCode.MISSING_INPUT) from None
    root = check_yaml(text, name)
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise UserError(f"{name}:1", "holds no `key: value` lines", "Start it with a key such as trainer:")
    return root


def config_files(arguments: list[str]) -> list[str]:
    """The values of all -c and --config options."""
    files = []
    for index, word in enumerate(arguments):
        if word in ("-c", "--config"):
            files.append(arguments[index + 1] if index + 1 < len(arguments) else "")
        elif word.startswith(("-c=", "--config=")):
            files.append(word.partition("=")[2])
    return files


def places(arguments: list[str]) -> list[Place]:
    """Every key that files and options give, the one that wins last."""
    found: list[Place] = []
    for name in config_files(arguments):
        root = read_config(name)
        if root is not None:
            found += _keys(root, name, "")
    return found + options(arguments)


def options(arguments: list[str]) -> list[Place]:
    """Every `--key value` and `--key=value` of the command line."""
    found = []
    for index, word in enumerate(arguments):
        if word.startswith("--") and word != "--config":
            option, equals, value = word.partition("=")
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            key = _flat(option[2:].rstrip("+"))
            found.append(Place(option, OTHER_NAMES.get(key, key), value if equals else following))
    return found


def _keys(node: yaml.Node, name: str, parent: str) -> Iterator[Place]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = _flat(f"{parent}.{key.value}".strip(".").rstrip("+"))
            text = value.value if isinstance(value, yaml.ScalarNode) else ""
            yield Place(f"{name}:{key.start_mark.line + 1}", dotted, text)
            yield from _keys(value, name, dotted)
    elif isinstance(node, yaml.SequenceNode):
        for part in node.value:
            yield from _keys(part, name, parent)


def _flat(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != "init_args")


def find_place(key: str, found: list[Place], value: str | None = None) -> Place | None:
    """The last place that gives `key` (or a longer key that ends with it), preferably with that value."""
    key = _flat(key)
    fits = [place for place in found if place.key == key or place.key.endswith("." + key)]
    exact = [place for place in fits if value is not None and place.value == value]
    candidates = exact or fits
    return candidates[-1] if candidates else None


def trusted_packages(arguments: list[str], allowed: Iterable[str]) -> list[str]:
    """Packages that class paths may come from: ours, those allowed, those typed on the command line.

    A class path inside a file is the file's decision, one typed by the user is the user's.
    """
    words = [option.value for option in options(arguments)]
    paths = [word for word in words if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", word)]
    typed = {path.split(".")[0] for path in paths} - set(sys.stdlib_module_names)
    return sorted({*PACKAGES, *allowed, *typed})


def resolve(value: Any) -> Any:
    """Fill in `${...}`: environment variables (`${oc.env:DATA_ROOT,data}`) and keys of the same file."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)["value"]  # type: ignore
    except OmegaConfBaseException as error:
        what = str(error).splitlines()[0]
        raise UserError("configuration", what, "`${...}` reaches environment variables only") from None
