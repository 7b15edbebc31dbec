"""Compiled blocks (`model.compile`): torch.compile sees one block of a transformer at a time, and what it makes of one
is used for all of that kind. The time that takes does not grow with depth, and what lies between blocks, where texts
are sorted by length and rows are gathered, stays as it is.

Parameters keep their names, so that a checkpoint does not tell whether it was written with or without.
"""

import torch
from torch import nn

from maskvlm.model.cross_attention import CrossBlock
from maskvlm.training.sharding import blocks_of

VARIANTS = 32
"""How many graphs of one function torch may make. At its own limit of 8 it goes on uncompiled, and a cross block alone
is asked in 8 ways: as inner or last one, about all positions, one or some, with a mask on either side."""


class CompiledCrossBlock(CrossBlock):
    """A cross block whose parts are compiled, too: `Module.compile` does so with whole passes alone."""

    # Of the class: a function of the object would compute with its weights also in a copy.
    attend_self = torch.compile(CrossBlock.attend_self, dynamic=True)
    attend_other = torch.compile(CrossBlock.attend_other, dynamic=True)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of both encoders, of the cross encoders and of decoders, in place and when it is first called,
    for tensors of any size.

    Args:
        model: with a `backbone`, and maybe a `task`.
    """
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    # DDP exchanges gradients as they come, block by block: nothing is won by cutting a block into several graphs.
    torch._dynamo.config.optimize_ddp = False
    for block in blocks_of(model):
        block.compile(dynamic=True)
        if type(block) is CrossBlock:
            block.__class__ = CompiledCrossBlock
