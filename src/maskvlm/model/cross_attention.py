"""The cross-modality encoder: blocks of self-attention, cross-attention and feed-forward (paper sec. 3, fig. 2).

Shapes: B pairs, L positions of the querying modality, U rows and S positions of the other, D width, H heads.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskvlm.model.attention_kernel import attend
from maskvlm.model.feed_forward import FeedForward, LastNorm, LayerNorm
from maskvlm.model.text_lengths import length_groups, lengths_of, worth_grouping


class KeyValue(NamedTuple):
    """Projected keys and values, [U, H, S, D/H] each ([B, ...] after `rows`); computed once for all pairs that share
    a context row."""

    key: Tensor
    value: Tensor

    def rows(self, index_B: Tensor | None) -> "KeyValue":
        """The rows of these pairs; None: all, in order."""
        return self if index_B is None else KeyValue(*(part.index_select(0, index_B) for part in self))


class Context(NamedTuple):
    """What is attended to: keys and values for every block, the padding mask, and the row that each pair uses."""

    blocks: list[KeyValue]
    attention_US: Tensor | None
    index_B: Tensor | None

    def mask(self, rows: slice) -> Tensor | None:
        """Attention mask [B, 1, 1, S] of the pairs in `rows`."""
        if self.attention_US is None:
            return None
        picked = self.attention_US if self.index_B is None else self.attention_US[self.index_B]
        # (B, S) -> (B, 1, 1, S): the same for all heads and queries.
        return picked[rows, None, None, :]


class CrossOutput(NamedTuple):
    """full_RLD: features of the first R pairs at all positions, or at the requested ones. cls_BD: features of all pairs
    at the first position (class token); for the first R pairs, at the first requested position."""

    full_RLD: Tensor
    cls_BD: Tensor


Asking = slice | Tensor
"""Which positions get new features in a block: a slice, or an index [B, K]."""
ALL, FIRST = slice(None), slice(0, 1)
"""All positions; only the class token."""


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be cached (for re-ranking).

    Attributes:
        by_products: see `attention_kernel.attend`.
    """

    by_products = False

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
        True where a query may attend. position_LD: added to the input of the query projection only."""
        asking_BLD = x_BLD if position_LD is None else x_BLD + position_LD
        mixed = attend(self._split(self.query(asking_BLD)), *context, mask, self.by_products)
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
        self.feed_forward = FeedForward(width)
        self.norms = nn.ModuleList(LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BLD: Tensor,
        self_mask: Tensor | None,
        context: KeyValue,
        context_mask: Tensor | None,
        asking: Asking = ALL,
        position_LD: Tensor | None = None,
    ) -> Tensor:
        """New features of the positions `asking`: exact, and cheaper in a last block if only a few are needed.

        position_LD: added to the input of the query projections, in both attentions.
        """
        # Called on the class: a sharded block's bound methods would gather its weights, which are already here.
        x = CrossBlock.attend_self(self, x_BLD, self_mask, asking, position_LD)
        return CrossBlock.attend_other(self, x, context, context_mask, asking, position_LD)

    def keys_values(self, context_USD: Tensor) -> KeyValue:
        """Keys and values that the cross-attention computes from its context, [U, H, S, D / H] each."""
        return self.cross_attention.keys_values(context_USD)

    def attend_self(
        self, x_BLD: Tensor, self_mask: Tensor | None, asking: Asking = ALL, position_LD: Tensor | None = None
    ) -> Tensor:
        """The first part of the block, self-attention. It does not depend on the context, so a row that several pairs
        share needs it only once."""
        # Keys and values of all positions, even if only some of them query.
        own = self.self_attention.keys_values(x_BLD)
        x, place = positions_of(x_BLD, asking), places_of(position_LD, asking)
        # Post-norm (R): each sum is normalised.
        return self.norms[0](x + self.dropout(self.self_attention(x, own, self_mask, place)))

    def attend_past(self, x_BLD: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """`attend_self` for new positions, which attend to the earlier ones and each other. Returns their features, and
        keys and values of all positions. past: keys and values of the earlier positions; None if there are none."""
        own = self.self_attention.keys_values(x_BLD)
        known = own if past is None else KeyValue(*(torch.cat(pair, 2) for pair in zip(past, own, strict=True)))
        return self.norms[0](x_BLD + self.dropout(self.self_attention(x_BLD, known, None))), known

    def attend_other(
        self,
        x: Tensor,
        context: KeyValue,
        context_mask: Tensor | None,
        asking: Asking = ALL,
        position_LD: Tensor | None = None,
    ) -> Tensor:
        """The rest of the block, cross-attention and feed-forward, for the positions that `attend_self` returned."""
        place = places_of(position_LD, asking)
        x = self.norms[1](x + self.dropout(self.cross_attention(x, context, context_mask, place)))
        return self.norms[2](x + self.dropout(self.feed_forward(x)))


def positions_of(x_BLD: Tensor, asking: Asking) -> Tensor:
    """The querying positions, [B, K, D]."""
    return x_BLD[:, asking] if isinstance(asking, slice) else gather_positions(x_BLD, asking)


def places_of(position_LD: Tensor | None, asking: Asking) -> Tensor | None:
    """Position embeddings of the querying positions, [K, D] or [B, K, D]."""
    return None if position_LD is None else position_LD[asking]


def gather_positions(x_BLD: Tensor, index_BK: Tensor) -> Tensor:
    """The positions `index_BK` of each row, [B, K, D]."""
    # (B, K) -> (B, K, D): gather needs an index for each value.
    return x_BLD.gather(1, index_BK[..., None].expand(-1, -1, x_BLD.shape[-1]))


class CrossEncoder(nn.Module):
    """One modality's features, attending to the other's (paper: 3 blocks for each of g_im, g_txt and the decoder).

    Args:
        width, context_width: widths of the querying modality and of the other.
        layers, heads: number of blocks and of attention heads.
        dropout: dropout rate on each residual branch, 0 to 1.
        checkpointing: recompute activations in the backward pass to save memory.
        grid: rows and columns of patches, to add a learned position embedding of each patch, and of the class token,
            to the input of the query projections in every block (like the spatial part of Conditional DETR's queries,
            2108.06152). None: a masked patch's query depends on its position only through its features.
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
        self.groups_texts = True  # on a CPU; False if all processes must run each block equally often
        self.grid, self.pos_embed = grid, None
        if grid is not None:
            # (1, 1 + N, D); MaskVLM initialises it with sine and cosine.
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], width))
        blocks = [CrossBlock(width, context_width, heads, dropout) for _ in range(layers)]
        # Matching uses the output of the last block, and its scores are compared.
        blocks[-1].norms[2] = LastNorm(width)
        self.blocks = nn.ModuleList(blocks)

    def context(
        self, context_USD: Tensor, attention_US: Tensor | None = None, index_B: Tensor | None = None
    ) -> Context:
        """Project the other modality once; `index_B`: its row for each pair (None: row by row)."""
        # Each block has its own projections: one KeyValue per block.
        blocks: list[CrossBlock] = list(self.blocks)  # type: ignore[arg-type]
        return Context([block.keys_values(context_USD) for block in blocks], attention_US, index_B)

    def forward(
        self,
        x_ULD: Tensor,
        context: Context,
        attention_UL: Tensor | None = None,
        num_full: int | None = None,
        row_B: Tensor | None = None,
        read_RK: Tensor | None = None,
    ) -> CrossOutput:
        """Run all pairs in one pass.

        Args:
            x_ULD: the querying modality.
            context: from `context`.
            attention_UL: padding mask of the querying modality.
            num_full: the last block computes all positions only for the first `num_full` pairs (None: for all pairs);
                for the others just the first position, which is all that matching needs.
            row_B: the row of `x_ULD` that each pair queries with; None: row by row, U = B. The self-attention of the
                first block, which pairs with the same row share, is computed once.
            read_RK: the positions [R, K] of the first `num_full` pairs to return; `full_RLD` then has only these, in
                that order.
        """
        pair_B = x_ULD if row_B is None else row_B
        grouped = self.groups_texts and read_RK is None
        if grouped and attention_UL is not None and worth_grouping(attention_UL, pair_B):
            rows = torch.arange(len(pair_B), device=x_ULD.device) if row_B is None else row_B
            return self._by_length(x_ULD, context, attention_UL, len(pair_B) if num_full is None else num_full, rows)
        return self._forward(x_ULD, context, attention_UL, num_full, row_B, read_RK)

    def _by_length(
        self, x_ULD: Tensor, context: Context, attention_UL: Tensor, num_full: int, row_B: Tensor
    ) -> CrossOutput:
        """`_forward` in groups of pairs whose querying texts have similar length (`text_lengths.py`)."""
        context_row_B = torch.arange(len(row_B), device=row_B.device) if context.index_B is None else context.index_B
        groups: list[Tensor] = []
        full: list[Tensor] = []
        first: list[Tensor] = []
        for pair_G, longest in length_groups(lengths_of(attention_UL)[row_B]):
            # In every group, pairs whose positions are all needed come first.
            pair_G = pair_G[(pair_G >= num_full).argsort(stable=True)]
            row_H, of_G = row_B[pair_G].unique(return_inverse=True)
            group_context = context._replace(index_B=context_row_B[pair_G])
            asking, mask = x_ULD[row_H, :longest], attention_UL[row_H, :longest]
            out = self._forward(asking, group_context, mask, int((pair_G < num_full).sum()), of_G, None)
            groups.append(pair_G)
            # Zeros at padding, whose features are not used.
            full.append(nn.functional.pad(out.full_RLD, (0, 0, 0, x_ULD.shape[1] - longest)))
            first.append(out.cls_BD)
        pair_B = torch.cat(groups)
        # Back to the order of the pairs: argsort of a permutation is its inverse.
        order_R = pair_B[pair_B < num_full].argsort()
        return CrossOutput(torch.cat(full)[order_R], torch.cat(first)[pair_B.argsort()])

    def _forward(
        self,
        x_ULD: Tensor,
        context: Context,
        attention_UL: Tensor | None,
        num_full: int | None,
        row_B: Tensor | None,
        read_RK: Tensor | None,
    ) -> CrossOutput:
        place_LD = None if self.pos_embed is None else self.pos_embed[0]
        x_BLD, attention_BL = x_ULD, attention_UL
        blocks: list[CrossBlock] = list(self.blocks)  # type: ignore[arg-type]
        if row_B is not None:
            attention_BL = None if attention_UL is None else attention_UL[row_B]
        shared = row_B is not None and len(blocks) > 1
        if shared:
            x_BLD = self.run_part(blocks[0].attend_self, x_ULD, key_mask(attention_UL), ALL, place_LD)
        if row_B is not None:
            x_BLD = x_BLD.index_select(0, row_B)
        num_full = x_BLD.shape[0] if num_full is None else num_full
        self_mask, context_mask = key_mask(attention_BL), context.mask(slice(None))
        # All blocks except the last: every position of every pair.
        for block, key_value in zip(blocks[:-1], context.blocks[:-1], strict=True):
            context_args = (key_value.rows(context.index_B), context_mask, ALL, place_LD)
            if shared and block is blocks[0]:
                x_BLD = self.run_part(block.attend_other, x_BLD, *context_args)
            else:
                x_BLD = self.run_part(block, x_BLD, self_mask, *context_args)
        # The last block in two parts: the needed positions of the first `num_full` pairs, the first one of the others.
        last = context.blocks[-1].rows(context.index_B)
        parts: list[Tensor] = []
        read = ALL if read_RK is None else read_RK
        # split, as the gradient of two slices is a whole tensor of zeros for each, and their sum
        sizes = [num_full, x_BLD.shape[0] - num_full]
        pieces = zip(x_BLD.split(sizes), last.key.split(sizes), last.value.split(sizes), strict=True)
        asked = ((slice(0, num_full), read), (slice(num_full, None), FIRST))
        for (rows, asking), (x, key, value) in zip(asked, pieces, strict=True):
            if x.shape[0]:
                mask = None if self_mask is None else self_mask[rows]
                picked = KeyValue(key, value)
                parts.append(self.run_part(blocks[-1], x, mask, picked, context.mask(rows), asking, place_LD))
        # (num_full, L, D) and (B, D); a batch without pairs leaves `parts` empty.
        whole = parts[0] if num_full else x_BLD[:0]
        # The sum over one position is that position; if no position is needed, the sum is 0.
        return CrossOutput(whole, torch.cat([part[:, :1].sum(1) for part in parts or [x_BLD]]))

    def run_part(self, compute: Callable[..., Tensor], *args: object) -> Tensor:
        """Run a block, or part of one; with `checkpointing`, its activations are recomputed in the backward pass."""
        if self.checkpointing and self.training:
            # The reentrant variant ignores tensors inside tuples, so KeyValue would get no gradient.
            return checkpoint(compute, *args, use_reentrant=False)
        return compute(*args)


def key_mask(attention_BL: Tensor | None) -> Tensor | None:
    """A padding mask for attention, [B, 1, 1, L]: the same for all heads and queries."""
    return None if attention_BL is None else attention_BL[:, None, None, :]
