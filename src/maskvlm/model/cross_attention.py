"""The cross-modality encoder: blocks of self-attention, cross-attention and feed-forward (paper sec. 3, fig. 2).

Shapes: B pairs, L positions of the querying side, U rows and S positions of the other side, D width, H heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint


class KeyValue(NamedTuple):
    """Projected keys and values, [U, H, S, D/H] each ([B, ...] after `rows`); computed once for all pairs that share
    a context row."""

    key: Tensor
    value: Tensor

    def rows(self, index_B: Tensor | None) -> "KeyValue":
        """The rows of these pairs; all of them, in order, for None."""
        return self if index_B is None else KeyValue(*(part.index_select(0, index_B) for part in self))


class Context(NamedTuple):
    """What is looked at: keys and values for every block, the padding mask, and which row each pair uses."""

    blocks: list[KeyValue]
    attention_US: Tensor | None
    index_B: Tensor | None

    def mask(self, rows: slice) -> Tensor | None:
        """Mask [B, 1, 1, S] of the pairs in `rows` for scaled_dot_product_attention."""
        if self.attention_US is None:
            return None
        picked = self.attention_US if self.index_B is None else self.attention_US[self.index_B]
        # (B, S) -> (B, 1, 1, S): the same for all heads and queries.
        return picked[rows, None, None, :]


class CrossOutput(NamedTuple):
    """full_RLD: all positions of the first R pairs. cls_BD: the first position (class token) of all."""

    full_RLD: Tensor
    cls_BD: Tensor


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be kept (for cached re-ranking)."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, context_USD: Tensor) -> KeyValue:
        """Keys and values of the context, [U, H, S, D / H] each."""
        # (U, S, context width) -> (U, S, 2D) -> two of (U, S, D)
        key, value = self.key_value(context_USD).chunk(2, dim=-1)
        return KeyValue(self._split(key), self._split(value))

    def forward(
        self, x_BLD: Tensor, context: KeyValue, mask: Tensor | None, position_LD: Tensor | None = None
    ) -> Tensor:
        """Attend from the queries [B, L, D] to S keys and values, [B, L, D]. mask: bool, broadcast to [B, H, L, S],
        True where a query may attend. position_LD: added to the queries alone."""
        asking_BLD = x_BLD if position_LD is None else x_BLD + position_LD
        mixed = scaled_dot_product_attention(self._split(self.query(asking_BLD)), *context, attn_mask=mask)
        # (B, H, L, D/H) -> (B, L, D)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, H, L, D/H)


class CrossBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each followed by add and norm (post-norm, R)."""

    def __init__(self, width: int, context_width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.self_attention = Attention(width, width, heads)
        self.cross_attention = Attention(width, context_width, heads)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BLD: Tensor,
        self_mask: Tensor | None,
        context: KeyValue,
        context_mask: Tensor | None,
        first_only: bool = False,
        position_LD: Tensor | None = None,
    ) -> Tensor:
        """New features of all positions, or of the first position alone: exact, and cheaper in a last block.

        position_LD: added to what queries are made of, in both attentions.
        """
        # Keys and values of all positions, also where only the first position asks.
        own = self.self_attention.keys_values(x_BLD)
        x = x_BLD[:, :1] if first_only else x_BLD
        place = position_LD[:1] if first_only and position_LD is not None else position_LD
        # Post-norm (R): each sum is normalised.
        x = self.norms[0](x + self.dropout(self.self_attention(x, own, self_mask, place)))
        x = self.norms[1](x + self.dropout(self.cross_attention(x, context, context_mask, place)))
        return self.norms[2](x + self.dropout(self.feed_forward(x)))


class CrossEncoder(nn.Module):
    """One modality's features informed by the other's (paper: 3 blocks for each of g_im, g_txt and the decoder).

    Args:
        width, context_width: of the querying side and of the other side.
        layers, heads: number of blocks and of attention heads.
        dropout: on each residual branch, 0 to 1.
        checkpointing: recompute activations in the backward pass to save memory.
        grid: rows and columns of patches, where every query is to know its place: a learned position of each, and of
            the class token, is then added to what queries are made of in every block (as Conditional DETR gives its
            queries a spatial part, 2108.06152). Else what a masked patch asks for depends on its place only through
            features.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        layers: int = 3,
        heads: int = 12,
        dropout: float = 0.0,
        checkpointing: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.grid, self.pos_embed = grid, None
        if grid is not None:
            # (1, 1 + N, D); MaskVLM fills it with sine and cosine.
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], width))
        self.blocks = nn.ModuleList(CrossBlock(width, context_width, heads, dropout) for _ in range(layers))

    def context(
        self, context_USD: Tensor, attention_US: Tensor | None = None, index_B: Tensor | None = None
    ) -> Context:
        """Project the other side once; `index_B` names its row for each pair (None: row by row)."""
        # Each block has projections of its own: one KeyValue a block.
        attentions: list[Attention] = [block.cross_attention for block in self.blocks]  # type: ignore[misc]
        return Context([each.keys_values(context_USD) for each in attentions], attention_US, index_B)

    def forward(
        self,
        x_BLD: Tensor,
        context: Context,
        attention_BL: Tensor | None = None,
        num_full: int | None = None,
    ) -> CrossOutput:
        """Run all pairs in one pass.

        Args:
            x_BLD: the querying side, one row a pair.
            context: from `context`.
            attention_BL: padding mask of the querying side.
            num_full: the last block gives all positions of the first `num_full` pairs only (None: of all pairs);
                of the others just the first position, which is all that matching reads.
        """
        num_full = x_BLD.shape[0] if num_full is None else num_full
        # (B, L) -> (B, 1, 1, L)
        self_mask = None if attention_BL is None else attention_BL[:, None, None, :]
        all_rows = slice(None)
        place_LD = None if self.pos_embed is None else self.pos_embed[0]
        # All blocks but the last: every position of every pair.
        for block, key_value in zip(self.blocks[:-1], context.blocks[:-1], strict=True):
            mask = context.mask(all_rows)
            x_BLD = self._run(block, x_BLD, self_mask, key_value.rows(context.index_B), mask, False, place_LD)
        # The last block in two parts: all positions of the first `num_full` pairs, the first position of the others.
        last = context.blocks[-1].rows(context.index_B)
        parts = []
        for rows, first_only in ((slice(0, num_full), False), (slice(num_full, None), True)):
            mask = None if self_mask is None else self_mask[rows]
            picked = KeyValue(last.key[rows], last.value[rows])
            if x_BLD[rows].shape[0]:
                args = (x_BLD[rows], mask, picked, context.mask(rows), first_only, place_LD)
                parts.append(self._run(self.blocks[-1], *args))
        # (num_full, L, D) and (B, D); a batch without pairs leaves `parts` empty.
        whole = parts[0] if num_full else x_BLD[:0]
        return CrossOutput(whole, torch.cat([part[:, 0] for part in parts or [x_BLD]]))

    def _run(self, block: nn.Module, *args: object) -> Tensor:
        if self.checkpointing and self.training:
            # The reentrant kind does not see tensors inside a tuple, so KeyValue would get no gradient.
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)
