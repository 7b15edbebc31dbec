"""Loads weights into a module: read without running code, resized if the resolution differs, and accounted for.

A state dict that does not fit raises an error that names keys and shapes; weights are never partly loaded by accident.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models import clean_state_dict
from torch import Tensor, nn

from maskvlm.checkpoint.content import check_parts
from maskvlm.checkpoint.hub_client import WEIGHT_FILES, Unreachable
from maskvlm.checkpoint.integrity import first_line, refused_imports, verify_checkpoint
from maskvlm.checkpoint.provenance import Origin, Provenance
from maskvlm.checkpoint.tokenizer_files import file_text
from maskvlm.config.plain_schema import describe_value
from maskvlm.data.files import load_json
from maskvlm.data.safe_open import opened
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.paths import expand_user
from maskvlm.utils.whole_files import check_inside

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which training programs store weights beside other objects; averaged ones first, as in timm."""
NAMED = 3
"""Number of misfits of each kind that an error names; the others are counted."""


class Loadable(Protocol):
    """An encoder that knows where its pretrained weights are."""

    def load_pretrained(self) -> Provenance:
        """Load the weights; returns the origin of each tensor."""
        ...


def load_pretrained(image: Loadable, text: Loadable) -> Provenance:
    """Load the weights of both encoders.

    Returns:
        What was loaded, named as in a module that holds the encoders as `image` and `text`.

    Raises:
        Unreachable: weights are unavailable (66); names every such encoder, not just the first.
        UserError: weights do not fit (65), or cannot be read (as `read_state`).
    """
    provenance = Provenance()
    missing: list[str] = []
    for prefix, encoder in (("image", image), ("text", text)):
        try:
            provenance |= encoder.load_pretrained().under(prefix)
        except Unreachable as error:
            missing += error.names
    if missing:
        raise Unreachable(*missing)
    return provenance


# ---------------------------------------------------------------------- reading


class State(NamedTuple):
    """A plain state dict, and the file (and the key within it) that it was read from."""

    tensors: dict[str, Tensor]
    source: str


def read_state(path: str | Path) -> State:
    """The weights in a file, or in a folder with one of WEIGHT_FILES or with an index of several files, read without
    executing anything in it.

    Raises:
        UserError: it does not exist (66); cannot be read (74); is damaged or holds no weights (65); holds what could
            run code, is a link out of the folder, or is named by an index but lies elsewhere (77).
    """
    path = expand_user(path)
    # As in transformers, an index counts only if there is no single file: it may be left over from replaced weights.
    indexes = sorted(path.glob("*.index.json")) if path.is_dir() else []
    if indexes and not any((path / name).is_file() for name in WEIGHT_FILES):
        return _read_parts(path, indexes[0])
    path = find_weights(path)
    content = _read(path)
    key = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    # Without the prefixes that DDP and torch.compile add to names.
    tensors = clean_state_dict(content[key] if key else content)
    # Some files hold optimiser states and settings beside the weights.
    odd = [f"{k} is of type {type(v).__name__}" for k, v in tensors.items() if not isinstance(v, Tensor)]
    if odd or not tensors:
        what = f"holds no plain weights ({odd[0] if odd else 'it is empty'})"
        raise UserError(path, what, "Store a state dict of tensors", ExitCode.BAD_DATA)
    return State(tensors, f"{path}[{key}]" if key else str(path))


def _read_parts(folder: Path, index: Path) -> State:
    """Weights in several files, named by an index. Raises as `read_state`."""
    content = load_json(file_text(index).encode(), index)
    parts = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise UserError(index, "names no weights files", "Get the file again", ExitCode.BAD_DATA)
    names = sorted(set(parts.values()))
    # Only weight files in this very folder.
    if strange := [
        name for name in names if Path(name).name != name or Path(name).suffix not in (".safetensors", ".bin")
    ]:
        what = f"names {describe_value(strange[0])}, which is not a weights file beside it"
        raise UserError(index, what, "Get the folder from somebody you trust", ExitCode.REFUSED)
    tensors: dict[str, Tensor] = {}
    for name in names:
        check_inside(folder / name)
        tensors |= read_state(folder / name).tensors
    return State(tensors, str(folder))


