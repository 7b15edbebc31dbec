"""Build a timm ViT, and find its weights and convert them to its names and shapes."""

import difflib
import re
import sys
from pathlib import Path
from typing import Any

import timm
from timm.layers import PatchEmbed
from torch import Tensor

from maskvlm.checkpoint.hub_client import hub_weights
from maskvlm.checkpoint.integrity import first_line
from maskvlm.checkpoint.weights import State, read_state
from maskvlm.model.feed_forward import keep_less
from maskvlm.utils.errors import ExitCode, UserError

WHERE = "model.backbone.image"
HEADS = ("head.", "head_dist.", "fc_norm.", "attn_pool.", "pre_logits.")
"""Name prefixes of tensors after the last norm in timm's ViTs, which are not used here."""


def create_vit(name: str, settings: dict[str, Any]) -> Any:
    """The bare ViT with random weights.

    Args:
        name: name of the timm model, with or without its weights tag.
        settings: arguments for `timm.create_model`.

    Raises:
        UserError: unknown model or tag, invalid settings, no class token, or no plain patch embedding (a hybrid).
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        todo = f"Did you mean {', '.join(near)}" if near else "Choose one of timm.list_models('vit*')"
        raise UserError(f"{WHERE}.name", f"timm has no model {name}", todo)
    try:
        vit: Any = timm.create_model(name, num_classes=0, **settings)
    # timm also checks settings with asserts.
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        todo = "Fix its config, or choose a ViT with a class token such as vit_base_patch16_224"
        raise UserError(WHERE, f"{name} cannot be built ({first_line(error)})", todo) from error
    # A PatchEmbed is a single convolution; timm's hybrids have a CNN instead.
    if getattr(vit, "cls_token", None) is None or not isinstance(getattr(vit, "patch_embed", None), PatchEmbed):
        what = f"{name} is not a ViT with plain patches and a class token"
        raise UserError(f"{WHERE}.name", what, "Choose one such as vit_base_patch16_224")
    # The norm after the blocks is kept: contrast compares its float32 output.
    keep_less(vit.blocks)
    return vit


def read_vit_state(name: str, weights: str | None, vit: Any) -> tuple[State, dict[str, Tensor]]:
    """Read the weights from a file or folder, or by default those that timm lists for the model.

    Returns:
        The state as stored, and converted to the names and shapes of `vit`.

    Raises:
        UserError: the weights are missing, damaged, or of an unknown format.
    """
    state = read_state(weights if weights is not None else _named(name, vit.pretrained_cfg))
    return state, _convert(state, vit)


def _named(name: str, facts: dict[str, Any]) -> Path:
    if not facts.get("hf_hub_id"):
        todo = f"Name a file ({WHERE}.weights), or start at random ({WHERE}.random_init true)"
        raise UserError(f"{WHERE}.name", f"timm has no weights for {name}", todo)
    return hub_weights(f"{name} (timm)", facts["hf_hub_id"], facts.get("hf_hub_filename"))


def _convert(state: State, vit: Any) -> dict[str, Tensor]:
    """timm's own conversion: from CLIP, DINOv2, DeiT III and others; resizes positions and patches."""
    # timm defines it in the module of the class.
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state.tensors
    try:
        converted = dict(convert(dict(state.tensors), vit))
    except Exception as error:  # an unknown format can break it anywhere
        what = f"holds no weights of this kind of model ({first_line(error)})"
        raise UserError(state.source, what, "Name weights of this very model", ExitCode.BAD_DATA) from error
    if "norm.weight" in converted:
        return converted
    # Classifiers that average the patches (BEiT, EVA) have their last norm after averaging.
    return {re.sub("^fc_norm", "norm", name): value for name, value in converted.items()}
