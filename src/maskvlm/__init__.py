"""MaskVLM: vision-and-language pre-training by joint masked modelling.

    from maskvlm import MaskVLM
    model = MaskVLM.from_pretrained("checkpoints/RUN/best.ckpt")

Once it is imported, transformers' AutoModel, AutoConfig and AutoProcessor know it, too.
"""

import sys
from typing import TYPE_CHECKING

__all__ = ["MaskVLM"]

# While Python looks for the module of `python -m maskvlm`, argv begins with -m: the command refuses what it can before
# seconds of imports.
if TYPE_CHECKING or sys.argv[:1] != ["-m"]:
    from maskvlm.inference.pretrained import PretrainedMaskVLM as MaskVLM
