"""Which patches and words are masked: against written-out NumPy, and what must hold for every input."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import MASK, SEP, VOCAB, tokens

from maskvlm.objectives.masking import (
    ChosenPhrases,
    DrawnBlocks,
    DrawnTokens,
    PatchMask,
    RandomBlocks,
    RandomTokens,
    Ratio,
    Texts,
    TokenMask,
    Vocabulary,
    count_masked,
    mask_patches,
    mask_tokens,
)
from maskvlm.utils.errors import UserError

ratios = st.integers(0, 100).map(lambda percent: percent / 100)
captions = st.lists(st.lists(st.integers(5, VOCAB - 1), max_size=9), min_size=1, max_size=5)


class Noise:
    """Random numbers from a seed; `last` keeps what was handed out."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.last: list[Tensor] = []

    def __call__(self, *shape: int) -> Tensor:
        self.last.append(torch.rand(*shape, generator=self.generator))
        return self.last[-1]


def words(
    ids: list[list[int]], ratio: float | Ratio, noise: Noise, length: int | None = None, **options: bool
) -> TokenMask:
    text = tokens(ids, length)
    return mask_tokens(text["token_CT"], text["special_CT"], text["word_CT"], ratio, noise, MASK, VOCAB, 11, **options)


def assert_positions(mask: Tensor, outcome: PatchMask | TokenMask) -> None:
    """index, weight: each masked position once with weight 1, the rest visible with weight 0."""
    index, weight = (outcome.index_CK, outcome.weight_CK) if isinstance(outcome, TokenMask) else outcome[1:3]
    for row, places, weights in zip(mask, index, weight, strict=True):
        assert sorted(places[weights == 1].tolist()) == row.nonzero().flatten().tolist()
        assert not row[places[weights == 0]].any()
        assert len(set(places.tolist())) == len(places)
        assert set(weights.tolist()) <= {0.0, 1.0}


# ---------------------------------------------------------------------- counts


def test_count_is_the_nearest_whole_number_and_at_least_one() -> None:
    cases = [(49, 0.6), (9, 0.5), (4, 0.6), (8, 0.3), (5, 0.3), (9, 0.01), (9, 0.0), (9, 1.0)]
    assert [count_masked(*case) for case in cases] == [29, 5, 2, 2, 2, 1, 0, 9]


# ---------------------------------------------------------------------- patches


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.integers(1, 4),
    ratios,
    st.lists(st.booleans(), min_size=1, max_size=5),
    st.integers(0, 2**31),
)
def test_patches_are_the_blocks_of_the_smallest_random_numbers(
    grid: tuple[int, int], block: int, ratio: float, valid: list[bool], seed: int
) -> None:
    valid_B, noise = torch.tensor(valid), Noise(seed)
    patch_mask = mask_patches(valid_B, grid, block, ratio, noise)
    assert_positions(patch_mask.mask_BN, patch_mask)
    rows, cols = int(np.ceil(grid[0] / block)), int(np.ceil(grid[1] / block))
    for mask_N, noise_U, there in zip(patch_mask.mask_BN.numpy(), noise.last[0].numpy(), valid, strict=True):
        expected = np.zeros((rows * block, cols * block), dtype=bool)
        for unit in np.argsort(noise_U)[: count_masked(rows * cols, ratio) if there else 0]:
            r, c = unit // cols * block, unit % cols * block
            expected[r : r + block, c : c + block] = True
        np.testing.assert_array_equal(mask_N.reshape(grid), expected[: grid[0], : grid[1]])
    most = max([int((~mask_N).sum()) for mask_N in patch_mask.mask_BN[valid_B]], default=0)
    assert most <= (patch_mask.visible or 0) <= grid[0] * grid[1]
    if grid[0] % block == grid[1] % block == 0:
        assert most == patch_mask.visible or not valid_B.any()


