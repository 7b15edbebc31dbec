"""The cross-modality encoder: blocks of self-attention, cross-attention and feed-forward (paper sec. 3, fig. 2).

Shapes: B pairs, L positions of the querying side, U rows and S positions of the other side, D width, H heads.
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
        """The rows of these pairs; all of them, in order, for None."""
        return self if index_B is None else KeyValue(*(part.index_select(0, index_B) for part in self))


class Context(NamedTuple):
    """What is looked at: keys and values for every block, the padding mask, and which row each pair uses."""

    blocks: list[KeyValue]
    attention_US: Tensor | None
    index_B: Tensor | None

    def mask(self, rows: slice) -> Tensor | None:
        """Mask [B, 1, 1, S] of the pairs in `rows` for attention."""
        if self.attention_US is None:
            return None
        picked = self.attention_US if self.index_B is None else self.attention_US[self.index_B]
        # (B, S) -> (B, 1, 1, S): the same for all heads and queries.
        return picked[rows, None, None, :]


class CrossOutput(NamedTuple):
    """full_RLD: features of the first R pairs at all positions, or at those that were asked for. cls_BD: features of
    all pairs at the first position (class token); of the first R pairs at the first position that was asked for."""

    full_RLD: Tensor
    cls_BD: Tensor


Asking = slice | Tensor
"""Which positions get new features in a block: those of a slice, or of an index [B, K]."""
ALL, FIRST = slice(None), slice(0, 1)
"""All positions; the class token alone."""


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be kept (for cached re-ranking).

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
        True where a query may attend. position_LD: added to the queries alone."""
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
        """New features of the positions `asking`: exact, and cheaper in a last block of which few are read.

        position_LD: added to what queries are made of, in both attentions.
        """
        # Called on the class: in a sharded block the object's methods would gather its weights, which are here already.
        x = CrossBlock.attend_self(self, x_BLD, self_mask, asking, position_LD)
        return CrossBlock.attend_other(self, x, context, context_mask, asking, position_LD)

    def keys_values(self, context_USD: Tensor) -> KeyValue:
        """Keys and values that the cross-attention makes of its context, [U, H, S, D / H] each."""
        return self.cross_attention.keys_values(context_USD)

    def attend_self(
        self, x_BLD: Tensor, self_mask: Tensor | None, asking: Asking = ALL, position_LD: Tensor | None = None
    ) -> Tensor:
        """The first part of the block, self-attention. It does not depend on the context, so a row that several pairs
        share needs it only once."""
        # Keys and values of all positions, also where only some of them ask.
        own = self.self_attention.keys_values(x_BLD)
        x, place = positions_of(x_BLD, asking), places_of(position_LD, asking)
        # Post-norm (R): each sum is normalised.
        return self.norms[0](x + self.dropout(self.self_attention(x, own, self_mask, place)))

    def attend_past(self, x_BLD: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """`attend_self` for new positions, which see the earlier ones and each other. Returns their features, and keys
        and values of all positions. past: keys and values of the earlier positions; None where there are none."""
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
    """The positions that ask, [B, K, D]."""
    return x_BLD[:, asking] if isinstance(asking, slice) else gather_positions(x_BLD, asking)


def places_of(position_LD: Tensor | None, asking: Asking) -> Tensor | None:
    """Position embeddings of the positions that ask, [K, D] or [B, K, D]."""
    return None if position_LD is None else position_LD[asking]


def gather_positions(x_BLD: Tensor, index_BK: Tensor) -> Tensor:
    """The positions `index_BK` of each row, [B, K, D]."""
    # (B, K) -> (B, K, D): gather wants an index for each value.
    return x_BLD.gather(1, index_BK[..., None].expand(-1, -1, x_BLD.shape[-1]))


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
        self.groups_texts = True  # on a CPU; False where all processes must compute with a block equally often
        self.grid, self.pos_embed = grid, None
        if grid is not None:
            # (1, 1 + N, D); MaskVLM fills it with sine and cosine.
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], width))
        blocks = [CrossBlock(width, context_width, heads, dropout) for _ in range(layers)]
        # Matching reads what leaves the last block, and its scores are compared.
        blocks[-1].norms[2] = LastNorm(width)
        self.blocks = nn.ModuleList(blocks)

    def context(
        self, context_USD: Tensor, attention_US: Tensor | None = None, index_B: Tensor | None = None
    ) -> Context:
        """Project the other side once; `index_B` names its row for each pair (None: row by row)."""
        # Each block has projections of its own: one KeyValue a block.
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
            x_ULD: the querying side.
            context: from `context`.
            attention_UL: padding mask of the querying side.
            num_full: the last block gives all positions of the first `num_full` pairs only (None: of all pairs);
                of the others just the first position, which is all that matching reads.
            row_B: the row of `x_ULD` that each pair asks with; None: row by row, U = B. What pairs share is computed
                once: the self-attention of the first block.
            read_RK: the positions [R, K] of the first `num_full` pairs that are read; `full_RLD` then has these alone,
                in that order.
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
            # Pairs of which all positions are read stand in front, in every group.
            pair_G = pair_G[(pair_G >= num_full).argsort(stable=True)]
            row_H, of_G = row_B[pair_G].unique(return_inverse=True)
            group_context = context._replace(index_B=context_row_B[pair_G])
            asking, mask = x_ULD[row_H, :longest], attention_UL[row_H, :longest]
            out = self._forward(asking, group_context, mask, int((pair_G < num_full).sum()), of_G, None)
            groups.append(pair_G)
            # Zeros at padding, whose features mean nothing.
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
        # All blocks but the last: every position of every pair.
        for block, key_value in zip(blocks[:-1], context.blocks[:-1], strict=True):
            context_args = (key_value.rows(context.index_B), context_mask, ALL, place_LD)
            if shared and block is blocks[0]:
                x_BLD = self.run_part(block.attend_other, x_BLD, *context_args)
            else:
                x_BLD = self.run_part(block, x_BLD, self_mask, *context_args)
        # The last block in two parts: what is read of the first `num_full` pairs, the first position of the others.
        last = context.blocks[-1].rows(context.index_B)
        parts: list[Tensor] = []
        read = ALL if read_RK is None else read_RK
        for rows, asking in ((slice(0, num_full), read), (slice(num_full, None), FIRST)):
            if x_BLD[rows].shape[0]:
                mask = None if self_mask is None else self_mask[rows]
                picked = KeyValue(last.key[rows], last.value[rows])
                parts.append(self.run_part(blocks[-1], x_BLD[rows], mask, picked, context.mask(rows), asking, place_LD))
        # (num_full, L, D) and (B, D); a batch without pairs leaves `parts` empty.
        whole = parts[0] if num_full else x_BLD[:0]
        # The sum over one position is that position; where nothing is read there is none, and it is 0.
        return CrossOutput(whole, torch.cat([part[:, :1].sum(1) for part in parts or [x_BLD]]))

    def run_part(self, compute: Callable[..., Tensor], *args: object) -> Tensor:
        """A block, or a part of one; with `checkpointing` its activations are recomputed in the backward pass."""
        if self.checkpointing and self.training:
            # The reentrant kind does not see tensors inside a tuple, so KeyValue would get no gradient.
            return checkpoint(compute, *args, use_reentrant=False)
        return compute(*args)


def key_mask(attention_BL: Tensor | None) -> Tensor | None:
    """A padding mask for attention, [B, 1, 1, L]: the same for all heads and queries."""
    return None if attention_BL is None else attention_BL[:, None, None, :]
