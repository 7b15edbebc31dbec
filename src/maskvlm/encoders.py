"""The two unimodal encoders: any timm ViT, any Hugging Face masked language model.

Shapes: B rows, C channels, H and W pixels, N patches, L = 1 + N positions (class token first),
T tokens, D width.
"""

import difflib
from typing import Any, Literal

import timm
import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import BoolTensor, Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModel, PreTrainedTokenizerFast

from maskvlm.data.text import tokenizer_hash
from maskvlm.errors import UserError

Normalisation = Literal["model", "clip", "imagenet"]
NORMALISATIONS = {
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}


class ImageEncoder(nn.Module):
    """f_im: a timm ViT with a learnable token in the place of masked patches (paper: ViT-B/16).

    Args:
        name: of the timm model; it needs a class token.
        image_size: side of the square input in pixels, a multiple of the patch size.
        weights: file of weights; None takes the ones timm names.
        random_init: start from random weights instead.
        config: arguments for `timm.create_model`, such as patch_size, embed_dim, depth, num_heads.
        normalisation: mean and standard deviation of the input: those the weights were trained with (C), or
            CLIP's, or ImageNet's.
        drop_path: rate of stochastic depth.
        checkpointing: recompute activations in the backward pass.

    Raises:
        UserError: no such model, no class token, an image_size that does not hold whole patches.
    """

    def __init__(
        self,
        name: str = "vit_base_patch16_224",
        image_size: int = 224,
        weights: str | None = None,
        random_init: bool = False,
        config: dict[str, Any] | None = None,
        normalisation: Normalisation = "model",
        drop_path: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.image_size, self.weights, self.random_init = name, image_size, weights, random_init
        settings = {"img_size": image_size, "drop_path_rate": drop_path, "global_pool": "token"}
        self.vit = _create_vit(name, settings | (config or {}))
        self.width: int = self.vit.embed_dim
        self.grid: tuple[int, int] = self.vit.patch_embed.grid_size
        self.num_patches: int = self.vit.patch_embed.num_patches
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        if image_size % self.patch_size:
            raise UserError(
                "model.backbone.image.image_size",
                f"{image_size} px do not hold whole patches of {self.patch_size} px",
                f"Set it to a multiple of {self.patch_size}",
            )
        facts = self.vit.pretrained_cfg
        self.mean, self.std = NORMALISATIONS.get(normalisation, (tuple(facts["mean"]), tuple(facts["std"])))
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.vit.set_grad_checkpointing(checkpointing)

    def forward(self, image_BCHW: Tensor, mask_BN: BoolTensor | None = None) -> Tensor:
        """Features of every position after the final norm.

        Masked patches enter as the mask token, after the patch embedding and before the position embedding
        (SimMIM's way), so the ViT knows where they are and every position passes through it.

        Args:
            image_BCHW: normalised RGB, H = W = image_size.
            mask_BN: True on masked patches, row by row from the top left.

        Returns:
            image_BLD: the class token, then the patches; other prefix tokens of the ViT are left out.
        """
        hidden_BND = self.vit.patch_embed(image_BCHW)
        if mask_BN is not None:
            hidden_BND = torch.where(mask_BN[..., None], self.mask_token.to(hidden_BND.dtype), hidden_BND)
        hidden_BLD = self.vit.norm_pre(self.vit.patch_drop(self.vit._pos_embed(hidden_BND)))
        hidden_BLD = self.vit.norm(self.vit.blocks(hidden_BLD))
        patch_BND = hidden_BLD[:, self.vit.num_prefix_tokens :]
        return torch.cat([hidden_BLD[:, :1], patch_BND], 1)


def _create_vit(name: str, settings: dict[str, Any]) -> Any:
    where = "model.backbone.image"
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise UserError(where, f"timm has no model {name}", f"Did you mean {', '.join(near) or 'a vit_...'}")
    try:
        vit = timm.create_model(name, num_classes=0, **settings)
    except (TypeError, AssertionError) as error:
        raise UserError(where, f"{name} cannot be built ({error})", "Mend its `config`") from error
    if getattr(vit, "cls_token", None) is None or not hasattr(vit, "patch_embed"):
        what = f"{name} is no ViT with a class token, which contrast and matching read"
        raise UserError(where, what, "Choose one such as vit_base_patch16_224")
    return vit


class TextEncoder(nn.Module):
    """f_txt: a Hugging Face encoder without its pooling head (paper: RoBERTa-base).

    Args:
        name: of a model on the hub, a folder, or with random_init a model type such as `bert`.
        text_length: longest sequence in tokens, start and end token included (30, C).
        random_init: start from random weights instead of the model's own.
        config: settings that replace the model's own, such as hidden_size.
        tokenizer: name or folder; None takes the model's own, or with random_init none: it is trained on the
            captions and handed to `set_tokenizer`.
        vocab_size: rows of the embedding; None leaves it to the model.
        checkpointing: recompute activations in the backward pass.

    Raises:
        UserError: no such model, no masked language model, text_length beyond its positions.
    """

    def __init__(
        self,
        name: str = "roberta-base",
        text_length: int = 30,
        random_init: bool = False,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.text_length, self.random_init = name, text_length, random_init
        settings = {"pad_token_id": 0, "max_position_embeddings": text_length + 1, **(config or {})}
        if vocab_size is not None:
            settings["vocab_size"] = vocab_size
        facts = AutoConfig.for_model(name, **settings)
        if type(facts) not in MODEL_FOR_MASKED_LM_MAPPING or facts.is_encoder_decoder:
            what = f"{name} is no masked language model"
            raise UserError("model.backbone.text", what, "Take one such as roberta-base")
        self.bert = AutoModel.from_config(facts, attn_implementation="sdpa")
        self.bert.pooler = None  # nothing reads it, and DDP would wait for its gradients
        self.width: int = facts.hidden_size
        self.vocab_size: int = facts.vocab_size
        self.tokenizer: PreTrainedTokenizerFast | None = None
        if checkpointing:
            self.bert.gradient_checkpointing_enable({"use_reentrant": False})

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Take over the tokenizer that was trained on the captions, or that a checkpoint brings.

        Raises:
            UserError: it does not fit, or another one is in place.
        """
        if self.tokenizer is not None and tokenizer_hash(self.tokenizer) != tokenizer_hash(tokenizer):
            ours, other = (f"{tokenizer_hash(t)} ({len(t)} entries)" for t in (self.tokenizer, tokenizer))
            what = f"{other} differs from the model's {ours}"
            raise UserError("tokenizer", what, "Use the one the model was trained with")
        self.tokenizer = tokenizer

    def forward(self, token_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """Features of every token.

        Args:
            token_BT: ids, padded on the right.
            attention_BT: True on tokens, False on padding.

        Returns:
            text_BTD: what stands at padding is meaningless.
        """
        features_BTD: Tensor = self.bert(input_ids=token_BT, attention_mask=attention_BT).last_hidden_state
        return features_BTD
