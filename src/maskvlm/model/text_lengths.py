"""Texts in groups of like length: captions are half as long as the longest of a batch, and a CPU pays for every
position. On a GPU lengths are not read, as that would make the host wait for the device.

Shapes: B rows, T tokens, G rows of a group.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from maskvlm.utils.on_cpu import on_cpu

MANY, GROUPS = 16, 4  # from so many texts on, they are taken in so many groups of like length


def worth_grouping(attention_BT: Tensor, pair_B: Tensor) -> bool:
    """Whether texts with this padding mask are computed in groups, where there are as many as `pair_B` has rows."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # for any number of rows
    # Last, as to ask for the number would make it a constant of what is traced.
    return not traced and on_cpu(attention_BT) and len(pair_B) >= MANY


def lengths_of(attention_BT: Tensor) -> Tensor:
    """The place of the last attended position of each text, from 1, [B]. At least 1, so that no group is cut to no
    position."""
    place_T = torch.arange(1, attention_BT.shape[1] + 1, device=attention_BT.device)
    return (attention_BT * place_T).amax(1).clamp(min=1)


def length_groups(length_B: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows [G] of each of GROUPS groups of equal size, the shortest first, and the length of its longest text."""
    # Stable: equal lengths keep their order.
    for row_G in length_B.argsort(stable=True).chunk(GROUPS):
        yield row_G, int(length_B[row_G].max())
