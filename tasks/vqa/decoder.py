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
    """Reads image and question, writes an answer token by token.

    The fusion block queries with the text cross encoder's output and looks at the image cross encoder's; the decoder
    looks at the fusion block's.

    Args:
        backbone: fits the widths; its text cross encoder is copied.
        length: longest answer in tokens, start and end included.
    """

    fusion: CrossEncoder

    def __init__(self, backbone: MaskVLM, length: int) -> None:
        super().__init__(backbone, length, {"fusion": backbone.new_cross(1)})

    def read(self, backbone: MaskVLM, image_BLD: Tensor, text_BTD: Tensor, attention_BT: Tensor) -> Context:
        """Image and question, whole, through both cross encoders and the fusion block: what the decoder looks at."""
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
        """Candidates of each question, [B, M], and their log probabilities.

        The `most` candidates with the likeliest first word are compared whole (ALBEF's rule); exact for K <= most.
        """
        device = token_KS.device
        # First words of all candidates from one pass: each question with the start token alone.
        start_B1 = token_KS[:1, :1].expand(rows, 1)
        first_BV = self(backbone, question, start_B1, torch.arange(rows, device=device))[:, 0].float().log_softmax(-1)
        # (B, V) -> (B, K) by each candidate's first word -> (B, M)
        chosen_BM = first_BV[:, token_KS[:, 1]].topk(min(most, len(token_KS)), dim=1).indices
        # X = B * M whole answers, in chunks that fit the memory: the logits of 512, with 8 tokens at most and 50,000
        # entries in the vocabulary, have 0.8 GB.
        owner_X = torch.arange(rows, device=device).repeat_interleave(chosen_BM.shape[1])
        parts = []
        for picked, owner in zip(chosen_BM.flatten().split(chunk), owner_X.split(chunk), strict=True):
            attention_XS = attention_KS[picked]
            longest = int(attention_XS.sum(1).max())
            token_XS = token_KS[picked, :longest]
            parts.append(self.log_likelihood(backbone, question, token_XS, attention_XS[:, :longest], owner))
        return chosen_BM, torch.cat(parts).view(rows, -1)
