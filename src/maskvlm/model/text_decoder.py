"""Autoregressive text decoder with cross-attention, used for VQA answers and captions.

Shapes: A texts, S tokens of a text with its start token, U context rows, D width, V vocabulary; in a search, B rows
with K texts (beams) each, X = B * K.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskvlm.model.cross_attention import Context, CrossBlock, KeyValue
from maskvlm.model.heads import TokenHead
from maskvlm.model.init import init_normal, init_xavier
from maskvlm.model.maskvlm import MaskVLM


class SearchedTexts(NamedTuple):
    """The text found for each row.

    Attributes:
        token_BS: token ids with the start token, padded with the end token.
        mean_B: mean log probability of the tokens, including the end token, in nats; float32.
    """

    token_BS: Tensor
    mean_B: Tensor


def heads_to_start_from(
    name: str, heads: Mapping[str, Tensor], own: Iterable[str]
) -> tuple[dict[str, Tensor], set[str]]:
    """What a `TextDecoder` loads from a checkpoint's heads, for `Task.warm_start`.

    Args:
        name: name of the decoder within its task. heads: of the checkpoint's task. own: names of the task's tensors.

    Returns:
        The heads, with pre-training's token head (`tokens.`) renamed to the decoder's; a head that already has this
        name, as in a checkpoint of the same task, takes precedence. And the names of the tensors copied from the text
        cross encoder when the decoder was built, which a report must not call random.
    """
    renamed = {f"{name}.{each}": value for each, value in heads.items() if each.startswith("tokens.")}
    return {**renamed, **heads}, {each for each in own if each.startswith(f"{name}.decoder.")}


class TextDecoder(nn.Module):
    """An autoregressive decoder with the shape and initial weights of the text cross encoder.

    Its input is the text encoder's word embeddings plus its own position embeddings (C: the paper does not say).
    Embeddings whose width differs from the backbone's are followed by a linear layer.

    Args:
        backbone: sets the widths; its text cross encoder is copied.
        length: maximum text length in tokens, including start and end.
        before: additional modules by name, which precede the decoder's own in parameter order.
    """

    def __init__(self, backbone: MaskVLM, length: int, before: Mapping[str, nn.Module] = MappingProxyType({})) -> None:
        super().__init__()
        # An optimiser's state in a checkpoint is matched by the order of parameters.
        for name, part in before.items():
            self.add_module(name, part)
        self.decoder = backbone.new_cross(len(backbone.cross_text.blocks))
        self.position_SD = nn.Parameter(torch.zeros(length, backbone.width))
        self.norm = nn.LayerNorm(backbone.width)
        self.tokens = TokenHead(backbone.width, backbone.text.vocab_size)
        init_normal(self)
        # init_normal does not reach a bare parameter.
        nn.init.trunc_normal_(self.position_SD, std=0.02)
        # Not the text encoder's adapter: some encoders (ELECTRA, ALBERT) have embeddings narrower than their features.
        self.words: nn.Module = nn.Identity()
        if (own := backbone.text.word_embeddings.shape[1]) != backbone.width:
            self.words = nn.Linear(own, backbone.width)
            # As for other adapters: words keep their scale relative to the positions, whatever the widths.
            init_xavier(self.words)
        # Overwrites the random values: tasks are built after the backbone has loaded its checkpoint.
        self.decoder.load_state_dict(backbone.cross_text.state_dict())

    def embed(self, backbone: MaskVLM, token_AS: Tensor, first: int = 0) -> Tensor:
        """Input of the first block for tokens at positions starting from `first`, [A, S, D]."""
        embedded_ASD = self.words(backbone.text.model.get_input_embeddings()(token_AS))
        x_ASD: Tensor = self.norm(embedded_ASD + self.position_SD[first : first + token_AS.shape[1]])
        return x_ASD

    def forward(self, backbone: MaskVLM, context: Context, token_AS: Tensor, owner_A: Tensor) -> Tensor:
        """Logits of each next token, [A, S, V]; each position attends to itself and earlier ones.

        Args:
            context: what is attended to, from `self.decoder.context`.
            owner_A: the context row of each text.
        """
        x_ASD, steps = self.embed(backbone, token_AS), token_AS.shape[1]
        # True where a position may attend. Padding comes after a text's tokens, so no token sees it.
        causal_11SS = torch.ones(steps, steps, dtype=torch.bool, device=token_AS.device).tril()[None, None]
        text_context = context._replace(index_B=owner_A)
        mask = text_context.mask(slice(None))
        # Block by block: CrossEncoder.forward takes padding masks, not causal ones.
        for block, key_value in zip(self.decoder.blocks, text_context.blocks, strict=True):
            x_ASD = self.decoder.run_part(block, x_ASD, causal_11SS, key_value.rows(owner_A), mask)
        return self.tokens(x_ASD)

    def log_likelihood(
        self, backbone: MaskVLM, context: Context, token_AS: Tensor, attention_AS: Tensor, owner_A: Tensor
    ) -> Tensor:
        """Log probability of each whole text, including the end token, [A], nats."""
        # Position s predicts token s + 1: input without the last token, target without the start token.
        logits_ASV = self(backbone, context, token_AS[:, :-1], owner_A).float()
        target_AS = token_AS[:, 1:]
        loss_AS = F.cross_entropy(logits_ASV.transpose(1, 2), target_AS, reduction="none")
        # Summed, not averaged: the log probability of the whole text.
        return -(loss_AS * attention_AS[:, 1:]).sum(1)

    def follow(
        self, backbone: MaskVLM, context: Context, token_A: Tensor, place: int, past: Sequence[KeyValue] | None
    ) -> tuple[Tensor, list[KeyValue]]:
        """Logits of `forward` at the last position of texts whose earlier positions are already computed.

        Args:
            context: with one row for each text.
            token_A: the last token of each text.
            place: its position, 0 for the start token.
            past: keys and values of the earlier positions in each block; None at position 0.

        Returns:
            Logits of the next token, [A, V], and `past` with this position.
        """
        x_A1D, known, mask = self.embed(backbone, token_A[:, None], place), [], context.mask(slice(None))
        blocks: list[CrossBlock] = list(self.decoder.blocks)  # type: ignore[arg-type]
        for number, (block, key_value) in enumerate(zip(blocks, context.blocks, strict=True)):
            x_A1D, own = block.attend_past(x_A1D, None if past is None else past[number])
            x_A1D = block.attend_other(x_A1D, key_value, mask)
            known.append(own)
        return self.tokens(x_A1D)[:, 0], known

    @torch.no_grad()
    def search(
        self,
        backbone: MaskVLM,
        context: Context,
        rows: int,
        start: int,
        end: int,
        forbidden: Sequence[int] = (),
        beams: int = 1,
    ) -> SearchedTexts:
        """Beam search: for each row, the text with the highest mean log probability among `beams` texts.

        Each step keeps the `beams` likeliest prefixes of a row. A finished text leaves its beam empty, so one beam is
        greedy search. The last position allows only the end token.

        Args:
            context: what is attended to, by rows.
            start, end: ids of the two tokens.
            forbidden: ids of tokens that are never generated.
            beams: 1 or more.
        """
        device, longest = self.position_SD.device, len(self.position_SD)
        # The beams of a row are adjacent. Their keys and values are copied once: beams only swap within a row.
        owner_X = torch.arange(rows, device=device).repeat_interleave(beams)
        attention_XS = None if context.attention_US is None else context.attention_US[owner_X]
        beam_context = Context([key_value.rows(owner_X) for key_value in context.blocks], attention_XS, None)
        token_XS = torch.full((rows * beams, 1), start, device=device)
        # Log probability of each prefix, -inf for an empty beam. All start identically, so only the first counts.
        total_BK = torch.full((rows, beams), float("-inf"), device=device)
        total_BK[:, 0] = 0.0
        best_B = torch.full((rows,), float("-inf"), device=device)
        best_BS = torch.full((rows, longest), end, device=device)
        best_BS[:, 0] = start
        open_B = torch.full((rows,), beams, device=device)  # unfinished texts
        place_K, first_B1 = torch.arange(beams, device=device), torch.arange(rows, device=device)[:, None] * beams
        past: list[KeyValue] | None = None
        for place in range(longest - 1):
            logits_XV, past = self.follow(backbone, beam_context, token_XS[:, -1], place, past)
            log_p_XV = logits_XV.float().index_fill(1, torch.tensor([*forbidden], device=device).long(), float("-inf"))
            log_p_XV = log_p_XV.log_softmax(1)
            words = log_p_XV.shape[1]
            if place == longest - 2:
                only_V = torch.arange(words, device=device) == end
                log_p_XV = log_p_XV.masked_fill(~only_V, float("-inf"))
            # The likeliest continuations of a row's prefixes: (B, K, V) -> (B, K * V) -> (B, K)
            sum_BX = (total_BK[..., None] + log_p_XV.view(rows, beams, words)).flatten(1)
            value_BK, at_BK = sum_BX.topk(beams)
            value_BK = value_BK.masked_fill(place_K >= open_B[:, None], float("-inf"))
            from_X, word_BK = (first_B1 + at_BK // words).flatten(), at_BK % words
            token_XS = torch.cat([token_XS[from_X], word_BK.view(-1, 1)], 1)
            ended_BK = (word_BK == end) & value_BK.isfinite()
            # place + 1 tokens have been generated, including the end token.
            mean_BK = value_BK.masked_fill(~ended_BK, float("-inf")) / (place + 1)
            newest_B, which_B = mean_BK.max(1)
            better_B = newest_B > best_B
            # The previous best is shorter, and padded with end tokens.
            best_BS[better_B, : place + 2] = token_XS[(first_B1[:, 0] + which_B)[better_B]]
            best_B = torch.where(better_B, newest_B, best_B)
            open_B = open_B - ended_BK.sum(1)
            total_BK = value_BK.masked_fill(ended_BK, float("-inf"))
            if not bool(total_BK.isfinite().any()):
                break
            past = [key_value.rows(from_X) for key_value in past]
        return SearchedTexts(best_BS, best_B)
