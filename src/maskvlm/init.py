"""Start values of everything that does not come from a checkpoint.

| part | linear layers |
| --- | --- |
| encoders with `random_init`, contrast projections | Xavier uniform, bias 0 (MAE's rule) |
| cross encoders, pixel decoder, other heads | N(0, 0.02), bias 0 (C, BERT's rule) |

Norms start at weight 1 and bias 0. Xavier follows the width: at width 96 contrast falls about twice as fast as from
N(0, 0.02), which suits a width of 768. Post-norm cross blocks do better near the identity: with Xavier masked words
were learned much later (loss 3.65 instead of 2.37 after 200 steps).
"""

from torch import nn


def init_normal(module: nn.Module, std: float = 0.02) -> None:
    """Linear layers N(0, std) cut at two standard deviations, biases 0, norms 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
        _rest(part)


def init_xavier(module: nn.Module) -> None:
    """Linear layers Xavier uniform, biases 0, norms 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
        _rest(part)


def _rest(part: nn.Module) -> None:
    if isinstance(part, nn.Linear) and part.bias is not None:
        nn.init.zeros_(part.bias)
    elif isinstance(part, nn.LayerNorm):
        nn.init.ones_(part.weight)
        nn.init.zeros_(part.bias)