def test_images_may_be_masked_as_a_whole_or_each_by_a_share_of_its_own() -> None:
    """Which blocks and which images follows from the same numbers as with one share for all, drawn first."""
    valid_B, shares = torch.arange(12) != 3, [0.0, 0.1, 0.35, 0.5, 0.75, 1.0] * 2
    noise = Noise(5)
    usual = mask_patches(valid_B, (5, 5), 2, 0.5, noise)
    whole_B = (noise(12) < 0.4) & valid_B
    patch_mask = mask_patches(valid_B, (5, 5), 2, 0.5, Noise(5), fully_masked=0.4)
    assert patch_mask.mask_BN[whole_B].all()
    assert torch.equal(patch_mask.mask_BN[~whole_B], usual.mask_BN[~whole_B])
    assert patch_mask.visible == usual.visible
    assert_positions(patch_mask.mask_BN, patch_mask)
    ratio = Ratio(torch.tensor(shares)[:, None], 1.0)
    patch_mask = mask_patches(valid_B, (6, 6), 2, ratio, Noise(5))
    assert_positions(patch_mask.mask_BN, patch_mask)
    alone = torch.stack([mask_patches(valid_B, (6, 6), 2, s, Noise(5)).mask_BN[row] for row, s in enumerate(shares)])
    assert torch.equal(patch_mask.mask_BN, alone)
    assert patch_mask.visible == 36


def test_drawn_shares_are_of_every_size_in_training_alone() -> None:
    """From 4 to 12 of 16 blocks and from 2 to 6 of 8 tokens."""
    valid_B, masking = torch.ones(4000, dtype=torch.bool), DrawnBlocks(0.25, 0.75, 0.5, block=8)
    masking.check(8)
    measured = masking(valid_B, (4, 4), 8, Noise(), False).mask_BN
    assert torch.equal(measured, RandomBlocks(0.5, 8)(valid_B, (4, 4), 8, Noise(), False).mask_BN)
    patch_mask = masking(valid_B, (4, 4), 8, Noise(), True)
    assert_positions(patch_mask.mask_BN, patch_mask)
    texts, vocabulary = texts_of(tokens([[5] * 8] * 4000), training=False)
    of_tokens = DrawnTokens(0.25, 0.75, 0.5)
    measured = of_tokens(texts, vocabulary, Noise()).mask_CT
    assert torch.equal(measured, RandomTokens(0.5)(texts, vocabulary, Noise()).mask_CT)
    token_mask = of_tokens(texts._replace(training=True), vocabulary, Noise())
    assert_positions(token_mask.mask_CT, token_mask)
    for count_S, least, most in ((patch_mask.mask_BN.sum(1), 4, 12), (token_mask.mask_CT.sum(1), 2, 6)):
        assert (count_S.min(), count_S.max()) == (least, most)
        assert abs(count_S.double().mean() - (least + most) / 2) < 0.15


# ---------------------------------------------------------------------- chosen phrases

WORDS = {"left of": [11, 12], "above": [13], "[SEP]": [SEP], "unknown": [], "a very long phrase": [11] * 99}


def ids(words: str) -> list[int]:
    """As a tokenizer of whole words has them: a space before them changes nothing."""
    return WORDS[words.strip()]


