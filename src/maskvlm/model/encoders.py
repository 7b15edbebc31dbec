"""The two unimodal encoders: any timm ViT with a class token, any Hugging Face masked language model.

Both are built with random weights. Without `random_init`, call `load_pretrained` next (for both at once:
`weights.load_pretrained`); until then, `forward` raises an error.

Shapes: B rows, C channels, H and W pixels, N patches, L = 1 + N positions (class token first), T tokens,
D width.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from maskvlm.checkpoint.model_spec import check_vit
from maskvlm.checkpoint.provenance import Provenance
from maskvlm.checkpoint.text_files import ANY_SIZE, is_type, read_text_config, read_text_state
from maskvlm.checkpoint.weights import load_state
from maskvlm.data.text import tokenizer_hash
from maskvlm.model.features import FeatureCache, Frozen, FrozenBlocks, run_blocks
from maskvlm.model.hf_text import (
    IGNORE_PADDING,
    build_text_encoder,
    check_positions,
    check_tokenizer,
    fit_config,
    pretrained_tokenizer,
    random_tokenizer,
    takes_finished_mask,
)
from maskvlm.model.init import init_xavier
from maskvlm.model.text_lengths import length_groups, lengths_of, worth_grouping
from maskvlm.model.vit_weights import HEADS, create_vit, read_vit_state
from maskvlm.utils.constructor import given_arguments
from maskvlm.utils.distributed import without_gradient
from maskvlm.utils.errors import ExitCode, UserError, check_shares
from maskvlm.utils.on_cpu import on_cpu

Triple = tuple[float, float, float]
Normalisation = Literal["model", "clip", "imagenet"]
NORMALISATIONS: dict[str, tuple[Triple, Triple]] = {
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}


class Encoder(nn.Module):
    """Base class of both encoders: checks that weights are loaded, and sets the output width.

    Attributes:
        width: D.
        detached: whether the encoder currently runs without gradient, see `encoders_frozen`.
        arguments: the arguments that it was built with.
    """

    width: int

    def __init__(self, random_init: bool) -> None:
        super().__init__()
        self.arguments = given_arguments(self)
        self.random_init = random_init
        self.ready = random_init
        self.adapter: nn.Module = nn.Identity()
        self.detached = False
        self.register_load_state_dict_post_hook(_mark_ready)

    def _check_ready(self) -> None:
        if not self.ready:
            what = f"the weights of {type(self).__name__} are not loaded"
            raise UserError("model.backbone", what, "Call load_pretrained, or set random_init")

    @property
    def stands_still(self) -> bool:
        """Whether features of whole inputs currently have no gradient: detached, and without a trainable adapter."""
        return self.detached and not any(True for _ in self.adapter.parameters())

    def _detached_if_frozen(self, compute: Callable[[], Tensor]) -> Tensor:
        """Result of `compute`, without gradient while the encoder is detached."""
        return without_gradient(compute, self) if self.detached else compute()

    def adapt(self, width: int) -> None:
        """Set the output width; adds a linear layer if the encoder's own width differs."""
        if width != self.width:
            self.adapter, self.width = nn.Linear(self.width, width), width
            init_xavier(self.adapter)


@contextmanager
def encoders_frozen(encoders: Iterable[Encoder], on: bool) -> Iterator[None]:
    """Context in which, if `on`, these encoders run without gradient; their features do not change."""
    encoders = list(encoders)
    for encoder in encoders:
        encoder.detached = on
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.detached = False


def _mark_ready(module: nn.Module, _: Any) -> None:
    """A checkpoint of the whole model also contains the encoders' weights."""
    module.ready = True  # type: ignore[assignment]


