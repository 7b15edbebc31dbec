"""Inspects a checkpoint's pickle before torch unpickles it: the instructions are walked through, no object is built.

`torch.load(weights_only=True)` imports nothing that the file chooses, but a few hundred bytes can make it allocate
gigabytes (`bytearray`), or hash a key that holds itself many times over. No checkpoint contains either.
"""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from maskvlm.utils.errors import ExitCode, UserError

MOST_BYTES = 256_000_000  # size of the pickle itself; tensors are stored beside it
DEEPEST = 6  # nesting of tuples: those of a tensor are three deep
CALLED = frozenset({
    "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter", "torch Size", "torch device",
})  # fmt: skip
"""The callables that build a checkpoint's tensors. Other calls that torch allows take as much memory as the file asks
for (`bytearray`), or call what they are given (`_rebuild_from_type_v2`)."""
BY_TORCH = re.compile(
    r"(?:__builtin__|builtins) (?:bytearray|complex)"
    r"|torch(?:\.(?:cuda|sparse|cuda\.sparse|storage|serialization|nn\.parameter|_utils|_tensor))? .*"
)
"""Names that torch would call. For all others torch itself raises that they could run code."""
TODO = "Take a checkpoint from a source you trust"
TEXTS = frozenset({
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
})  # fmt: skip
LEAVES = frozenset({
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "PERSID",
})  # fmt: skip
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
TAKE = {"REDUCE": 2, "NEWOBJ": 2, "STACK_GLOBAL": 2, "BINPERSID": 1}  # pop that many values and push one
DROP = {"BUILD": 1, "SETITEM": 2, "APPEND": 1, "POP": 1}  # pop that many values and push none
TO_MARK = frozenset({"SETITEMS", "APPENDS", "ADDITEMS", "POP_MARK"})


class Value(NamedTuple):
    """What is known about a value on the stack.

    Attributes:
        depth: nesting depth of its tuples.
        called: "module name" of a callable, otherwise "".
        kind: TEXT, TWO_TEXTS (a pair of strings), or "".
    """

    depth: int = 0
    called: str = ""
    kind: str = ""


TEXT, TWO_TEXTS = "text", "two texts"


def check_pickle(path: Path) -> None:
    """Raise UserError (77) if the pickle asks for what no checkpoint contains. Damage passes: torch reports it."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        members = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
        if not members:
            return
        # torch reads the one in the folder of the first member; any other would be a decoy.
        info = members[0]
        if len(members) > 1 or len({*names}) < len(names) or info.filename != f"{names[0].partition('/')[0]}/data.pkl":
            what = "more than one pickle, or a member twice, in its archive"
            raise UserError(path, what, TODO, ExitCode.REFUSED)
        if info.file_size > MOST_BYTES:
            raise UserError(path, f"its index has {info.file_size:,} bytes", TODO, ExitCode.REFUSED)
        # Stored uncompressed, so its stated size is right (`integrity.py`).
        content = archive.read(info)
    try:
        problem = _walk(content)
    # Damaged, or an inconsistent stack: torch rejects it.
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, AttributeError, TypeError):
        return
    if problem:
        raise UserError(path, problem, TODO, ExitCode.REFUSED)


def _walk(content: bytes) -> str | None:
    """What is wrong with a pickle, or None. On the stack, None stands for a mark."""
    stack: list[Value | None] = []
    memo: dict[Any, Value | None] = {}

    # Pops the values since the latest mark.
    def to_mark() -> list[Value]:
        values: list[Value] = []
        while (top := stack.pop()) is not None:
            values.append(top)
        return values

    for code, value, _ in pickletools.genops(content):
        name = code.name
        if name in LEAVES:
            stack.append(Value())
        elif name in TEXTS:
            stack.append(Value(kind=TEXT))
        # "module name", in one string.
        elif name == "GLOBAL":
            stack.append(Value(called=str(value)))
        elif name == "MARK":
            stack.append(None)
        elif name in TUPLES or name in ("TUPLE", "FROZENSET"):
            parts = to_mark() if name not in TUPLES else [stack.pop() or Value() for _ in range(TUPLES[name])]
            depth = 1 + max((part.depth for part in parts), default=0)
            if depth > DEEPEST:
                return f"holds tuples nested more than {DEEPEST} deep"
            stack.append(Value(depth, kind=TWO_TEXTS if [part.kind for part in parts] == [TEXT, TEXT] else ""))
        # A call: its result counts as a leaf.
        elif name in TAKE:
            called, given = (stack[-2], stack[-1]) if name in ("REDUCE", "NEWOBJ") else (None, None)
            if called is not None and BY_TORCH.fullmatch(called.called) and called.called not in CALLED:
                return f"calls {called.called.replace(' ', '.')[:80]!r}, which no checkpoint needs"
            # Encodes bytes given as text. On the result of another call it would grow: "hex" doubles the length.
            if called is not None and called.called == "_codecs encode" and (given is None or given.kind != TWO_TEXTS):
                return "encodes the result of another call, which no checkpoint needs"
            del stack[-TAKE[name] :]
            stack.append(Value())
        elif name in DROP:
            del stack[-DROP[name] :]
        elif name in TO_MARK:
            to_mark()
        elif name in ("LIST", "DICT"):
            to_mark()
            stack.append(Value())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        # Numbered in order of memoisation.
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name == "DUP":
            stack.append(stack[-1])
    return None