def whole_words(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """The toys' words have two pieces; here every token is a word of its own."""
    parts = tokens(rows)
    number_CT = torch.arange(parts["token_CT"].shape[1]).expand_as(parts["token_CT"])
    return parts | {"word_CT": number_CT.masked_fill(parts["special_CT"], -1)}


def texts_of(parts: dict[str, Tensor], encode: Any = ids, **settings: Any) -> tuple[Texts, Vocabulary]:
    texts = Texts(parts["token_CT"], parts["special_CT"], parts["word_CT"], **({"training": True} | settings))
    return texts, Vocabulary(MASK, VOCAB, texts.token_CT.shape[1], encode)


def chosen(rows: list[list[int]], training: bool = True, **settings: Any) -> tuple[TokenMask, TokenMask]:
    """What is masked with phrases, and what without them from the same numbers."""
    asked = texts_of(whole_words(rows), training=training)
    masking = ChosenPhrases(**({"phrases": ["left of", "above"], "ratio": 0.5} | settings))
    return masking(*asked, Noise()), RandomTokens(0.5)(*asked, Noise())


def test_chosen_phrases_are_masked_alone_and_other_texts_as_always() -> None:
    # A phrase; one of which the second word is missing; two phrases; a phrase at the end; none.
    rows = [[5, 11, 12, 6, 7], [5, 11, 6, 12, 7], [13, 5, 11, 12, 6], [5, 6, 7, 11, 12], [5, 6, 7, 8, 9]]
    token_mask, usual = chosen(rows)
    assert_positions(token_mask.mask_CT, token_mask)
    inner_CT = token_mask.mask_CT[:, 1:-1].int().tolist()
    assert [inner_CT[row] for row in (0, 2, 3)] == [[0, 1, 1, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert torch.equal(token_mask.mask_CT[[1, 4]], usual.mask_CT[[1, 4]])
    parts = whole_words(rows)
    assert torch.equal(token_mask.token_CT, parts["token_CT"].masked_fill(token_mask.mask_CT, MASK))


def test_what_is_a_phrase() -> None:
    """As of RoBERTa: "left of" at the beginning is 11 12, and 14 12 behind another word. A part of a word is none: 13
    is a word in the first of the later texts, and the first or last piece of one in the others."""
    parts = whole_words([[11, 12, 5, 6, 7], [5, 14, 12, 6, 7], [5, 11, 6, 12, 14]])
    asked = texts_of(parts, lambda words: [14, 12] if words[0] == " " else [11, 12])
    token_mask = ChosenPhrases(["left of"], ratio=0.5)(*asked, Noise())
    assert token_mask.mask_CT[:2, 1:-1].int().tolist() == [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    assert torch.equal(token_mask.mask_CT[2], RandomTokens(0.5)(*asked, Noise()).mask_CT[2])
    parts = whole_words([[5, 13, 6, 7, 8]] * 3)
    parts["word_CT"][1, 1:-1] = torch.tensor([0, 1, 1, 2, 3])
    parts["word_CT"][2, 1:-1] = torch.tensor([0, 0, 1, 2, 3])
    phrase_CT = ChosenPhrases(["above"], ratio=0.5).phrases_in(texts_of(parts)[0], [(13,)])
    assert phrase_CT[:, 1:-1].int().tolist() == [[0, 1, 0, 0, 0], [0] * 5, [0] * 5]


def test_chosen_phrases_may_count_more_and_are_for_training_alone() -> None:
    rows = [[5, 11, 12, 6, 7], [5, 6, 7, 8, 9]]
    token_mask, plain = chosen(rows, weight=3.0)[0], chosen(rows)[0]
    assert torch.equal(token_mask.weight_CK, plain.weight_CK * torch.tensor([[3.0], [1.0]]))
    assert all(torch.equal(*pair) for pair in zip(token_mask[:3], plain[:3], strict=True))
    for options in ({"training": False}, {"phrases": ["[SEP]", "a very long phrase"]}):  # no text can hold these
        token_mask, usual = chosen(rows, **options)
        assert all(torch.equal(*pair) for pair in zip(token_mask[:2], usual[:2], strict=True))


def test_of_several_maskings_of_a_text_the_first_has_its_phrase_alone() -> None:
    alone_T = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0]).bool()
    asked = texts_of(whole_words([[5, 11, 12, 6, 7, 8]] * 6), masks_per_text=3)
    token_mask, usual = ChosenPhrases(["left of"], ratio=0.5)(*asked, Noise()), RandomTokens(0.5)(*asked, Noise())
    for row in range(6):
        assert torch.equal(token_mask.mask_CT[row], usual.mask_CT[row] if row % 3 else alone_T)


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: ChosenPhrases("above"), "text_masking: phrases 'above'"),
    (lambda: ChosenPhrases(["above"], share=1.5), "text_masking.share: 1.5"),
    (lambda: ChosenPhrases(["above"], weight=0.0), "text_masking: weight 0.0"),
    (lambda: chosen([[5, 11, 12]], phrases=["left of", "unknown"]), "does not know all words of 'unknown'"),
    (lambda: RandomTokens(0.6, 0.2), "text_masking: most 0.2 is below ratio 0.6"),
    (lambda: RandomBlocks(60), "image_masking.ratio: 60"),
    (lambda: DrawnBlocks(0.5, 0.4, 0.3), "image_masking: low 0.5"),
    (lambda: DrawnTokens(-0.1, 0.4, 0.3), "text_masking: low -0.1"),
]


