"""Captions with two words exchanged: texts of the same words that are not true of the image, for matching.

Shapes: C captions, T tokens, V vocabulary, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from maskvlm.objectives.hard_negatives import gumbel_noise

ALIKE = 0.1
"""How much more alike two words must be, as a cosine, to be e times as likely to change places. Words of one kind
(colours, shapes) differ from words of two kinds by 0.2 to 0.5 in embeddings trained here."""


class ExchangedCaptions(NamedTuple):
    """token_CT: the captions with two words exchanged. changed_C: False where there was nothing to exchange."""

    token_CT: Tensor
    changed_C: Tensor


def exchange_words(
    token_CT: Tensor, special_CT: Tensor, word_CT: Tensor, words_VD: Tensor, uniform_CTT: Tensor
) -> ExchangedCaptions:
    """Exchange two words of each caption that are alike, such as two colours ("a red circle and a blue star" becomes
    "a blue circle and a red star"). Contrast hardly minds the order of words, and hard negatives of other images rarely
    differ in it alone (NegCLIP, Yuksekgonul et al. 2023, exchanges words of one part of speech for contrast).

    A pair is drawn in proportion to exp(cosine of their embeddings / ALIKE), among words of one token that differ. The
    text may be true still ("a man and a woman"): that is for the caller to bear.

    Args:
        special_CT: True at special tokens and padding.
        word_CT: number of the word that a token is a piece of; -1 at special tokens.
        words_VD: word embeddings of the text encoder; no gradient reaches them.
        uniform_CTT: random numbers in [0, 1), one a pair of places.
    """
    length = token_CT.shape[1]
    alone_CT = ~special_CT
    same_word_CT = word_CT[:, 1:] == word_CT[:, :-1]
    # A piece of a longer word stands beside another piece of it.
    alone_CT[:, 1:] &= ~same_word_CT
    alone_CT[:, :-1] &= ~same_word_CT
    word_CTD = normalize(words_VD.detach().float()[token_CT], dim=-1)
    cosine_CTT = word_CTD @ word_CTD.transpose(1, 2)
    possible_CTT = alone_CT[:, :, None] & alone_CT[:, None] & (token_CT[:, :, None] != token_CT[:, None])
    # Gumbel-max, as for hard negatives: the argmax is a draw from the softmax.
    score_CTT = (cosine_CTT / ALIKE + gumbel_noise(uniform_CTT)).masked_fill(~possible_CTT, float("-inf"))
    # Every pair stands twice, (i, j) and (j, i), and both mean the same.
    picked_C = score_CTT.flatten(1).argmax(1)
    changed_C = possible_CTT.flatten(1).any(1)
    place_C2 = torch.stack([picked_C // length, picked_C % length], 1)
    exchanged_CT = token_CT.scatter(1, place_C2, token_CT.gather(1, place_C2.flip(1)))
    return ExchangedCaptions(torch.where(changed_C[:, None], exchanged_CT, token_CT), changed_C)
