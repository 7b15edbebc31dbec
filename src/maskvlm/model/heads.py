"""Heads on the backbone's features; each is built by the task that uses it, to match the backbone's widths."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskvlm.model.cross_attention import CrossEncoder, gather_positions
from maskvlm.model.init import init_xavier
from maskvlm.utils.errors import UserError


def linear_in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in float32, even under autocast: the order of its outputs matters, and in bfloat16 many scores of
    a large gallery would tie. float64 stays float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


class Projection(nn.Module):
    """Unit vectors for contrast from the two class tokens, with a learnable temperature (ITC).

    Args:
        image_width, text_width: widths of the two encoders.
        dim: width of the shared space (256, C).
        temperature: initial value (0.07, C); kept within [0.001, 0.5] as in ALBEF.
        mean: also use the mean patch and the mean token, besides the class tokens (false, P). Text encoders trained as
            sentence encoders represent the meaning there (Sentence-BERT, Reimers and Gurevych 2019).
    """

    # Temperatures of 0.5 and 0.001.
    LOG_BOUNDS = (math.log(2.0), math.log(1000.0))

    def __init__(
        self, image_width: int, text_width: int, dim: int = 256, temperature: float = 0.07, mean: bool = False
    ) -> None:
        super().__init__()
        self.mean = mean
        self.image = nn.Linear((1 + mean) * image_width, dim)
        self.text = nn.Linear((1 + mean) * text_width, dim)
        # The log is trained, so that the scale is positive and steps change it by a factor.
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    @classmethod
    def shaped_as(cls, shape: Sequence[int], width: int, temperature: float = 0.07) -> "Projection":
        """New projections (Xavier) with the shape of a checkpoint's.

        Args:
            shape: shape of its image projection's weight, [E, D], or [E, 2D] if contrast also uses the means.
            width: D, of both encoders.
        """
        projection = cls(width, width, shape[0], temperature, mean=shape[1] == 2 * width)
        init_xavier(projection)
        return projection

    @property
    def logit_scale(self) -> Tensor:
        """1 / temperature, in [2, 1000]."""
        return self.log_scale.float().clamp(*self.LOG_BOUNDS).exp()

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Clamp the parameter itself before a step. `logit_scale` also clamps, so the gradient outside the bounds is 0
        and the parameter would never return (ALBEF does the same)."""
        self.log_scale.clamp_(*self.LOG_BOUNDS)

    def embed_image(self, image_BLD: Tensor, subset_BV: Tensor | None = None) -> Tensor:
        """Unit vector of an image, [B, dim].

        Args:
            image_BLD: the class token, then the patches.
            subset_BV: int64 in [0, N), counted without the class token: the patches to average; None: all.
        """
        read_BX = image_BLD[:, 0]
        if self.mean:
            patch_BND = image_BLD[:, 1:] if subset_BV is None else gather_positions(image_BLD[:, 1:], subset_BV)
            # (B, D) -> (B, 2D)
            read_BX = torch.cat([read_BX, patch_BND.mean(1)], 1)
        return F.normalize(linear_in_float32(self.image, read_BX), dim=-1)

    def embed_text(self, text_BTD: Tensor, attention_BT: Tensor) -> Tensor:
        """Unit vector of a text, [B, dim].

        Args:
            text_BTD: the start token, then the others. attention_BT: False at padding.
        """
        read_BX = text_BTD[:, 0]
        if self.mean:
            read_BX = torch.cat([read_BX, masked_mean(text_BTD, attention_BT)], 1)
        return F.normalize(linear_in_float32(self.text, read_BX), dim=-1)


def masked_mean(text_BTD: Tensor, attention_BT: Tensor) -> Tensor:
    """Mean over the tokens that are not padding, [B, D]."""
    # The divisor is never 0: even an empty text has its start and end token.
    there_BT1 = attention_BT[..., None]
    return (text_BTD * there_BT1).sum(1) / there_BT1.sum(1)


def check_temperature(temperature: float) -> None:
    """Raise UserError if a contrast temperature is outside the bounds that training keeps it in."""
    hot, cold = (math.exp(-bound) for bound in Projection.LOG_BOUNDS)
    if not cold - 1e-9 <= temperature <= hot + 1e-9:
        todo = f"Give {cold:.3g} to {hot:.3g}"
        raise UserError("model.task.temperature", f"{temperature} is beyond what training keeps it in", todo)


