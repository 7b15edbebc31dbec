"""What a checkpoint may hold: a closed schema, checked before anything is built from it.

`torch.load` returns only plain types and tensors, but of any number, size and nesting: lists that hold each other, a
terabyte tensor over four bytes, labels that are not strings. A Hugging Face folder must fit the same schema.

Shapes: N images.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskvlm.config.plain_schema import Entries, Kind, Listed, Record, Text, Tree, Whole, describe_value, maybe
from maskvlm.utils.errors import ExitCode, UserError

SCHEMA = 1  # increment it when an old reader would misread a new file
PLAIN = (str, int, float, bool, type(None), bytes, torch.dtype, torch.device, torch.Size)
MOST_PARTS = 2_000_000  # containers and values in a checkpoint
MOST_NAME = 300  # characters of a tensor's name
MOST_SHARED = 4  # bytes of all tensors per byte stored: tied weights are stored once and count twice
MOST_VECTORS, MOST_WIDTH = 500, 4096  # of the images that show what a model knows
MOST_LABELS, MOST_WORDS = 1_000_000, 50_000_000  # labels, and characters of a tokenizer
TODO = "Take another checkpoint, from somebody you trust"
DTYPES = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
})  # fmt: skip


class Ids:
    """Hashes of image ids, [N], or None if a source has no ids."""

    def says(self) -> str:
        return "a one-dimensional tensor of 64-bit whole numbers"

    def fits(self, value: Any) -> bool:
        right = value is None or (isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 1)
        return right and (value is None or problem_of(value) is None)


class Vectors:
    """Features of images (`novelty.sample_of`), [N, D]."""

    def says(self) -> str:
        return f"a tensor [N, D] of finite 16-bit floats, N at most {MOST_VECTORS}, D at most {MOST_WIDTH}"

    def fits(self, value: Any) -> bool:
        right = isinstance(value, Tensor) and value.dtype == torch.float16 and value.dim() == 2
        right = right and len(value) <= MOST_VECTORS and value.shape[1] <= MOST_WIDTH and problem_of(value) is None
        return right and bool(value.isfinite().all())


LINEAGE_ENTRY = Record(
    {"task": Text(300), "source": Text(300), "sha": Text(200), "pictures": Whole(), "steps": Whole()},
    {"ids": Ids(), "held_out": maybe(Entries(Whole()))},
)
"""An entry of the lineage: data that the weights were trained on."""
LABELS = Listed(Text(), MOST_LABELS, least=1)
CONTENT_KINDS: dict[str, Kind] = {
    "labels": maybe(LABELS), "global_step": Whole(), "epoch": Whole(), "schema": Whole(), "evaluation": maybe(Tree()),
    "pytorch-lightning_version": Text(100), "known_images": maybe(Vectors()),
}  # fmt: skip
"""What is read from a checkpoint besides its tensors, model spec (`model_spec.py`), tokenizer and lineage."""


def check_content(content: Any, path: str | Path) -> dict[str, Any]:
    """Check content from `torch.load` or a folder, and return it. Keys that this project does not write are never read.

    Raises:
        UserError: it is not what this project writes, or was written in a later format (65); it holds objects with
            attributes of their own, expands to too many values, or has too many tensors over the same memory (77).
    """
    # Is it a checkpoint at all, and one that this version can read?
    if type(content) not in (dict, OrderedDict) or "state_dict" not in content:
        what = f"holds {describe_value(content)} without state_dict: bare weights, not a run's checkpoint"
        todo = "Give it as an encoder's `weights`, or name a checkpoint that this project wrote"
        raise UserError(path, what, todo, ExitCode.BAD_DATA)
    # Before the schema itself, which a later format may not fit.
    written = content.get("schema", 0)
    if type(written) is int and written > SCHEMA:
        what = f"was written in format {describe_value(written)}, this version reads up to {SCHEMA}"
        raise UserError(path, what, "Update the project", ExitCode.BAD_DATA)
    # First bound the size of the whole, then check it key by key.
    check_parts(content, path)
    check_state(content["state_dict"], path)
    Record({}, CONTENT_KINDS).read({key: content[key] for key in CONTENT_KINDS if key in content}, str(path), TODO)
    for key in ("model", "task", "tokenizer"):
        text = content.get(key, "")
        if type(text) is not str or len(text) > MOST_WORDS:
            raise UserError(f"{path}: {key}", f"expected a text, found {describe_value(text)}", TODO, ExitCode.BAD_DATA)
    history = content.get("lineage", [])
    if type(history) not in (list, tuple) or len(history) > 1000:
        what = f"expected a list of at most 1,000 entries, found {describe_value(history)}"
        raise UserError(f"{path}: lineage", what, TODO, ExitCode.BAD_DATA)
    for number, entry in enumerate(history):
        LINEAGE_ENTRY.read(entry, f"{path}: lineage[{number}]", TODO)
    return dict(content)


def leaves_of(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested plain containers, each with its key path; a container of any other type is itself a leaf."""
    if type(value) in (dict, OrderedDict):
        for name, part in value.items():
            # The key is a leaf, too: it is pickled like a value.
            yield f"{key}.{name}".lstrip("."), name
            yield from leaves_of(part, f"{key}.{name}".lstrip("."))
    elif type(value) in (list, tuple, set):
        for index, part in enumerate(value):
            yield from leaves_of(part, f"{key}[{index}]")
    else:
        yield key, value