@pytest.mark.parametrize(("make", "match"), REFUSED, ids=[match for _, match in REFUSED])
def test_what_cannot_be_is_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        make()


# ---------------------------------------------------------------------- words


@settings(max_examples=60, deadline=None)
@given(captions, ratios, st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_words_are_those_of_the_smallest_random_numbers(
    ids: list[list[int]], ratio: float, whole_word: bool, keep_and_swap: bool, seed: int
) -> None:
    """As many as the count says, entire, never a special token."""
    noise, text = Noise(seed), tokens(ids)
    token_mask = words(ids, ratio, noise, whole_word=whole_word, keep_and_swap=keep_and_swap)
    assert_positions(token_mask.mask_CT, token_mask)
    for row, noise_U in enumerate(noise.last[0].numpy()):
        places = np.arange(1, len(ids[row]) + 1)
        unit_of = (places - 1) // 2 if whole_word else places
        units = np.unique(unit_of)
        masked = units[np.argsort(noise_U[units])][: count_masked(len(units), ratio)]
        expected = np.zeros(token_mask.mask_CT.shape[1], dtype=bool)
        expected[places[np.isin(unit_of, masked)]] = True
        np.testing.assert_array_equal(token_mask.mask_CT[row].numpy(), expected)
    assert torch.equal(token_mask.token_CT[~token_mask.mask_CT], text["token_CT"][~token_mask.mask_CT])
    assert ((token_mask.token_CT >= 0) & (token_mask.token_CT < VOCAB)).all()
    if not keep_and_swap:
        assert (token_mask.token_CT[token_mask.mask_CT] == MASK).all()


def test_eighty_ten_ten() -> None:
    ids = [[7] * 9] * 2000
    token_mask = words(ids, 1.0, Noise(), keep_and_swap=True)
    replacements = token_mask.token_CT[token_mask.mask_CT]
    swapped = replacements[(replacements != MASK) & (replacements != 7)]
    assert len(replacements) == 18000
    assert (replacements == MASK).double().mean() == pytest.approx(0.8 + 0.1 / VOCAB, abs=0.01)
    assert (replacements == 7).double().mean() == pytest.approx(0.1 + 0.1 / VOCAB, abs=0.01)
    count_V = torch.bincount(swapped, minlength=VOCAB)[[v for v in range(VOCAB) if v not in (MASK, 7)]]
    expected = 18000 * 0.1 / VOCAB
    assert ((count_V - expected) ** 2 / expected).sum() < 75  # 38 degrees of freedom; every token, evenly


def test_what_is_measured_is_always_masked() -> None:
    """Fails where evaluation shows words, which the model could copy, or other words in their place."""
    parts = {"token_CT": torch.full((50, 9), 7), "special_CT": torch.zeros(50, 9, dtype=torch.bool)}
    parts["word_CT"] = torch.arange(9).expand(50, 9)
    measured, trained = (
        RandomTokens(1.0, keep_and_swap=True)(*texts_of(parts, training=training), Noise())
        for training in (False, True)
    )
    assert (measured.token_CT == MASK).all()
    assert not (trained.token_CT == MASK).all()
