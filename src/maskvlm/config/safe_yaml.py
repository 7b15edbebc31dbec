"""Reads untrusted YAML into plain values with a single reader; every error is one line.

Nothing here imports torch: errors are found before seconds of imports.
"""

import re
from typing import Any, NamedTuple

import yaml

from maskvlm.config.old_names import renamed
from maskvlm.utils.errors import ExitCode, UserError

MOST_BYTES, MOST_NODES, MOST_LEVELS = 100_000, 20_000, 40  # a composed configuration has 5 kB, 400 nodes, 8 levels
MOST_SHOWN = 60  # characters of a value in a message
LARGEST = 2**63
TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = {TAG + kind for kind in ("str", "int", "float", "bool", "null", "map", "seq")}


class PlainLoader(yaml.SafeLoader):
    """The only YAML reader used here: numbers such as 1e-3 are numbers, and dates are strings."""

    levels = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # counted during parsing, so that a larger tree is never built
        self.levels, self.nodes = self.levels + 1, self.nodes + 1
        if self.levels > MOST_LEVELS or self.nodes > MOST_NODES:
            what = "nested too deeply" if self.levels > MOST_LEVELS else f"more than {MOST_NODES} values"
            raise TooMuch(None, None, what, self.peek_event().start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        # not restored after an error, as the loader is used once
        self.levels -= 1
        return node


class NotPlain(UserError):
    """Text that is not plain YAML, but harmless. As the value of an option it may be a plain string."""


class TooMuch(yaml.MarkedYAMLError):
    """More than a configuration holds."""


PlainLoader.yaml_implicit_resolvers = {
    # by the first character of a text: the types that it may have
    first: [(tag, shape) for tag, shape in every if tag not in (TAG + "timestamp", TAG + "float")]
    for first, every in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PlainLoader.add_implicit_resolver(
    # YAML 1.1 requires a dot and a signed exponent: 1e-3 and 1.0e3 would be strings
    TAG + "float",
    re.compile(
        r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)
SHAPES = PlainLoader("")  # resolves the type of a text


def read_yaml(text: str, where: str) -> Any:
    """The values of plain, small YAML: dicts, lists, strings, numbers, booleans, None; none shared by an alias.

    Class paths of earlier versions are replaced by the current ones.

    Args:
        text: YAML of at most 100,000 characters.
        where: the file's name, for messages.

    Raises:
        UserError: as `check_yaml`.
    """
    root = check_yaml(text, where)
    return None if root is None else renamed(_value(root, where))


def check_yaml(text: str, where: str) -> yaml.Node | None:
    """Reject anything but plain, small YAML, before any of it is built.

    Returns:
        The tree of nodes, which know their lines; None for an empty text. `_value` turns this same tree into values.

    Raises:
        UserError: it is too large or nested too deeply, has aliases that multiply, or a tag that asks for an object
            (77); it is not YAML, a key is given twice, a value does not fit its tag, or a number is out of range (2).
    """
    if len(text) > MOST_BYTES:
        raise UserError(where, f"{len(text)} characters of YAML", "Make it smaller", ExitCode.REFUSED)
    try:
        root: yaml.Node | None = PlainLoader(text).get_single_node()
    except TooMuch as error:
        raise UserError(
            at_line(where, error.problem_mark), str(error.problem), "Write less", ExitCode.REFUSED
        ) from None
    except yaml.MarkedYAMLError as error:
        what = f"not YAML ({cut(error.problem or '')})"
        # An unclosed part is only noticed at the end of the file; the line to fix is where it begins.
        unclosed = ("while parsing a flow", "while scanning a quoted", "while scanning a simple")
        begun = str(error.context).startswith(unclosed)
        mark = error.context_mark if begun and error.context_mark else error.problem_mark
        raise NotPlain(at_line(where, mark), what, "Fix the line, or put the value in quotes") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        # a character not allowed in YAML: its position is in characters, not lines
        raise NotPlain(f"{where}:{line}", f"not YAML ({error.reason})", "Save it as UTF-8 text") from None
    except (ValueError, OverflowError):  # from an escape such as \UFFFFFFFF, or a version with thousands of digits
        raise NotPlain(where, "not YAML (a number in it is out of range)", "Write plain values") from None
    # no values have been built yet, only nodes with tags and texts
    if root is not None:
        _unfold(root, where, {})
    return root


def at_line(where: str, mark: yaml.Mark | None) -> str:
    """`FILE:LINE`, with lines counted from 1."""
    return f"{where}:{mark.line + 1}" if mark else where


def cut(text: str, most: int = MOST_SHOWN) -> str:
    """A value for a message: on one line, cut if it is long, without control characters."""
    # cut to twice the length first, as a value may be a megabyte
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text[: 2 * most]).split())
    return line if len(line) <= most and len(text) <= 2 * most else f"{line[:most]}... ({len(text)} characters)"


class Unfolded(NamedTuple):
    """Size of a node with its aliases expanded."""

    nodes: int
    levels: int


def _unfold(node: yaml.Node, where: str, known: dict[int, Unfolded | None]) -> Unfolded:
    """Check a node and compute its expanded size. Each node is visited once, so an alias bomb costs no more than its
    text. None marks the nodes being visited."""
    place = at_line(where, node.start_mark)
    _check_tag(node, where)
    # an alias is the same node object that it refers to
    if id(node) in known:
        known_size = known[id(node)]
        if known_size is None:
            raise UserError(place, "an alias to the value it is in", "Write the value out", ExitCode.REFUSED)
        return known_size
    # until its parts are visited: meeting it again means that it contains itself
    known[id(node)] = None
    parts: list[yaml.Node] = []
    # scalars have no parts
    if isinstance(node, yaml.ScalarNode):
        _scalar(node, where)
    elif node.tag != TAG + ("map" if isinstance(node, yaml.MappingNode) else "seq"):
        raise NotPlain(place, f"the tag {cut(node.tag)} does not fit its value", "Leave the tag out")
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node, where)
        parts = [part for pair in node.value for part in pair]
    else:
        parts = node.value
    # recursion is bounded, as the loader rejects deep nesting
    inner = [_unfold(part, where, known) for part in parts]
    # an alias counts as much as the value it stands for
    size = Unfolded(1 + sum(part.nodes for part in inner), 1 + max((part.levels for part in inner), default=0))
    if size.nodes > MOST_NODES or size.levels > MOST_LEVELS:
        raise UserError(place, "aliases that multiply into a huge value", "Write it out", ExitCode.REFUSED)
    known[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    names = set()
    for key, _ in node.value:
        _check_tag(key, where)
        name = _scalar(key, where) if isinstance(key, yaml.ScalarNode) else None
        # `type`: true as a key is an int for isinstance
        if not isinstance(name, str) and type(name) is not int:
            description = cut(key.value) if isinstance(key, yaml.ScalarNode) else f"that is a {key.id}"
            raise NotPlain(at_line(where, key.start_mark), f"the key {description} is not text", "Quote it")
        if name in names:
            raise NotPlain(
                at_line(where, node.start_mark), f"the key {cut(str(name))} is given twice", "Keep one of them"
            )
        names.add(name)


def _check_tag(node: yaml.Node, where: str) -> None:
    if node.tag not in PLAIN_TAGS:
        what = f"the tag {cut(node.tag)} is not allowed"
        raise UserError(at_line(where, node.start_mark), what, "Write plain values", ExitCode.REFUSED)


def _scalar(node: yaml.ScalarNode, where: str) -> Any:
    """The value of a scalar; raises UserError if its tag does not fit its text, or a number is out of range."""
    text, place = node.value, at_line(where, node.start_mark)
    if node.tag == TAG + "str":
        if yaml.reader.Reader.NON_PRINTABLE.search(text):
            raise NotPlain(place, f"the text {cut(text)} holds a control character", "Write plain text")
        return text
    # the tag that the text would have on its own; !!float 1 is fine
    implied_tag = SHAPES.resolve(yaml.ScalarNode, text, (True, False))
    if implied_tag != node.tag and (implied_tag, node.tag) != (TAG + "int", TAG + "float"):
        what = f"{cut(text)} is not what its tag {node.tag.removeprefix(TAG)} says"
        raise NotPlain(place, what, "Leave the tag out")
    try:
        # long numbers are rejected unparsed, as parsing them into an int is quadratic in their length
        value = None if len(text) > MOST_SHOWN else yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, OverflowError):  # such as 0b_
        raise NotPlain(place, f"{cut(text)} is not a number", "Put it in quotes if it is a text") from None
    # 1e999 is parsed as infinity, for which only .inf is allowed
    infinite = isinstance(value, float) and abs(value) == float("inf") and "inf" not in text.lower()
    if len(text) > MOST_SHOWN or infinite or (isinstance(value, int) and abs(value) > LARGEST):
        raise NotPlain(place, f"the number {cut(text)} is out of range", "Give one that fits 64 bits")
    return value


def _value(node: yaml.Node, where: str) -> Any:
    """The values of a checked tree."""
    if isinstance(node, yaml.MappingNode):
        return {_scalar(key, where): _value(value, where) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_value(part, where) for part in node.value]
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node, where)
