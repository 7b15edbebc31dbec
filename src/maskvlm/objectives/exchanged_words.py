"""Captions with two words exchanged: hard negatives for matching that consist of the same words.

Shapes: C captions, T tokens, V vocabulary, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from maskvlm.objectives.hard_negatives import gumbel_noise

ALIKE = 0.1
"""How much more similar two words must be, as a cosine, to be e times as likely to be exchanged. In embeddings trained
here, the cosines within one kind of word (colours, shapes) and between two kinds differ by 0.2 to 0.5."""


class ExchangedCaptions(NamedTuple):
    """token_CT: the captions with two words exchanged. changed_C: False where there was nothing to exchange."""

    token_CT: Tensor
    changed_C: Tensor


def exchange_words(
    token_CT: Tensor, special_CT: Tensor, word_CT: Tensor, words_VD: Tensor, uniform_CTT: Tensor
) -> ExchangedCaptions:
    """Exchange two similar words of each caption, such as two colours ("a red circle and a blue star" becomes "a blue
    circle and a red star"). Contrast is almost insensitive to word order, and hard negatives from other images rarely
    differ in it alone (NegCLIP, Yuksekgonul et al. 2023, exchanges words of one part of speech for contrast).

    A pair is drawn in proportion to exp(cosine of their embeddings / ALIKE), among different words of a single token.
    The new text may still be true ("a man and a woman"); the caller must accept that.

    Args:
        special_CT: True at special tokens and padding.
        word_CT: index of the word that a token is a piece of; -1 at special tokens.
        words_VD: word embeddings of the text encoder; no gradient reaches them.
        uniform_CTT: random numbers in [0, 1), one per pair of positions.
    """
    length = token_CT.shape[1]
    alone_CT = ~special_CT
    same_word_CT = word_CT[:, 1:] == word_CT[:, :-1]
    # Exclude words of several pieces: each piece has a neighbour from the same word.
    alone_CT[:, 1:] &= ~same_word_CT
    alone_CT[:, :-1] &= ~same_word_CT
    word_CTD = normalize(words_VD.detach().float()[token_CT], dim=-1)
    cosine_CTT = word_CTD @ word_CTD.transpose(1, 2)
    possible_CTT = alone_CT[:, :, None] & alone_CT[:, None] & (token_CT[:, :, None] != token_CT[:, None])
    # Gumbel-max, as for hard negatives: the argmax is a draw from the softmax.
    score_CTT = (cosine_CTT / ALIKE + gumbel_noise(uniform_CTT)).masked_fill(~possible_CTT, float("-inf"))
    # Every pair occurs twice, as (i, j) and (j, i), with the same meaning.
    picked_C = score_CTT.flatten(1).argmax(1)
    changed_C = possible_CTT.flatten(1).any(1)
    place_C2 = torch.stack([picked_C // length, picked_C % length], 1)
    exchanged_CT = token_CT.scatter(1, place_C2, token_CT.gather(1, place_C2.flip(1)))
    return ExchangedCaptions(torch.where(changed_C[:, None], exchanged_CT, token_CT), changed_C)