def weight_bytes(folder: Path) -> int:
    """Total size of all weight files in a folder, in bytes."""
    files = [file for kind in ("*.safetensors", "*.bin", "*.pth") for file in folder.glob(kind)]
    return sum(file.stat().st_size for file in files if file.is_file())


def find_weights(path: Path) -> Path:
    """The file itself, or the first of WEIGHT_FILES that the folder has. Raises UserError: there is none (66), or it is
    a link out of the folder (77)."""
    if path.is_dir():
        files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not files:
            what = f"a folder without {', '.join(WEIGHT_FILES)}"
            raise UserError(path, what, "Name the file of weights", ExitCode.MISSING_INPUT)
        check_inside(files[0])
        return files[0]
    if not path.is_file():
        raise UserError(path, "no such file or folder of weights", "Check the path", ExitCode.MISSING_INPUT)
    return path


def _read(path: Path) -> dict[str, Any]:
    check_file(path)
    # The file is intact: checked against its hash, its archive's checksums or its header.
    if is_safetensors(path):
        return dict(load_file(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # weights_only raises UnpicklingError, damage can raise anything
        what = f"holds more than weights, and that could run code ({refused_imports(error)})"
        raise UserError(path, what, "Store its tensors with safetensors", ExitCode.REFUSED) from error
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        what = f"holds a {type(content).__name__}, not a state dict"
        raise UserError(path, what, "Store a state dict of tensors", ExitCode.BAD_DATA)
    check_parts(content, path)
    return dict(content)


def check_file(path: Path) -> None:
    """Raise UserError unless the file is an intact safetensors file or an intact archive of torch.save (65; 77 for a
    pickle that could run code)."""
    if not is_safetensors(path):
        return verify_checkpoint(path)
    try:
        # Opening checks the header against the size of the file; no tensor is read.
        safe_open(path, "pt").keys()
    except SafetensorError as error:
        what = f"truncated or damaged ({first_line(error)})"
        raise UserError(path, what, "Get the file again", ExitCode.BAD_DATA) from error


def is_safetensors(path: Path) -> bool:
    """Whether a file is in safetensors format, judged by its content: 8 bytes with the header's length, then JSON.
    Raises UserError as `opened`."""
    with opened(path) as file:
        return file.read(9)[8:] == b"{"


# ---------------------------------------------------------------------- fitting


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    resize: bool = True,
    new: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
    was: Mapping[str, torch.Size] | None = None,
) -> Provenance:
    """Load a state dict into a module; every tensor of both must have its counterpart.

    Args:
        model: the module to load into; unchanged if an error is raised.
        state: plain tensors by name.
        source: where they come from, for the report and for errors.
        resize: resample position embeddings of another resolution (`resize_positions`).
        new: name prefixes of tensors of the model that may be absent from the state; they keep their values.
        unused: name prefixes of tensors of the state that are ignored.
        was: original shapes of tensors whose shape the caller changed in a conversion.

    Returns:
        The origin of each loaded tensor.

    Raises:
        UserError: shapes or kinds of numbers differ, names are missing or left over, or values are not finite (65).
    """
    wanted = {name: value for name, value in state.items() if not (unused and name.startswith(unused))}
    fitted = resize_positions(wanted, model) if resize else wanted
    # Everything is checked before the first value changes. Not strict, as tensors in `new` may be missing.
    check_fit(model, fitted, source, new)
    check_finite_weights(fitted, source)
    model.load_state_dict(fitted, strict=False)
    # Shapes as they were in the file, for the report.
    before = {name: tuple(value.shape) for name, value in wanted.items()}
    before |= {name: tuple(shape) for name, shape in (was or {}).items() if name in before}
    return Provenance({name: _origin(tuple(v.shape), before[name], source) for name, v in fitted.items()})


def _origin(shape: tuple[int, ...], before: tuple[int, ...], source: str) -> Origin:
    return Origin("loaded", shape, source) if shape == before else Origin("resized", shape, source, before)


def resize_positions(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state with every ViT's position embedding resampled to its resolution in `model`.

    Bicubic with antialiasing, by timm; class and register tokens keep theirs. An embedding of another width, or of a
    grid that is not square, is left as it is.
    """
    resized = dict(state)
    for name, part in model.named_modules():
        # [1, prefix + N, D] -> [1, prefix + N of the model's grid, D]; the prefix is class and register tokens.
        key = f"{name}.pos_embed".lstrip(".")
        ours, theirs = getattr(part, "pos_embed", None), state.get(key)
        size = part.patch_embed.grid_size if hasattr(part, "patch_embed") else getattr(part, "grid", None)
        if not isinstance(ours, Tensor) or theirs is None or size is None:
            continue
        # timm: with `no_embed_class` only patches have positions.
        prefix = 0 if getattr(part, "no_embed_class", False) else getattr(part, "num_prefix_tokens", 1)
        if ours.shape != theirs.shape and _is_square(theirs, ours, prefix):
            resized[key] = resample_abs_pos_embed(theirs, size, num_prefix_tokens=prefix)
    return resized


def _is_square(theirs: Tensor, ours: Tensor, prefix: Any) -> bool:
    if theirs.dim() != 3 or theirs.shape[-1] != ours.shape[-1] or theirs.shape[1] <= prefix:
        return False
    # timm assumes that the old grid is square.
    positions = theirs.shape[1] - int(prefix)
    return bool(round(positions**0.5) ** 2 == positions)


def check_fit(model: nn.Module, state: Mapping[str, Tensor], source: str, new: tuple[str, ...] = ()) -> None:
    """Raise UserError (65) unless names, shapes and kinds of numbers match the model, possibly on the meta device."""
    # Report all misfits at once, counted by kind: a wrong size shows in many tensors.
    own = model.state_dict()
    reshaped = [
        f"{name} {list(state[name].shape)} -> {list(value.shape)}"
        for name, value in own.items()
        if name in state and value.shape != state[name].shape
    ]
    # Any precision is accepted, but integers in place of weights would be copied silently.
    others = [
        f"{name} {state[name].dtype} -> {value.dtype}"
        for name, value in own.items()
        if name in state and value.is_floating_point() != state[name].is_floating_point()
    ]
    missing = [name for name in own if name not in state and not (new and name.startswith(new))]
    surplus = [name for name in state if name not in own]
    misfits = (
        _count(reshaped, "of another shape"),
        _count(others, "of another kind of number"),
        _count(missing, f"missing of the model's {len(own)}"),
        _count(surplus, f"left over of the file's {len(state)}"),
    )
    if any(misfits):
        what = f"does not fit {type(model).__name__}: {'; '.join(filter(None, misfits))}"
        raise UserError(source, what, _advice(reshaped, others or missing or surplus), ExitCode.BAD_DATA)


def check_finite_weights(state: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError (65) if a value is infinite or NaN."""
    broken = [n for n, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if broken:
        what = f"holds numbers that are not finite: {_count(broken, 'tensors')}"
        raise UserError(source, what, "Use an earlier checkpoint", ExitCode.BAD_DATA)


def _count(names: Iterable[str], kind: str) -> str:
    names = list(names)
    if not names:
        return ""
    return f"{len(names)} {kind} ({', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''})"


def _advice(reshaped: list[str], others: list[str]) -> str:
    # The usual causes if only one kind of tensor does not fit: resolution, then vocabulary.
    if reshaped and not others and all("pos_embed" in text for text in reshaped):
        return "Set image_size to the one it was trained with, or allow resizing"
    if reshaped and not others and all("word_embeddings" in text for text in reshaped):
        return "It was trained with another vocabulary: take its tokenizer and vocab_size"
    return "Name weights of this very model, or set the model's name and config to theirs"
