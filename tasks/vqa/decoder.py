"""The generative answer head: a fusion block, then an autoregressive decoder (paper sec. 4, VQA; R).

Shapes: B questions, A answers, T tokens of a question, S tokens of an answer with its start token, L image positions,
D width, V vocabulary, K candidate answers.
"""

import torch
from torch import Tensor

from maskvlm.model.cross_attention import Context, CrossEncoder
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.model.text_decoder import TextDecoder


class AnswerDecoder(TextDecoder):
    """Generates an answer token by token, given image and question.

    The fusion block queries with the text cross encoder's output and attends to the image cross encoder's; the decoder
    attends to the fusion block's output.

    Args:
        backbone: sets the widths; its text cross encoder is copied.
        length: maximum answer length in tokens, including start and end.
    """

    fusion: CrossEncoder

    def __init__(self, backbone: MaskVLM, length: int) -> None:
        super().__init__(backbone, length, {"fusion": backbone.new_cross(1)})

    def read(self, backbone: MaskVLM, image_BLD: Tensor, text_BTD: Tensor, attention_BT: Tensor) -> Context:
        """Run the unmasked image and question through both cross encoders and the fusion block: the decoder's
        context."""
        image = backbone.cross_image(image_BLD, backbone.cross_image.context(text_BTD, attention_BT)).full_RLD
        text = backbone.cross_text(text_BTD, backbone.cross_text.context(image_BLD), attention_BT).full_RLD
        # Queries are the text's positions, keys and values the image's: (B, T, D).
        fused_BTD = self.fusion(text, self.fusion.context(image), attention_BT).full_RLD
        return self.decoder.context(fused_BTD, attention_BT)

    @torch.no_grad()
    def rank(
        self,
        backbone: MaskVLM,
        question: Context,
        token_KS: Tensor,
        attention_KS: Tensor,
        rows: int,
        most: int,
        chunk: int = 512,
    ) -> Tensor:
        """The likeliest of K candidate answers for each question, [B]."""
        chosen_BM, likelihood_BM = self.compare(backbone, question, token_KS, attention_KS, rows, most, chunk)
        return chosen_BM.gather(1, likelihood_BM.argmax(1)[:, None])[:, 0]

    @torch.no_grad()
    def compare(
        self,
        backbone: MaskVLM,
        question: Context,
        token_KS: Tensor,
        attention_KS: Tensor,
        rows: int,
        most: int,
        chunk: int = 512,
    ) -> tuple[Tensor, Tensor]:
        """Candidates for each question, [B, M], and their log probabilities.

        The `most` candidates with the likeliest first word are compared in full (ALBEF's rule); exact for K <= most.
        """
        device = token_KS.device
        # First words of all candidates in one pass: each question with only the start token.
        start_B1 = token_KS[:1, :1].expand(rows, 1)
        first_BV = self(backbone, question, start_B1, torch.arange(rows, device=device))[:, 0].float().log_softmax(-1)
        # (B, V) -> (B, K) by each candidate's first word -> (B, M)
        chosen_BM = first_BV[:, token_KS[:, 1]].topk(min(most, len(token_KS)), dim=1).indices
        # X = B * M full answers, in chunks that fit into memory: the logits of 512, with at most 8 tokens and 50,000
        # vocabulary entries, take 0.8 GB.
        owner_X = torch.arange(rows, device=device).repeat_interleave(chosen_BM.shape[1])
        parts = []
        for picked, owner in zip(chosen_BM.flatten().split(chunk), owner_X.split(chunk), strict=True):
            attention_XS = attention_KS[picked]
            longest = int(attention_XS.sum(1).max())
            token_XS = token_KS[picked, :longest]
            parts.append(self.log_likelihood(backbone, question, token_XS, attention_XS[:, :longest], owner))
        return chosen_BM, torch.cat(parts).view(rows, -1)
