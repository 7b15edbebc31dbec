"""Whether a step may read tensor values."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake


def on_cpu(x: Tensor) -> bool:
    """Whether the values can be read without waiting. On a GPU they cannot, as the host would wait for them; nor can
    those of a fake tensor, which has none and stands for one on a GPU (`training/memory_estimate.py`)."""
    # During compilation tensors report their future device; `is_fake` cannot be compiled.
    return x.device.type == "cpu" and (torch.compiler.is_dynamo_compiling() or not is_fake(x))