class ImageEncoder(Encoder):
    """f_im: a timm ViT with a learnable token in place of masked patches (paper: ViT-B/16).

    Args:
        name: name of the timm model, with or without its weights tag (`vit_base_patch16_224.augreg_in21k`).
        image_size: side of the square input in pixels, a multiple of the patch size.
        weights: file or folder of weights; None: those that timm lists for the model.
        random_init: keep random weights; excludes `weights`.
        config: the ViT's shape, such as patch_size, embed_dim, depth, num_heads: see `model_spec.vit_kinds`.
        normalisation: mean and standard deviation of the input: those that the weights were trained with,
            or CLIP's, or ImageNet's (C).
        drop_path: stochastic depth rate.
        checkpointing: recompute activations in the backward pass.
        frozen: number of leading blocks to freeze, along with the patch and position embeddings; `all`: the whole ViT.
            Unless masked_patches is left_out, the mask token is fixed too: to the patch embedding of a mean-colour
            patch if pretrained weights are loaded, otherwise at its value (from a checkpoint, or random).
        masked_patches: token: masked patches enter the ViT as the mask token (P). left_out: the ViT runs on the
            visible patches only, and mask tokens are inserted after it (MAE, He et al. 2022); cheaper at higher mask
            ratios. Inserted tokens have no position unless `query_positions` is set.
        feature_cache: folder that caches the outputs of the frozen blocks, so that each training image passes through
            them once; only without augmentation, or with `data.augment: mirror`, and then twice.

    Attributes:
        width: D. grid: rows and columns of patches. num_patches: N. patch_size: side of a patch in pixels.
        mean, std: input normalisation by channel, for RGB in [0, 1].
        vit: the timm model. mask_token: the learnable token, [1, 1, the ViT's own width].
        frozen_blocks: the part of the ViT that is not trained.

    Raises:
        UserError: unknown model, a setting in `config` that is not allowed (77), no class token, a drop_path outside
            [0, 1], an image_size that is not a whole number of patches, weights together with random_init, a ViT that
            does not support left_out, or as `FrozenBlocks`.
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
        frozen: Frozen = 0,
        feature_cache: str | None = None,
        masked_patches: Literal["token", "left_out"] = "token",
    ) -> None:
        super().__init__(random_init)
        check_shares({"model.backbone.image.drop_path": drop_path})
        if random_init and weights is not None:
            what = f"weights {weights} are given, and random_init is true"
            raise UserError("model.backbone.image.weights", what, "Give --model.random_init false, or no weights")
        self.name, self.image_size, self.weights, self.config = name, image_size, weights, config or {}
        check_vit(
            self.config, "model.backbone.image.config", ANY_SIZE, "Set what it knows: a checkpoint holds nothing else"
        )
        # Class token pooling keeps the last norm in `vit.norm`; with average pooling, timm moves it after the average.
        settings = {"img_size": image_size, "drop_path_rate": drop_path, "global_pool": "token"}
        self.vit = create_vit(name, settings | self.config)
        self.width = self.vit.embed_dim
        self.grid: tuple[int, int] = self.vit.patch_embed.grid_size
        self.num_patches: int = self.vit.patch_embed.num_patches
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        self._check_size()
        # `model` is not a key of NORMALISATIONS: the weights' own mean and standard deviation are used.
        facts = self.vit.pretrained_cfg
        self.mean, self.std = NORMALISATIONS.get(normalisation, (tuple(facts["mean"]), tuple(facts["std"])))
        # (1, 1, D), with the ViT's own width, before any adapter.
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.vit.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.vit.set_grad_checkpointing(checkpointing)
        self.frozen_blocks, self.feature_cache = FrozenBlocks(self.vit, frozen, feature_cache), feature_cache
        self.left_out = masked_patches == "left_out"
        if self.left_out:
            self.check_plain("model.backbone.image.masked_patches", "Set it to token")
        # Before frozen blocks the token is fixed; after the ViT it is trained, with or without frozen blocks.
        self.mask_token.requires_grad_(self.left_out or not self.frozen_blocks)

    def check_plain(self, where: str, todo: str) -> None:
        """Raises UserError if patches cannot be left out, as in a ViT that adds positions in every block."""
        if type(self.vit) is not VisionTransformer:
            raise UserError(where, f"patches can only be left out of a plain ViT, which {self.name} is not", todo)

    def _check_size(self) -> None:
        if self.image_size % self.patch_size or self.vit.patch_embed.patch_size[1] != self.patch_size:
            what = f"{self.image_size} px cannot be divided into square patches of {self.patch_size} px"
            todo = f"Set it to a multiple of {self.patch_size}"
            raise UserError("model.backbone.image.image_size", what, todo)

    def forward(
        self,
        image_BCHW: Tensor,
        mask_BN: Tensor | None = None,
        row_W: Tensor | None = None,
        visible: int | None = None,
        subset_WV: Tensor | None = None,
    ) -> Tensor:
        """Features of every position after the final norm.

        Masked patches enter as the mask token, after the patch embedding and before the position embedding
        (C, as in SimMIM): the ViT knows where they are, and every position passes through it (P). Alternatively they
        are left out, see `masked_patches`.

        Args:
            image_BCHW: normalised RGB, H = W = image_size.
            mask_BN: True on masked patches, row by row from the top left.
            row_W: rows in the cache (`Batch.feature_row_B`) of the first W images, which are unmasked; the frozen
                blocks' outputs for them may be cached (-1: not cached). None: W = 0.
            visible: upper bound on the visible patches of the remaining images; None reads it from the device.
            subset_WV: for the first W images, the indices of the patches that the trained blocks see; the other
                positions get the mask token. None: all.

        Returns:
            image_BLD: the class token, then the patches, without other prefix tokens of the ViT.

        Raises:
            UserError: the pixels are bytes.
        """
        self._check_ready()
        if not image_BCHW.is_floating_point():
            todo = "Normalise them: PairData.normalised(batch), or pixels(images) of a loaded model"
            raise UserError("ImageEncoder", f"its pixels are {image_BCHW.dtype}", todo)
        # As in the paper: whole and masked images in one pass.
        if subset_WV is None and (mask_BN is None or not self.left_out):
            return self._adapted(lambda: self._features(image_BCHW, mask_BN, row_W))
        # Otherwise sequence lengths differ: two passes, whole images first, as in the input.
        whole, parts = 0 if row_W is None else len(row_W), []
        if subset_WV is not None:
            features_WLD = self._adapted(lambda: self._forward_subset(image_BCHW[:whole], row_W, subset_WV))
            parts.append(self._insert_mask_tokens(features_WLD, subset_WV))
        elif whole:
            parts.append(self._adapted(lambda: self._features(image_BCHW[:whole], None, row_W)))
        if whole < len(image_BCHW):
            image_BCHW, mask_BN = image_BCHW[whole:], None if mask_BN is None else mask_BN[whole:]
            if mask_BN is not None and self.left_out:
                parts.append(self._forward_visible(image_BCHW, mask_BN, visible))
            else:
                parts.append(self._adapted(lambda: self._features(image_BCHW, mask_BN, None)))
        # The dtypes can differ: cached features are float32.
        return torch.cat([part.to(parts[0].dtype) for part in parts])

    def _adapted(self, compute: Callable[[], Tensor]) -> Tensor:
        """Features with the output width, [B, L, D]; `compute` runs the ViT."""
        features_BLD: Tensor = self.adapter(self._detached_if_frozen(compute))
        return features_BLD

    def _forward_visible(self, image_BCHW: Tensor, mask_BN: Tensor, visible: int | None) -> Tensor:
        """Run the ViT on the visible patches only and insert mask tokens at the masked positions, [B, 1 + N, D]. Rows
        with fewer visible patches are padded with masked ones, which attention ignores."""
        if visible is None:
            # This waits for the device; a masking that sets `visible` avoids it.
            visible = int((~mask_BN).sum(1).max())
        # (B, N) -> (B, V): the visible patches first, in order, then masked ones if a row has fewer.
        visible_BV = mask_BN.to(torch.uint8).argsort(dim=1, stable=True)[:, :visible]
        is_visible_BV = ~mask_BN.gather(1, visible_BV)
        features_BLD = self._adapted(lambda: self._forward_patches(image_BCHW, visible_BV, is_visible_BV))
        return self._insert_mask_tokens(features_BLD, visible_BV, is_visible_BV)

    def _insert_mask_tokens(
        self, features_BLD: Tensor, visible_BV: Tensor, is_visible_BV: Tensor | None = None
    ) -> Tensor:
        """Features [B, 1 + N, D]: the class token, the patches `visible_BV` at their positions, and the mask token at
        all others and where `is_visible_BV` is False."""
        # The token has the ViT's width, the features the adapter's.
        token_D = self.adapter(self.mask_token[0, 0]).to(features_BLD.dtype)
        # (B, 1 + V, D) -> (B, V, D)
        known_BVD = features_BLD[:, 1:]
        if is_visible_BV is not None:
            known_BVD = torch.where(is_visible_BV[..., None], known_BVD, token_D)
        every_BND = token_D.expand(len(visible_BV), self.num_patches, -1)
        # (B, V, D) -> (B, N, D): known patches at their positions, the token at all others.
        every_BND = every_BND.scatter(1, visible_BV[..., None].expand_as(known_BVD), known_BVD)
        return torch.cat([features_BLD[:, :1], every_BND], 1)

    def _forward_subset(self, image_BCHW: Tensor, row_B: Tensor | None, subset_BV: Tensor) -> Tensor:
        """Features of whole images, [B, 1 + V, own D]: frozen blocks see all patches, trained blocks `subset_BV`."""
        # A cached row holds the frozen blocks' output for all patches, so each step can pick a different subset.
        cache = self._cache_for(row_B)
        hidden_BLD = (
            self.frozen_blocks.forward_frozen(image_BCHW)
            if cache is None or row_B is None
            else cache.get(row_B, lambda at_M: self.frozen_blocks.forward_frozen(image_BCHW[at_M]))
        )
        return self._drop_extra_prefix(self.frozen_blocks.forward_trained(self._with_prefix(hidden_BLD, subset_BV)))

    def _with_prefix(self, hidden_BLD: Tensor, index_BV: Tensor) -> Tensor:
        """The prefix tokens and the patches `index_BV`, [B, prefix + V, D]."""
        # (B, L, D) -> (B, prefix, D) and (B, N, D)
        prefix_BLD, patch_BND = hidden_BLD.tensor_split([self.vit.num_prefix_tokens], 1)
        index_BVD = index_BV[..., None].expand(-1, -1, patch_BND.shape[-1])
        return torch.cat([prefix_BLD, patch_BND.gather(1, index_BVD)], 1)

    def _forward_patches(self, image_BCHW: Tensor, visible_BV: Tensor, is_visible_BV: Tensor) -> Tensor:
        """Features of the class token and of the patches `visible_BV`, [B, 1 + V, own D]; attention ignores those where
        `is_visible_BV` is False."""
        vit = self.vit
        # As timm's forward_features; patches are left out after positions are added.
        hidden_BLD = vit.norm_pre(self._with_prefix(vit._pos_embed(vit.patch_embed(image_BCHW)), visible_BV))
        # Prefix tokens are always visible, so no row of the mask is all -inf, whose softmax would be NaN.
        looks_BL = torch.cat([is_visible_BV.new_ones(len(is_visible_BV), vit.num_prefix_tokens), is_visible_BV], 1)
        # Added to the attention logits: (B, 1, 1, L), the same for all heads and queries.
        added_BL = torch.zeros_like(looks_BL, dtype=hidden_BLD.dtype).masked_fill(~looks_BL, float("-inf"))
        hidden_BLD = run_blocks(vit, 0, hidden_BLD, attn_mask=added_BL[:, None, None])
        return self._drop_extra_prefix(vit.norm(hidden_BLD))

    def _drop_extra_prefix(self, hidden_BLD: Tensor) -> Tensor:
        """Remove the prefix tokens other than the class token."""
        first = self.vit.num_prefix_tokens
        return hidden_BLD if first == 1 else torch.cat([hidden_BLD[:, :1], hidden_BLD[:, first:]], 1)

    def _features(self, image_BCHW: Tensor, mask_BN: Tensor | None, row_W: Tensor | None) -> Tensor:
        cache = self._cache_for(row_W)
        if cache is not None and row_W is not None:
            hidden_BLD = self._features_cached(cache, image_BCHW, mask_BN, row_W)
        else:
            # timm's own forward: works for every ViT, with activation checkpointing if enabled.
            with self._masked(mask_BN):
                hidden_BLD = self.vit.forward_features(image_BCHW)
        return self._drop_extra_prefix(hidden_BLD)

    def _cache_for(self, row_W: Tensor | None) -> FeatureCache | None:
        # In evaluation, rows belong to another split.
        return self.frozen_blocks.cache if self.training and row_W is not None else None

    def _features_cached(
        self, cache: FeatureCache, image_BCHW: Tensor, mask_BN: Tensor | None, row_W: Tensor
    ) -> Tensor:
        """`_features`, with the frozen blocks' output for the first W images read from disk."""
        whole = len(row_W)
        lower = [cache.get(row_W, lambda at_M: self.frozen_blocks.forward_frozen(image_BCHW[:whole][at_M]))]
        if whole < len(image_BCHW):
            # Masked images differ in each step: recomputed, in float32 like the cached ones.
            with self._masked(None if mask_BN is None else mask_BN[whole:]):
                lower.append(self.frozen_blocks.forward_frozen(image_BCHW[whole:]).float())
        return self.frozen_blocks.forward_trained(torch.cat(lower))

    @torch.no_grad()
    def set_mask_token_to_mean_colour(self) -> None:
        """Set the mask token to the embedding of a mean-colour patch: a frozen ViT cannot train a new one."""
        # Normalised pixels of the mean colour are 0.
        blank = self.mask_token.new_zeros(1, 3, self.image_size, self.image_size)
        self.mask_token.copy_(self.vit.patch_embed(blank).reshape(-1, self.vit.embed_dim)[0])

    @contextmanager
    def _masked(self, mask_BN: Tensor | None) -> Iterator[None]:
        """Context in which the mask token replaces masked patches. A hook after the patch embedding works for every
        timm ViT, whatever its blocks and positions; timm's `forward_features` takes no mask."""
        if mask_BN is None:
            yield
            return

        def put_mask_token(_: nn.Module, __: Any, patch: Tensor) -> Tensor:
            mask = mask_BN.view(*patch.shape[:-1], 1)  # [B, N, 1], or [B, rows, columns, 1] in some ViTs
            return torch.where(mask, self.mask_token.view(-1).to(patch.dtype), patch)

        # Removed even if the pass fails: the next pass may have no mask.
        hook = self.vit.patch_embed.register_forward_hook(put_mask_token)
        try:
            yield
        finally:
            hook.remove()

    def load_pretrained(self) -> Provenance:
        """Load the configured weights at any resolution; with random_init there are none.

        Raises:
            Unreachable: not on this machine, and the hub cannot be reached.
            UserError: the weights do not fit, or cannot be read.
        """
        if self.random_init:
            return Provenance()
        stored, state = read_vit_state(self.name, self.weights, self.vit)
        # The shapes on disk: timm's conversion has already resampled positions, which the report must mention.
        was = {name: value.shape for name, value in stored.tensors.items()}
        loaded = load_state(self.vit, state, stored.source, unused=HEADS, was=was)
        # After loading: the token is computed from the loaded patch embedding.
        if self.frozen_blocks and not self.left_out:
            self.set_mask_token_to_mean_colour()
        self.ready = True
        return loaded.under("vit")


