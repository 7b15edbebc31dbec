"""The decoder that writes texts: one token after another against the whole text, beams against a search over lists.

How to break the code so that these fail: forget to move the kept keys with their beams, let an ended text keep its
place, divide by another number of tokens.

Shapes: S tokens of a text, V vocabulary, B rows.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from toy_examples import matters
from toys import CLS, PATCH, SEP, SIZE, VOCAB, WIDTH, toy_backbone

from maskvlm.model.cross_attention import Context
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.model.text_decoder import TextDecoder

POSITIONS = 1 + (SIZE // PATCH) ** 2
WORDS = (7, 8, 9)
FORBIDDEN = [token for token in range(VOCAB) if token not in (*WORDS, SEP)]


def build(length: int, rows: int = 6) -> tuple[MaskVLM, TextDecoder, Context]:
    """A decoder of weights that matter, and some images as features."""
    backbone = toy_backbone()
    decoder = TextDecoder(backbone, length)
    matters(backbone, decoder)  # type: ignore[arg-type]
    decoder.tokens.vocabulary.weight.data *= 0.2  # several words are likely: beams change places
    memory = torch.randn(rows, POSITIONS, WIDTH, generator=torch.Generator().manual_seed(3))
    decoder.double()
    return backbone.double(), decoder, decoder.decoder.context(memory.double())


def scores(backbone: MaskVLM, decoder: TextDecoder, context: Context, row: int, text: tuple[int, ...]) -> Tensor:
    """Log probability of each next token after the start token and after each word, [S, V], nothing kept."""
    with torch.no_grad():
        logits_SV = decoder(backbone, context, torch.tensor([[CLS, *text]]), torch.tensor([row]))[0].float()
    logits_SV[:, FORBIDDEN] = float("-inf")
    return logits_SV.log_softmax(1)


def written(row: list[int]) -> tuple[int, ...]:
    """The words of a row that a search gave."""
    assert row[0] == CLS
    end = row.index(SEP)
    assert set(row[end:]) == {SEP}
    return tuple(row[1:end])


def test_a_token_at_a_time_is_the_whole_text_at_once() -> None:
    backbone, decoder, context = build(6, rows=2)
    token_AS = torch.tensor([[CLS, 7, 30, 9, 12], [CLS, 8, 8, 11, 5]])
    whole_ASV = decoder(backbone, context, token_AS, torch.arange(2))
    past = None
    for place in range(token_AS.shape[1]):
        logits_AV, past = decoder.follow(backbone, context, token_AS[:, place], place, past)
        torch.testing.assert_close(logits_AV, whole_ASV[:, place], atol=1e-10, rtol=1e-10)


def slow_search(best: Any, longest: int, beams: int) -> tuple[float, tuple[int, ...]]:
    """Beam search of one row over lists. best: of a text, the log probabilities of its next token."""
    unfinished, ended = [(0.0, ())], list[tuple[float, tuple[int, ...]]]()
    for count in range(longest - 1):
        after: list[tuple[float, tuple[int, ...], int]] = []
        for total, text in unfinished:
            log_p_V = best(text)
            choice = (SEP,) if count == longest - 2 else (*WORDS, SEP)
            after += [(total + log_p_V[token].item(), text, token) for token in choice]
        after = sorted(after, key=lambda one: -one[0])[: beams - len(ended)]
        ended += [(total / (count + 1), text) for total, text, token in after if token == SEP]
        unfinished = [(total, (*text, token)) for total, text, token in after if token != SEP]  # type: ignore[misc]
        if not unfinished:
            break
    return max(ended)


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_narrow_beams_equal_a_search_over_lists(beams: int) -> None:
    backbone, decoder, context = build(8)
    hypotheses = decoder.search(backbone, context, 6, CLS, SEP, FORBIDDEN, beams)
    for row in range(6):

        def best(text: tuple[int, ...], row: int = row) -> Tensor:
            return scores(backbone, decoder, context, row, text)[-1]

        value, text = slow_search(best, 8, beams)
        assert written(hypotheses.token_BS[row].tolist()) == text
        assert hypotheses.mean_B[row].item() == pytest.approx(value, abs=1e-5)
