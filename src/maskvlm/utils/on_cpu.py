"""Whether a step may ask for values."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake


def on_cpu(x: Tensor) -> bool:
    """Whether the values are at hand. A GPU's are not, as its host would wait for them; nor are those of a fake tensor,
    which has none and stands for a GPU's (`training/memory_estimate.py`)."""
    # While code is compiled, whose tensors say where they will be; `is_fake` cannot be compiled.
    return x.device.type == "cpu" and (torch.compiler.is_dynamo_compiling() or not is_fake(x))
