"""Shortens the argument parser's long messages to one line: the place, what is wrong, the nearest key."""

import re
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

from maskvlm.config.given_options import KeyPlace, find_place, given_places, nearest
from maskvlm.config.safe_yaml import cut
from maskvlm.utils.errors import ExitCode, UserError

MOST_LINES, MOST_WIDE = 200, 400  # of the parser's message: anything longer is a value that it repeats


def explain_message(message: str, known: Iterable[str], siblings: Iterable[str], arguments: list[str]) -> UserError:
    """Turn a message of the argument parser into a one-line error.

    Args:
        message: the parser's text.
        known: the full keys that the command accepts.
        siblings: if the message is about an argument of a class, the names of that class's arguments.
        arguments: the command line, without the subcommand.
    """
    places = given_places(arguments)
    context = MessageContext(set(known), set(siblings), places)
    message = short_message(message)
    # the first pattern that matches, in the order of _ANSWERS
    for pattern, answer in _ANSWERS:
        match = re.search(pattern, message, re.DOTALL)
        if match:
            return answer(match, context)
    return UserError("configuration", cut(message, 300).rstrip("."), "See --help")


def short_message(message: str) -> str:
    """The message with long lines cut, and without the middle if there are too many lines: it may repeat a value of a
    megabyte several times."""
    lines = message.splitlines()
    if len(lines) > MOST_LINES:
        # what is wrong comes at the beginning or at the end
        lines = [*lines[: MOST_LINES // 2], "...", *lines[-MOST_LINES // 2 :]]
    # One member of a union accepts the class and says what is wrong in it; that the others reject it is irrelevant.
    class_paths = set(re.findall(r"Problem with given class_path '([\w.]+)'", message))
    other = re.compile(r"\s*- Import path ([\w.]+) does not correspond")
    lines = [line for line in lines if not ((match := other.match(line)) and match[1] in class_paths)]
    return "\n".join(line if len(line) <= MOST_WIDE else line[:MOST_WIDE] + "..." for line in lines)


class MessageContext(NamedTuple):
    """Context for explaining a message."""

    known: set[str]
    siblings: set[str]
    places: list[KeyPlace]


def _stray(match: re.Match[str], _: MessageContext) -> UserError:
    todo = "Options start with --, files with -c; words such as run=first stand before all of them"
    return UserError(cut(match["word"]), "neither an option nor its value", todo)


ELSEWHERE = {
    "optimizer": "AdamW is the model's own: set model.lr, model.lr_encoders, model.weight_decay, model.betas",
    "lr_scheduler": "Warm-up and cosine are the model's own: set model.warmup, model.stable and model.min_lr",
}
"""Keys of a standard LightningCLI, and what replaces them here: learning rates differ by part of the model, and a
resumed run must find the schedule with which it started."""


def _unknown(match: re.Match[str], context: MessageContext) -> UserError:
    key = match["key"].lstrip("-").partition("=")[0]
    place = find_place(key, context.places) or KeyPlace("configuration", key, "")
    if todo := ELSEWHERE.get(key.partition(".")[0]):
        return UserError(_where(place), "not a key of this command", todo)
    # neighbours of the key: the arguments of its class, else all keys of the command
    parent = place.key.rpartition(".")[0]
    here = {f"{parent}.{name}" for name in context.siblings} or context.known
    given_keys = {other.key for other in context.places if other.key != place.key}
    near = _nearest(place.key, here, here | context.known | given_keys)
    if near:
        return UserError(_where(place), f"unknown key (did you mean {near}?)", "Correct its spelling")
    there = {name for name in here if name.startswith(f"{parent}.")} or here
    return UserError(_where(place), "unknown key", f"Keys there: {_some(there)}")


def _nearest(key: str, here: set[str], anywhere: set[str]) -> str | None:
    """The known key most similar to `key`: a neighbour, the same name elsewhere, or one with similar spelling."""
    parent, _, last = key.rpartition(".")
    neighbours = {name.rpartition(".")[2]: name for name in here if name.rpartition(".")[0] == parent}
    # a typo
    if near := nearest(last, neighbours, 0.6):
        return neighbours[near]
    # the right name under the wrong parent; the shortest key is the most likely
    if same := sorted((name for name in anywhere if name.rpartition(".")[2] == last), key=len):
        return same[0]
    # whole keys are long and alike, hence the higher bound
    return nearest(key, anywhere, 0.75)


def _some(names: set[str]) -> str:
    keys = sorted(name for name in names if not name.endswith(".help"))
    return ", ".join(keys[:12]) + (f" and {len(keys) - 12} more (maskvlm config)" if len(keys) > 12 else "")


def _denied(match: re.Match[str], context: MessageContext) -> UserError:
    path = match["path"]
    place = next((place for place in reversed(context.places) if place.value == path), None)
    what = f"class {cut(path)} is not one that a file may name"
    todo = f"Add --allow-import {cut(path)} if you trust it"
    return UserError(_where(place) if place else "configuration", what, todo, ExitCode.REFUSED)


def _no_class(match: re.Match[str], context: MessageContext) -> UserError:
    place = next((place for place in reversed(context.places) if place.value == match["path"]), None)
    what = f"class {cut(match['path'])} cannot be used ({cut(match['why'], 200)})"
    todo = "Check the spelling, and that Python finds its package: here, installed, or on PYTHONPATH"
    return UserError(_where(place) if place else "configuration", what, todo)


def _wrong_value(match: re.Match[str], context: MessageContext) -> UserError:
    text = match["text"]
    value_match = re.search(r"(?:Got value|Given value): (.*)", text)
    value = value_match[1].strip() if value_match else None
    # the value tells which of several places it is about
    place = find_place(match["key"], context.places, value) or KeyPlace("configuration", match["key"], value or "")
    if value and len(value) > MOST_WIDE // 2:
        value = place.value or value  # the whole of it
    if lacking := _undefined(value or place.value):
        todo = f"Define in it: {lacking}"
        return UserError(_where(place), f"{cut(value or place.value)} is an abstract class", todo)
    # the parser has two forms: a union lists its members, a plain type is part of a sentence
    types = re.search(r"Subtypes: \[(.*?)\]\n", text) or re.search(r"Expected a (.*?)(?:\. Got|\n|$)", text)
    if types is None and "Subclass types expect" in text:
        return UserError(_where(place), f"{cut(value or place.value)} does not fit", "Give the path of a class")
    if types is None:
        return UserError(_where(place), cut(text, 300).rstrip("."), "See --help")
    todo = f"Give {_plain_type(types[1])}"
    if todo == "Give a list" and (value or place.value).startswith("{'class_path'"):
        todo = "Give a list: in a file, a dash before class_path; on the command line, [ ] around it"
    return UserError(_where(place), f"{cut(value or place.value)} does not fit", todo)


def _undefined(path: str) -> str:
    """Abstract methods of the class at this path, if the parser has imported it; "" if there are none."""
    module, _, name = path.rpartition(".")
    # Not getattr: a package may import a missing attribute.
    kind = vars(sys.modules[module]).get(name) if module in sys.modules else None
    return ", ".join(sorted(getattr(kind, "__abstractmethods__", ()))) if isinstance(kind, type) else ""


def _plain_type(text: str) -> str:
    """`typing.Literal['l1', 'l2']` -> `one of l1, l2`, `Literal['all']` -> `the word all`, with a bool `true,
    false or all`; `<class 'float'>` -> `a number`."""
    # every second part is the content of a Literal: values to be typed as they are
    parts = re.split(r"(?:typing\.)?Literal\[(.*?)\]", text)
    plain = "".join(
        f"{'one of' if ',' in part else 'the word'} {part}".replace("'", "") if number % 2 else _plain_names(part)
        for number, part in enumerate(parts)
    )
    return plain.replace("true or false, the word ", "true, false or ")


def _plain_names(text: str) -> str:
    text = re.sub(r"<class '(.*?)'>", lambda m: m[1].rpartition(".")[2], text)
    words = {"float": "a number", "int": "a whole number", "str": "a text", "bool": "true or false"}
    words |= {"NoneType": "null", "tuple": "a list of fixed length", "list": "a list", "Sequence": "a list"}
    words |= {"dict": "a mapping", "Mapping": "a mapping"}
    text = re.sub(r"\w+(?![\w.\[])", lambda m: words.get(m[0], m[0]), text)
    # a.b.Name -> Name
    return re.sub(r"\b[a-z_]\w*(?:\.\w+)*\.(\w+)", r"\1", text)


def _missing(match: re.Match[str], _: MessageContext) -> UserError:
    # without the command's name, which does not appear in files
    keys = re.sub(r"\b(fit|validate|test|predict)\.", "", match["keys"])
    todo = "Give the files with -c" if "model." in keys else "Give it a value under init_args, where its class is named"
    return UserError("configuration", f"nothing sets {keys}", todo)


def _no_argument(match: re.Match[str], _: MessageContext) -> UserError:
    return UserError(match["key"], match["why"], "Write the option and then its value")


def _where(place: KeyPlace) -> str:
    return cut(place.where) if place.where.startswith("--") else f"{place.where}: {cut(place.key)}"


# The innermost error says most, so messages that wrap others come last.
_ANSWERS: list[tuple[str, Callable[[re.Match[str], MessageContext], UserError]]] = [
    (r"Importing '(?P<path>[\w.]+)' is not allowed", _denied),
    (r"unrecognized arguments: (?P<key>--\S+)", _unknown),
    (r"unrecognized arguments: (?P<word>\S+)", _stray),
    (r".*(?:does not accept option|Option) '(?P<key>[^']+)'", _unknown),
    (r"the following arguments are required: (?P<keys>[^\n]+)", _missing),
    (r"argument (?P<key>--\S+): (?P<why>expected [^\n]+)", _no_argument),
    (r".*class_path '(?P<path>[\w.]+)':\n\s*(?P<why>(?:No module|module|Import)[^\n]*)", _no_class),
    (r".*(?P<why>Import path (?P<path>[\w.]+) does not [^\n]*)", _no_class),
    (r'.*Parser key "(?P<key>[^"]+)":(?P<text>.*)', _wrong_value),
]
