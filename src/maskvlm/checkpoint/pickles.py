"""A look at a checkpoint's pickle before torch unpickles it: nothing is made, the instructions are counted.

`torch.load(weights_only=True)` imports nothing of a stranger's choice, yet a few hundred bytes can ask it for gigabytes
(`bytearray`), or for the hash of a key that holds itself many times over. Neither is in a checkpoint.
"""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

from maskvlm.utils.errors import ExitCode, UserError

MOST_BYTES = 256_000_000  # of the pickle itself; tensors lie beside it
DEEPEST = 6  # tuples in tuples: those of a tensor are three deep
CALLED = re.compile(r"(?:__builtin__|builtins) bytearray|torch[\w.]* \w*(?:Tensor|Storage)")
"""What takes as much memory as it is told to when it is called; a plain tensor is made of its own bytes."""
TODO = "Take a checkpoint from a source you trust"
LEAVES = frozenset({
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "PERSID",
})  # fmt: skip
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
TAKE = {"REDUCE": 2, "NEWOBJ": 2, "STACK_GLOBAL": 2, "BINPERSID": 1}  # and leave one
DROP = {"BUILD": 1, "SETITEM": 2, "APPEND": 1, "POP": 1}  # and leave none
TO_MARK = frozenset({"SETITEMS", "APPENDS", "ADDITEMS", "POP_MARK"})


def check_pickle(path: Path) -> None:
    """Raise UserError (77) where the pickle asks for what no checkpoint holds. Damage passes: torch tells it."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        members = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
        if not members:
            return
        # torch reads the one in the folder of the first member: another would be a decoy.
        info = members[0]
        if len(members) > 1 or len({*names}) < len(names) or info.filename != f"{names[0].partition('/')[0]}/data.pkl":
            what = "more than one pickle, or a member twice, in its archive"
            raise UserError(path, what, TODO, ExitCode.REFUSED)
        if info.file_size > MOST_BYTES:
            raise UserError(path, f"its index has {info.file_size:,} bytes", TODO, ExitCode.REFUSED)
        # Stored, not compressed, so that its size is what it says (`integrity.py`).
        content = archive.read(info)
    try:
        problem = _walk(content)
    # Damaged, or a stack that does not work out: torch refuses it.
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, AttributeError, TypeError):
        return
    if problem:
        raise UserError(path, problem, TODO, ExitCode.REFUSED)


def _walk(content: bytes) -> str | None:
    """What is wrong. The stack holds how deep each value nests tuples, the names of what may be called; None is a
    mark."""
    stack: list[int | str | None] = []
    memo: dict[Any, int | str | None] = {}

    # How deep what was put on the stack since the latest mark nests tuples.
    def to_mark() -> list[int]:
        depths: list[int] = []
        while (top := stack.pop()) is not None:
            depths.append(depth_of(top))
        return depths

    def depth_of(value: int | str | None) -> int:
        return value if isinstance(value, int) else 0

    for code, value, _ in pickletools.genops(content):
        name = code.name
        if name in LEAVES:
            stack.append(0)
        # "module name", in one text.
        elif name == "GLOBAL":
            stack.append(str(value))
        elif name == "MARK":
            stack.append(None)
        elif name in TUPLES or name in ("TUPLE", "FROZENSET"):
            parts = to_mark() if name not in TUPLES else [depth_of(stack.pop()) for _ in range(TUPLES[name])]
            depth = 1 + max(parts, default=0)
            if depth > DEEPEST:
                return f"holds tuples nested more than {DEEPEST} deep"
            stack.append(depth)
        # A call: whatever it makes counts as a leaf.
        elif name in TAKE:
            called = stack[-2] if name in ("REDUCE", "NEWOBJ") else None
            if isinstance(called, str) and CALLED.fullmatch(called):
                return f"asks for a {called.split()[1]} of any size, which no checkpoint holds"
            del stack[-TAKE[name] :]
            stack.append(0)
        elif name in DROP:
            del stack[-DROP[name] :]
        elif name in TO_MARK:
            to_mark()
        elif name in ("LIST", "DICT"):
            to_mark()
            stack.append(0)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        # Numbered in the order of their noting.
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name == "DUP":
            stack.append(stack[-1])
    return None
