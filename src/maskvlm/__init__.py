"""MaskVLM: vision-and-language pre-training by joint masked modelling.

    from maskvlm import MaskVLM
    model = MaskVLM.from_pretrained("checkpoints/first/best.ckpt")

Once MaskVLM is imported, transformers' AutoModel, AutoConfig and AutoProcessor know it, too.
"""

from typing import TYPE_CHECKING

# For type checkers alone; at run time `__getattr__` below imports it.
if TYPE_CHECKING:
    from maskvlm.inference.pretrained import PretrainedMaskVLM as MaskVLM

__all__ = ["MaskVLM"]


def __getattr__(name: str) -> object:
    """MaskVLM, imported when it is first asked for: a command with a wrong word must not cost seconds of imports."""
    if name != "MaskVLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from maskvlm.inference.pretrained import PretrainedMaskVLM

    return PretrainedMaskVLM
