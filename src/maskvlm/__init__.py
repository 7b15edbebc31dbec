"""MaskVLM: vision-and-language pre-training by joint masked modelling.

    from maskvlm import MaskVLM
    model = MaskVLM.from_pretrained("checkpoints/first/best.ckpt")

Importing MaskVLM also registers it with transformers' AutoModel, AutoConfig and AutoProcessor.
"""

from typing import TYPE_CHECKING

# For type checkers only; at run time, `__getattr__` below imports it.
if TYPE_CHECKING:
    from maskvlm.inference.pretrained import PretrainedMaskVLM as MaskVLM

__all__ = ["MaskVLM"]


def __getattr__(name: str) -> object:
    """Import MaskVLM lazily, so that a mistyped command does not cost seconds of imports."""
    if name != "MaskVLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from maskvlm.inference.pretrained import PretrainedMaskVLM

    return PretrainedMaskVLM