class TextEncoder(Encoder):
    """f_txt: a Hugging Face encoder without its heads (paper: RoBERTa-base).

    Args:
        name: name of a model on the hub, a folder written by save_pretrained, or, with random_init, a model type such
            as `bert`.
        text_length: maximum sequence length in tokens, including start and end token (30, C).
        random_init: keep random weights.
        config: settings that override the model's own, such as hidden_size.
        tokenizer: name or folder; None: the model's own. A model with random weights that is not a folder has none: it
            is trained on the captions and passed to `set_tokenizer`.
        vocab_size: rows of the token embedding; None: set by the model, or with random_init by the tokenizer.
        checkpointing: recompute activations in the backward pass.

    Attributes:
        width: D. text_length, vocab_size, tokenizer: as above; tokenizer is None until it is loaded or trained. model:
            the Hugging Face model.

    Raises:
        UserError: unknown model or setting, not a masked language model, text_length beyond its positions, or, with
            random_init, a tokenizer that is missing or does not fit.
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
        super().__init__(random_init)
        self.name = name = os.path.expanduser(name)
        self.text_length = text_length
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self.tokenizer_name = tokenizer
        settings = dict(config or {}) | ({} if vocab_size is None else {"vocab_size": vocab_size})
        self.config = read_text_config(name, random_init, settings)
        if random_init:
            # Before building the model: its config must have a row for each entry and each position.
            own = random_tokenizer(name, tokenizer)
            fit_config(self.config, own, text_length, settings, keep_positions=not is_type(name))
        self.model = build_text_encoder(self.config, checkpointing)
        self.width = self.config.hidden_size
        self.vocab_size: int = self.config.vocab_size
        # Checked now, because an out-of-range position fails only at the first text of that length.
        check_positions(self.model, text_length)
        if random_init and own is not None:
            self.set_tokenizer(own)

    @property
    def mask_id(self) -> int:
        """Id of the mask token."""
        return int(self._known_tokenizer().mask_token_id)

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return int(self._known_tokenizer().pad_token_id)

    def ids_of(self, words: str) -> list[int]:
        """Token ids of words, without start and end; empty if the tokenizer does not know all of them."""
        tokenizer = self._known_tokenizer()
        ids: list[int] = tokenizer.encode(words, add_special_tokens=False)
        return [] if tokenizer.unk_token_id in ids else ids

    def _known_tokenizer(self) -> PreTrainedTokenizerFast:
        """Raises UserError if there is none yet, as in a loop of one's own with random weights."""
        if self.tokenizer is None:
            todo = "Call backbone.text.set_tokenizer(data.tokenizer) after data.setup('fit')"
            raise UserError("TextEncoder", "has no tokenizer yet", todo)
        return self.tokenizer

    @property
    def word_embeddings(self) -> Tensor:
        """One row per token of the vocabulary, [V, width of the embeddings]; in some encoders (ELECTRA, ALBERT) that is
        narrower than the features."""
        table: Tensor = self.model.get_input_embeddings().weight
        return table

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Set the tokenizer that was trained on the captions, or that comes with a checkpoint.

        Raises:
            UserError: it does not fit the model, or a different one is already set.
        """
        check_tokenizer(tokenizer, self.config)
        if self.tokenizer is not None and tokenizer_hash(self.tokenizer) != tokenizer_hash(tokenizer):
            ours, other = (f"{tokenizer_hash(t)} ({len(t)} entries)" for t in (self.tokenizer, tokenizer))
            what = f"tokenizer {other} differs from the model's, {ours}"
            raise UserError("tokenizer", what, "Use the one the model was trained with", ExitCode.BAD_DATA)
        self.tokenizer = tokenizer

    def forward(self, token_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """Features of every token.

        Args:
            token_BT: ids, padded with the tokenizer's padding id; T up to text_length.
            attention_BT: True on tokens, False on padding.

        Returns:
            text_BTD: features; values at padding are undefined.
        """
        self._check_ready()
        features_BTD: Tensor = self.adapter(self._detached_if_frozen(lambda: self._features(token_BT, attention_BT)))
        return features_BTD

    def _features(self, token_BT: Tensor, attention_BT: Tensor) -> Tensor:
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # must work for any number of rows
        if self.model.config.model_type in IGNORE_PADDING and worth_grouping(attention_BT, token_BT):
            return self._by_length(token_BT, attention_BT)
        mask = attention_BT
        if not traced and not on_cpu(token_BT) and takes_finished_mask(self.model):
            mask = attention_BT[:, None, None, :].expand(-1, 1, token_BT.shape[1], -1)
        hidden_BTD: Tensor = self.model(input_ids=token_BT, attention_mask=mask).last_hidden_state
        return hidden_BTD

    def _by_length(self, token_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """`_features` in groups of texts of similar length, each padded to its own longest text."""
        groups, parts = list[Tensor](), []
        for row_G, longest in length_groups(lengths_of(attention_BT)):
            token_GT, attention_GT = token_BT[row_G, :longest], attention_BT[row_G, :longest]
            hidden_GTD = self.model(input_ids=token_GT, attention_mask=attention_GT).last_hidden_state
            groups.append(row_G)
            # (G, longest, D) -> (G, T, D): zeros at padding, whose features are not used.
            parts.append(nn.functional.pad(hidden_GTD, (0, 0, 0, token_BT.shape[1] - longest)))
        # Back to the order of the batch: argsort of a permutation is its inverse.
        return torch.cat(parts)[torch.cat(groups).argsort()]

    def load_pretrained(self) -> Provenance:
        """Load weights and tokenizer; with random_init there are none. Raises the same errors as ImageEncoder's."""
        if self.random_init:
            return Provenance()
        state = read_text_state(self.name, self.config)
        loaded = load_state(self.model, state.tensors, state.source)
        self.set_tokenizer(pretrained_tokenizer(self.name, self.tokenizer_name))
        self.ready = True
        return loaded.under("model")
