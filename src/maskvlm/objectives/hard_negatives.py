"""Hard negatives: a wrong partner for each row, drawn with probability proportional to exp(ITC logit).

Shapes: B rows of this process, G rows of all processes.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Negatives(NamedTuple):
    """index_B: int64 in [0, G), the drawn negative. weight_B: 0.0 where the row has no valid negative, else 1.0."""

    index_B: Tensor
    weight_B: Tensor


def draw_hard_negatives(logits_BG: Tensor, excluded_BG: Tensor, uniform_BG: Tensor) -> Negatives:
    """Draw one negative for each row in proportion to exp(logit), never an excluded column (paper sec. 3, ITM).

    Gumbel-max over all rows at once: no division that could be 0/0, no probabilities that could overflow, no
    copy to the host. Works in float32 whatever the precision of the logits; a NaN counts as a logit of 0.
    A row whose columns are all excluded gets index 0 and weight 0. excluded_BG: bool. uniform_BG: in [0, 1).
    """
    logits = torch.nan_to_num(logits_BG.detach().float(), nan=0.0, posinf=1e4, neginf=-1e4).clamp(-1e4, 1e4)
    # The argmax of logit + Gumbel noise is a draw from softmax(logit); -inf is never drawn.
    score = (logits + gumbel_noise(uniform_BG)).masked_fill(excluded_BG, float("-inf"))
    index_B = score.argmax(dim=1)
    return Negatives(index_B, (~excluded_BG).any(dim=1).float())


def gumbel_noise(uniform: Tensor) -> Tensor:
    """Gumbel noise from random numbers in [0, 1), finite and in float32."""
    # 1 - 1e-6 is still below 1 in float32; at 1 the noise would be infinite.
    return -torch.log(-torch.log(uniform.float().clamp(1e-9, 1 - 1e-6)))
