"""The generative answer head: a fusion block, then an autoregressive decoder (paper sec. 4, VQA; R).

Shapes: B questions, A answers, T tokens of a question, S tokens of an answer with its start token, L image positions,
D width, V vocabulary, K candidate answers.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskvlm.model.cross_attention import Context
from maskvlm.model.heads import TokenHead
from maskvlm.model.init import init_normal, init_xavier
from maskvlm.model.maskvlm import MaskVLM


class Question(NamedTuple):
    """What the decoder looks at: keys and values of each block, once for all answers to the same questions."""

    context: Context

    def rows(self, index_A: Tensor) -> Context:
        """The question of each answer."""
        return self.context._replace(index_B=index_A)


class AnswerDecoder(nn.Module):
    """Reads image and question, writes an answer token by token.

    The fusion block queries with the text cross encoder's output and looks at the image cross encoder's. The decoder
    has the text cross encoder's shape and starts from its weights; its words enter through the text encoder's word
    embeddings with positions of their own (C: the paper does not say). Embeddings of another width than the backbone's
    get a linear layer behind them.

    Args:
        backbone: fits the widths; its text cross encoder is copied.
        length: longest answer in tokens, start and end included.
    """

    def __init__(self, backbone: MaskVLM, length: int) -> None:
        super().__init__()
        self.fusion = backbone.new_cross(1)
        self.decoder = backbone.new_cross(len(backbone.cross_text.blocks))
        self.position_SD = nn.Parameter(torch.zeros(length, backbone.width))
        self.norm = nn.LayerNorm(backbone.width)
        self.tokens = TokenHead(backbone.width, backbone.text.vocab_size)
        init_normal(self)
        # init_normal does not reach a bare parameter.
        nn.init.trunc_normal_(self.position_SD, std=0.02)
        # Not the adapter behind the text encoder: some encoders (ELECTRA, ALBERT) have embeddings narrower than their
        # features.
        self.words: nn.Module = nn.Identity()
        if (own := backbone.text.word_embeddings.shape[1]) != backbone.width:
            self.words = nn.Linear(own, backbone.width)
            # As other adapters: words keep their size beside the positions, whatever the widths are.
            init_xavier(self.words)
        # Over the random values: tasks are built when the backbone has its checkpoint's weights.
        self.decoder.load_state_dict(backbone.cross_text.state_dict())

    def read(self, backbone: MaskVLM, image_BLD: Tensor, text_BTD: Tensor, attention_BT: Tensor) -> Question:
        """Image and question, whole, through both cross encoders and the fusion block."""
        image = backbone.cross_image(image_BLD, backbone.cross_image.context(text_BTD, attention_BT)).full_RLD
        text = backbone.cross_text(text_BTD, backbone.cross_text.context(image_BLD), attention_BT).full_RLD
        # Queries are the text's positions, keys and values the image's: (B, T, D).
        fused_BTD = self.fusion(text, self.fusion.context(image), attention_BT).full_RLD
        return Question(self.decoder.context(fused_BTD, attention_BT))

    def forward(self, backbone: MaskVLM, question: Question, token_AS: Tensor, owner_A: Tensor) -> Tensor:
        """Logits of each next token, [A, S, V]; a position sees itself and what stands before it."""
        embedded_ASD = self.words(backbone.text.model.get_input_embeddings()(token_AS))
        x_ASD = self.norm(embedded_ASD + self.position_SD[: token_AS.shape[1]])
        steps = token_AS.shape[1]
        # True where a position may look. Padding of an answer stands behind its tokens, so no token sees it.
        causal_11SS = torch.ones(steps, steps, dtype=torch.bool, device=token_AS.device).tril()[None, None]
        context = question.rows(owner_A)
        mask = context.mask(slice(None))
        # Block by block: CrossEncoder.forward takes padding masks, no causal one.
        for block, key_value in zip(self.decoder.blocks, context.blocks, strict=True):
            x_ASD = block(x_ASD, causal_11SS, key_value.rows(owner_A), mask)
        return self.tokens(x_ASD)

    def log_likelihood(
        self, backbone: MaskVLM, question: Question, token_AS: Tensor, attention_AS: Tensor, owner_A: Tensor
    ) -> Tensor:
        """Log probability of each whole answer, end token included, [A]."""
        # Position s predicts token s + 1: input without the last token, target without the start token.
        logits_ASV = self(backbone, question, token_AS[:, :-1], owner_A).float()
        target_AS = token_AS[:, 1:]
        loss_AS = F.cross_entropy(logits_ASV.transpose(1, 2), target_AS, reduction="none")
        # Summed and not averaged: the log probability of the whole answer.
        return -(loss_AS * attention_AS[:, 1:]).sum(1)

    @torch.no_grad()
    def rank(
        self,
        backbone: MaskVLM,
        question: Question,
        token_KS: Tensor,
        attention_KS: Tensor,
        rows: int,
        most: int,
        chunk: int = 4096,
    ) -> Tensor:
        """The likeliest of K candidate answers for each question, [B]."""
        chosen_BM, likelihood_BM = self.compare(backbone, question, token_KS, attention_KS, rows, most, chunk)
        return chosen_BM.gather(1, likelihood_BM.argmax(1)[:, None])[:, 0]

    @torch.no_grad()
    def compare(
        self,
        backbone: MaskVLM,
        question: Question,
        token_KS: Tensor,
        attention_KS: Tensor,
        rows: int,
        most: int,
        chunk: int = 4096,
    ) -> tuple[Tensor, Tensor]:
        """Candidates of each question, [B, M], and their log probabilities.

        The `most` candidates with the likeliest first word are compared whole (ALBEF's rule); exact for K <= most.
        """
        device = token_KS.device
        # First words of all candidates from one pass: each question with the start token alone.
        start_B1 = token_KS[:1, :1].expand(rows, 1)
        first_BV = self(backbone, question, start_B1, torch.arange(rows, device=device))[:, 0].float().log_softmax(-1)
        # (B, V) -> (B, K) by each candidate's first word -> (B, M)
        chosen_BM = first_BV[:, token_KS[:, 1]].topk(min(most, len(token_KS)), dim=1).indices
        # X = B * M whole answers, in chunks that fit the memory.
        owner_X = torch.arange(rows, device=device).repeat_interleave(chosen_BM.shape[1])
        parts = [
            self.log_likelihood(backbone, question, token_KS[picked], attention_KS[picked], owner)
            for picked, owner in zip(chosen_BM.flatten().split(chunk), owner_X.split(chunk), strict=True)
        ]
        return chosen_BM, torch.cat(parts).view(rows, -1)

    @torch.no_grad()
    def write(
        self, backbone: MaskVLM, question: Question, rows: int, start: int, end: int, forbidden: list[int]
    ) -> Tensor:
        """The likeliest next token again and again until the end token, [B, S] with the start token; what follows an
        end token is the end token. `forbidden` tokens are never written."""
        device = self.position_SD.device
        token_BS = torch.full((rows, 1), start, device=device)
        owner_B, done_B = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
        # Until all have ended, or there is no position left. All tokens are run again for each new one.
        while token_BS.shape[1] < len(self.position_SD) and not bool(done_B.all()):
            logits_BV = self(backbone, question, token_BS, owner_B)[:, -1]
            logits_BV[:, forbidden] = float("-inf")
            # What has ended gets more end tokens while others go on.
            next_B = logits_BV.argmax(1).masked_fill(done_B, end)
            token_BS, done_B = torch.cat([token_BS, next_B[:, None]], 1), done_B | (next_B == end)
        return token_BS
