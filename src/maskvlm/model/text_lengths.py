"""Compute texts in groups of similar length: captions are on average half as long as the longest in the batch, and a
CPU spends time on every position. On a GPU, lengths are not read, as the host would have to wait for the device.

Shapes: B rows, T tokens, G rows of a group.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from maskvlm.utils.on_cpu import on_cpu

MANY, GROUPS = 16, 4  # minimum number of texts for grouping; number of groups


def worth_grouping(attention_BT: Tensor, pair_B: Tensor) -> bool:
    """Whether texts with this padding mask are computed in groups; `pair_B` has one row for each of them."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # a traced graph must take any number of rows
    # Read the number of rows last: during tracing, reading it would make it a constant of the graph.
    return not traced and on_cpu(attention_BT) and len(pair_B) >= MANY


def lengths_of(attention_BT: Tensor) -> Tensor:
    """Length of each text up to its last attended position, [B]. At least 1, so that no group is cut to length 0."""
    place_T = torch.arange(1, attention_BT.shape[1] + 1, device=attention_BT.device)
    return (attention_BT * place_T).amax(1).clamp(min=1)


def length_groups(length_B: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield GROUPS groups of equal size, the shortest texts first: the rows [G] and the length of the longest text."""
    # Stable: equal lengths keep their order.
    for row_G in length_B.argsort(stable=True).chunk(GROUPS):
        yield row_G, int(length_B[row_G].max())
