"""Start values of everything that does not come from a checkpoint.

| part | linear layers | why |
| --- | --- | --- |
| encoders at random (`random_init`) | Xavier uniform, bias 0 | learns at any width (MAE's rule): at width 96 contrast falls twice as fast as from N(0, 0.02) |
| contrast projections | Xavier uniform, bias 0 | likewise |
| cross encoders, pixel decoder, other heads | N(0, 0.02), bias 0 (C, BERT's rule) | post-norm blocks start near the identity; with Xavier masked words are learned late |
| norms | weight 1, bias 0 | |
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
