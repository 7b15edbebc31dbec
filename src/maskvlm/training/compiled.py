"""Compiled blocks (`model.compile`): torch.compile sees one transformer block at a time, and its result is reused for
all blocks of that kind. Compile time does not grow with depth, and the code between blocks, which sorts texts by length
and gathers rows, is not compiled.

Parameters keep their names, so checkpoints are the same with and without compilation.
"""

import torch
from torch import nn

from maskvlm.model.cross_attention import CrossBlock
from maskvlm.training.sharding import blocks_of

VARIANTS = 32
"""Maximum number of graphs per function. Beyond torch's own limit of 8 a function runs uncompiled, and a cross block
alone is called in 8 ways: as an inner or the last block, for all positions, one or some, with a mask on either side."""


class CompiledCrossBlock(CrossBlock):
    """A cross block whose parts are compiled too: `Module.compile` covers only the forward pass."""

    # On the class: a function bound to the object would use that object's weights even in a copy.
    attend_self = torch.compile(CrossBlock.attend_self, dynamic=True)
    attend_other = torch.compile(CrossBlock.attend_other, dynamic=True)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of both encoders, the cross encoders and decoders, in place. Compilation happens at the first
    call, for tensors of any size.

    Args:
        model: has a `backbone` and optionally a `task`.
    """
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    # DDP exchanges gradients block by block as they arrive, so cutting a block into several graphs gains nothing.
    torch._dynamo.config.optimize_ddp = False
    for block in blocks_of(model):
        block.compile(dynamic=True)
        if type(block) is CrossBlock:
            block.__class__ = CompiledCrossBlock