class Matching(nn.Module):
    """Classifies match or mismatch from the product of the two class tokens after the cross encoders (ITM, R)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, 2)

    def forward(self, fused_MD: Tensor) -> Tensor:
        """Fused vectors [M, D] to logits [M, 2] in float32: mismatch, match."""
        return linear_in_float32(self.classify, fused_MD)


class Classifier(nn.Module):
    """Two linear layers on the fused vectors of one or more images (NLVR2, SNLI-VE; R).

    Args:
        width: input width; for fused vectors, 3 * D per image.
        hidden: width between the two layers.
        labels: K, number of classes.
        dropout: dropout rate before the second layer, 0 to 1.
    """

    def __init__(self, width: int, hidden: int, labels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, labels)
        )

    @property
    def last(self) -> nn.Linear:
        """The layer that outputs the logits of the labels."""
        return self.layers[-1]  # type: ignore[return-value]

    def forward(self, fused_BD: Tensor) -> Tensor:
        """[B, width] to logits [B, labels], float32: in bfloat16 the two best of many answers would often tie."""
        return linear_in_float32(self.last, self.layers[:-1](fused_BD))


class TokenHead(nn.Module):
    """Logits over the vocabulary: one linear layer (R)."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.vocabulary = nn.Linear(width, vocab_size)

    @torch.no_grad()
    def init_from_embeddings(self, words_VD: Tensor) -> None:
        """Initialise from word embeddings, so that words of similar meaning have similar rows from the first step.

        Raises:
            UserError: the widths differ.
        """
        if words_VD.shape != self.vocabulary.weight.shape:
            what = f"words are {words_VD.shape[1]} wide, the token head reads {self.vocabulary.in_features}"
            todo = "Leave it out, or give both encoders one width"
            raise UserError("model.task.tokens_from_words", what, todo)
        self.vocabulary.weight.copy_(words_VD - words_VD.mean(0))  # the mean embedding adds the same to every logit

    @torch.no_grad()
    def init_bias_from_counts(self, count_V: Tensor) -> None:
        """Initialise from word frequencies: the bias is the log of each word's share, with add-one smoothing.

        Args:
            count_V: counts of the tokenizer's entries, which may be fewer than the rows of the head.
        """
        # Rows beyond the tokenizer's entries count as never seen.
        count_V = nn.functional.pad(count_V, (0, len(self.vocabulary.bias) - len(count_V)))
        # Add-one smoothing, so that no log is -inf.
        share_V = (count_V + 1).double() / (count_V + 1).sum()
        self.vocabulary.bias.copy_(share_V.log())

    def forward(self, text_CKD: Tensor) -> Tensor:
        """[C, K, D] to logits over the vocabulary, [C, K, V]; outside training in float32, so that no words tie."""
        return self.vocabulary(text_CKD) if self.training else linear_in_float32(self.vocabulary, text_CKD)


class WordDetector(nn.Module):
    """Logits for each image position showing each word of the vocabulary: one linear layer, [B, L, V].

    Nearly all words are absent from nearly all positions, which the initial bias reflects.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.words = nn.Linear(width, vocab_size)
        nn.init.xavier_uniform_(self.words.weight)
        # sigmoid(-4) = 0.018
        nn.init.constant_(self.words.bias, -4.0)

    def forward(self, image_BLD: Tensor) -> Tensor:
        """[B, L, D] to logits [B, L, V]."""
        return self.words(image_BLD)


class PixelDecoder(nn.Module):
    """Predicts the pixels of patches: cross-attention blocks on the unmasked text, then one linear layer (P).

    The text is the text encoder's output (C), as for the cross encoders.

    Args:
        blocks: blocks as in a cross encoder (paper: 3).
        width: width of the image features.
        values: P, the values of a patch: 3 x its side squared.
    """

    def __init__(self, blocks: CrossEncoder, width: int, values: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.pixels = nn.Linear(width, values)

    def forward(self, image_BLD: Tensor, text_BTD: Tensor, attention_BT: Tensor, index_BK: Tensor) -> Tensor:
        """Predicted values [B, K, P] of the patches at `index_BK`, int64 in [0, N), counted without the class token.
        Values are normalised pixels, or normalised per patch if the task sets `pixel_norm`."""
        # + 1: position 0 is the class token. (B, L, D) -> (B, K, D) -> (B, K, P)
        context = self.blocks.context(text_BTD, attention_BT)
        return self.pixels(self.blocks(image_BLD, context, read_RK=index_BK + 1).full_RLD)


def patchify(image_BCHW: Tensor, patch: int) -> Tensor:
    """Pixels of each patch, [B, N, patch * patch * 3]: patches row by row, values in the order row, column, channel.
    patch: side in pixels, which divides H and W."""
    rows = image_BCHW.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B C r p c q
    # (B, r, c, p, q, C) -> (B, N, P), N = r * c and P = p * q * C
    return rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patch_BNP: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of `patchify`: [B, 3, H, W]."""
    blocks = patch_BNP.unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # B r c p q C
    # (B, C, r, p, c, q) -> (B, C, H, W)
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def normalise_patches(patch_BKP: Tensor) -> Tensor:
    """Normalise each patch to mean 0 and variance 1 over its values (MAE's targets)."""
    mean, var = patch_BKP.mean(-1, keepdim=True), patch_BKP.var(-1, keepdim=True)
    # The epsilon keeps single-colour patches finite.
    return (patch_BKP - mean) / (var + 1e-6).sqrt()