def check_parts(content: Any, path: str | Path) -> None:
    """Check that every value is plain data or a plain tensor, and that their expanded number is bounded.

    A container referenced in several places counts in each, and is visited once.

    Raises:
        UserError: a value or key of another type, or a number of more than 64 bits (65); a tensor or mapping with
            attributes of its own, too many values, or a container that holds itself (77).
    """
    # By `id`, which stays unique while `content` holds all objects. A container is visited twice: first its parts are
    # put on the list; once they are counted, so is the container.
    sizes: dict[int, int] = {}
    todo: list[tuple[Any, str, bool]] = [(content, "", False)]
    while todo:
        value, key, ready = todo.pop()
        # A pickle can set attributes on these. torch's own `state_dict` has one, `_metadata`.
        if isinstance(value, Tensor | OrderedDict) and (getattr(value, "__dict__", {}).keys() - {"_metadata"}):
            what = f"{type(value).__name__} with attributes of its own"
            raise UserError(f"{path}: {key[1:]}", what, TODO, ExitCode.REFUSED)
        if not isinstance(value, dict | list | tuple | set | frozenset) or type(value) is torch.Size:
            if problem := _problem(value):
                raise UserError(f"{path}: {key[1:]}", problem, TODO, ExitCode.BAD_DATA)
            continue
        # Keys are checked here, their values as parts.
        parts = list(value.values()) if isinstance(value, dict) else list(value)
        if isinstance(value, dict) and not all(
            type(name) in (str, int, float, bool, type(None), tuple) for name in value
        ):
            raise UserError(f"{path}: {key[1:]}", "a key that is neither text nor a number", TODO, ExitCode.BAD_DATA)
        # All parts are counted, so this container can be.
        if ready:
            sizes[id(value)] = 1 + sum(sizes.get(id(part), 1) for part in parts)
            if sizes[id(value)] > MOST_PARTS:
                what = f"expands to more than {MOST_PARTS:,} values"
                raise UserError(f"{path}: {key[1:] or 'content'}", what, TODO, ExitCode.REFUSED)
        elif id(value) not in sizes:
            sizes[id(value)] = MOST_PARTS  # until it is known: a container that holds itself is too large
            todo.append((value, key, True))
            names = value if isinstance(value, dict) else range(len(parts))
            todo += [
                (part, f"{key}.{str(name)[:MOST_NAME]}"[-1000:], False) for name, part in zip(names, parts, strict=True)
            ]


def _problem(value: Any) -> str | None:
    if isinstance(value, Tensor):
        return problem_of(value)
    if type(value) not in PLAIN:
        return f"expected plain data, found a {type(value).__name__}"
    if type(value) is int and value.bit_length() > 64:
        return f"expected a number of at most 64 bits, found {describe_value(value)}"
    return None


def problem_of(tensor: Tensor) -> str | None:
    """Why a tensor is not plain numbers in memory of its own; None if it is."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"expected a tensor, found a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized or tensor.is_nested:
        return f"expected plain numbers, found a tensor of layout {tensor.layout} on {tensor.device.type}"
    # With a stride of 0, four bytes appear as a terabyte, and a copy would have that size.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"a tensor of {tensor.numel():,} numbers over {tensor.untyped_storage().nbytes():,} bytes"
    return None


def check_state(state: Any, path: str | Path) -> None:
    """Check that a state dict maps names of bounded length to numeric tensors. Raises UserError (65; 77 if the tensors
    are together far larger than the memory that they share)."""
    if not isinstance(state, Mapping):
        what = f"expected tensors by name, found {describe_value(state)}"
        raise UserError(f"{path}: state_dict", what, TODO, ExitCode.BAD_DATA)
    for name, value in state.items():
        if type(name) is not str or len(name) > MOST_NAME or not name.isprintable():
            raise UserError(f"{path}: state_dict", f"{describe_value(name)} is not a name", TODO, ExitCode.BAD_DATA)
        if not isinstance(value, Tensor):
            what = f"expected a tensor, found {describe_value(value)}"
            raise UserError(f"{path}: state_dict.{name}", what, TODO, ExitCode.BAD_DATA)
        if value.dtype not in DTYPES:
            what = f"expected numbers, found {value.dtype}"
            raise UserError(f"{path}: state_dict.{name}", what, TODO, ExitCode.BAD_DATA)
    # Tied weights share storage, but thousands of tensors over one storage would make a small file a large model.
    shown = sum(value.numel() * value.element_size() for value in state.values())
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    if shown > MOST_SHARED * sum(storages.values()):
        what = f"tensors of {shown:,} bytes over {sum(storages.values()):,}"
        raise UserError(f"{path}: state_dict", what, TODO, ExitCode.REFUSED)
