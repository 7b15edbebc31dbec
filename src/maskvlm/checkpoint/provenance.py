"""Where every tensor of a model comes from: loaded, resized or random; counted, printed and stored.

In related projects, ViT weights that silently failed to load cost twelve points of recall before anyone noticed. Here
every random tensor is listed.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from rich.table import Table
from torch import nn

from maskvlm.utils.whole_files import write_text

How = Literal["loaded", "resized", "random"]
HOW: tuple[How, ...] = ("loaded", "resized", "random")
NAMED = 3
"""Maximum number of random tensors, such as the mask token, that are named for a part that is otherwise loaded."""


class Origin(NamedTuple):
    """Origin of a tensor: its shape, the file it was read from, and its shape there if that was different."""

    how: How
    shape: tuple[int, ...]
    source: str = ""
    was: tuple[int, ...] | None = None

    @property
    def parameters(self) -> int:
        """Number of elements of the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Provenance:
    """Origin of each tensor, by its name in the model's state dict."""

    tensors: Mapping[str, Origin] = field(default_factory=dict)

    def under(self, prefix: str) -> "Provenance":
        """The same tensors, named as in a module that holds this one as `prefix`."""
        return Provenance({f"{prefix}.{name}": origin for name, origin in self.tensors.items()})

    def __or__(self, later: "Provenance") -> "Provenance":
        """Merge two; origins of the later one win."""
        return Provenance({**self.tensors, **later.tensors})

    def complete(self, model: nn.Module) -> "Provenance":
        """An origin for every tensor of `model`, in its order: random if it was not loaded."""
        state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        # A name that the model lacks is a bug here: `check_fit` has reported those in a file.
        strange = sorted(self.tensors.keys() - state.keys())
        assert not strange, f"loaded, but not in the model: {strange[:3]}"
        return Provenance({n: self.tensors.get(n, Origin("random", shape)) for n, shape in state.items()})

    def parts(self) -> dict[str, dict[str, Origin]]:
        """The tensors by part of the model: image, text, cross_image, ..., each head."""
        parts: dict[str, dict[str, Origin]] = {}
        for name, origin in self.tensors.items():
            parts.setdefault(part_of(name), {})[name] = origin
        return parts

    def table(self) -> Table | str:
        """Counts by part, to be printed once at the start; a single line if every tensor is random."""
        if all(origin.how == "random" for origin in self.tensors.values()):
            parameters = sum(origin.parameters for origin in self.tensors.values())
            return f"weights: all random, {len(self.tensors)} tensors, {parameters:,} parameters"
        table = Table("part", title="Where the weights come from", title_justify="left")
        for heading in (*HOW, "parameters"):
            table.add_column(heading, justify="right")
        table.add_column("from", overflow="fold")
        for part, tensors in self.parts().items():
            counts = Counter(origin.how for origin in tensors.values())
            total = f"{sum(origin.parameters for origin in tensors.values()):,}"
            table.add_row(part, *(str(counts[how] or "-") for how in HOW), total, _remark(tensors))
        return table

    def save(self, path: str | Path) -> None:
        """Write the counts by part and the origin of every tensor as JSON, atomically. Raises UserError (73, or 74 for
        a full disk)."""
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for part, tensors in self.parts().items():
            for how in HOW:
                sizes = [origin.parameters for origin in tensors.values() if origin.how == how]
                counts.setdefault(part, {})[how] = {"tensors": len(sizes), "parameters": sum(sizes)}
        # Empty fields are left out: most tensors kept their shape.
        origins = {name: {k: v for k, v in o._asdict().items() if v} for name, o in self.tensors.items()}
        write_text(Path(path), json.dumps({"parts": counts, "tensors": origins}, indent=1) + "\n")


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to: `backbone.image.vit.norm.bias` -> `image`."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first in ("backbone", "task") and rest else first


def _remark(tensors: Mapping[str, Origin]) -> str:
    """Sources, every change of shape, and the few random tensors of a part that is otherwise loaded."""
    notes = sorted({origin.source for origin in tensors.values() if origin.source})
    for name, origin in tensors.items():
        if origin.was is not None:
            notes.append(f"{_short(name)} {list(origin.was)} -> {list(origin.shape)}")
    rest = [_short(name) for name, origin in tensors.items() if origin.how == "random"]
    if rest and len(rest) < len(tensors):
        notes.append(f"random: {', '.join(rest[:NAMED])}{' ...' if len(rest) > NAMED else ''}")
    return "; ".join(notes)


def _short(name: str) -> str:
    return name.partition(f"{part_of(name)}.")[2] or name
