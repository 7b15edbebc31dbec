"""The decoder that writes texts: one token after another against the whole text, beams against every text there is.

How to break the code so that these fail: forget to move the kept keys with their beams, let an ended text keep its
place, divide by another number of tokens.

Shapes: S tokens of a text, V vocabulary, B rows.
"""

import itertools
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


def mean(backbone: MaskVLM, decoder: TextDecoder, context: Context, row: int, text: tuple[int, ...]) -> float:
    """What a whole text is judged by."""
    log_p_SV = scores(backbone, decoder, context, row, text)
    return sum(log_p_SV[at, token].item() for at, token in enumerate((*text, SEP))) / (len(text) + 1)


def written(row: list[int]) -> tuple[int, ...]:
    """The words of a row that a search gave."""
    assert row[0] == CLS
    end = row.index(SEP)
    assert set(row[end:]) == {SEP}
    return tuple(row[1:end])


def test_checkpointing_reaches_the_blocks_of_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, decoder, context = build(6)
    decoder.decoder.checkpointing = True
    passes: list[Any] = []

    def noted(compute: Any, *args: Any, use_reentrant: bool) -> Any:
        passes.append(compute)
        return compute(*args)

    monkeypatch.setattr("maskvlm.model.cross_attention.checkpoint", noted)
    decoder.train()(backbone, context, torch.tensor([[CLS, 7, 8]]), torch.tensor([0]))
    assert passes == [*decoder.decoder.blocks]


def test_a_token_at_a_time_is_the_whole_text_at_once() -> None:
    backbone, decoder, context = build(6, rows=2)
    token_AS = torch.tensor([[CLS, 7, 30, 9, 12], [CLS, 8, 8, 11, 5]])
    whole_ASV = decoder(backbone, context, token_AS, torch.arange(2))
    past = None
    for place in range(token_AS.shape[1]):
        logits_AV, past = decoder.follow(backbone, context, token_AS[:, place], place, past)
        torch.testing.assert_close(logits_AV, whole_ASV[:, place], atol=1e-10, rtol=1e-10)


def test_wide_beams_find_the_best_of_all_texts() -> None:
    """Three words, texts of up to three of them: 1 + 3 + 9 + 27 = 40."""
    backbone, decoder, context = build(5)
    texts = [text for count in range(4) for text in itertools.product(WORDS, repeat=count)]
    hypotheses = decoder.search(backbone, context, 6, CLS, SEP, FORBIDDEN, beams=len(texts))
    lengths = set()
    for row in range(6):
        value, best = max((mean(backbone, decoder, context, row, text), text) for text in texts)
        assert written(hypotheses.token_BS[row].tolist()) == best
        assert hypotheses.mean_B[row].item() == pytest.approx(value, abs=1e-5)
        lengths.add(len(best))
    assert len(lengths) > 1, "choose another seed"


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


def test_one_beam_takes_the_likeliest_token_each_time() -> None:
    backbone, decoder, context = build(8)
    hypotheses = decoder.search(backbone, context, 6, CLS, SEP, FORBIDDEN)
    for row in range(6):
        text: tuple[int, ...] = ()
        while len(text) < 6:
            token = int(scores(backbone, decoder, context, row, text)[-1].argmax())
            if token == SEP:
                break
            text += (token,)
        assert written(hypotheses.token_BS[row].tolist()) == text
    more = decoder.search(backbone, context, 6, CLS, SEP, FORBIDDEN, beams=3)
    assert not torch.equal(more.token_BS, hypotheses.token_BS), "choose another seed"


def test_a_text_without_end_is_ended_at_the_longest() -> None:
    backbone, decoder, context = build(4, rows=1)
    with torch.no_grad():
        decoder.tokens.vocabulary.bias[SEP] = -1e4
    for beams in (1, 2):
        (row,) = decoder.search(backbone, context, 1, CLS, SEP, FORBIDDEN, beams).token_BS.tolist()
        assert len(row) == 4
        assert len(written(row)) == 2
