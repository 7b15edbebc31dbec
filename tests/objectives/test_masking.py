"""Which patches and words are masked: against written-out NumPy, and what must hold for every input."""

import itertools
import math
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
    counted = {
        (49, 0.6): 29,
        (9, 0.5): 5,
        (4, 0.6): 2,
        (8, 0.3): 2,
        (5, 0.3): 2,
        (9, 0.01): 1,
        (9, 0.0): 0,
        (9, 1.0): 9,
    }
    assert {case: count_masked(*case) for case in counted} == counted


# ---------------------------------------------------------------------- patches


@pytest.mark.parametrize(("grid", "block"), [((14, 14), 2), ((4, 4), 1), ((5, 7), 2), ((6, 6), 4), ((3, 3), 5)])
def test_patches_are_the_blocks_of_the_smallest_random_numbers(grid: tuple[int, int], block: int) -> None:
    noise = Noise()
    mask_BN = mask_patches(torch.ones(3, dtype=torch.bool), grid, block, 0.6, noise).mask_BN.numpy()
    rows, cols = int(np.ceil(grid[0] / block)), int(np.ceil(grid[1] / block))
    for mask_N, noise_U in zip(mask_BN, noise.last[0].numpy(), strict=True):
        expected = np.zeros((rows * block, cols * block), dtype=bool)
        for unit in np.argsort(noise_U)[: int(np.floor(0.6 * rows * cols + 0.5))]:
            r, c = unit // cols * block, unit % cols * block
            expected[r : r + block, c : c + block] = True
        np.testing.assert_array_equal(mask_N.reshape(grid), expected[: grid[0], : grid[1]])


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.integers(1, 4),
    ratios,
    st.lists(st.booleans(), min_size=1, max_size=5),
    st.integers(0, 2**31),
)
def test_patch_masks_for_every_grid(
    grid: tuple[int, int], block: int, ratio: float, valid: list[bool], seed: int
) -> None:
    valid_B = torch.tensor(valid)
    patch_mask = mask_patches(valid_B, grid, block, ratio, Noise(seed))
    assert_positions(patch_mask.mask_BN, patch_mask)
    assert not patch_mask.mask_BN[~valid_B].any()
    rows, cols = -(-grid[0] // block), -(-grid[1] // block)
    most = max([int((~mask_N).sum()) for mask_N in patch_mask.mask_BN[valid_B]], default=0)
    assert most <= (patch_mask.visible or 0) <= grid[0] * grid[1]
    if grid[0] % block == grid[1] % block == 0:
        assert most == patch_mask.visible or not valid_B.any()
    for mask_N in patch_mask.mask_BN[valid_B]:
        blocks = [part for strip in mask_N.view(grid).split(block, 0) for part in strip.split(block, 1)]
        assert all(part.all() or not part.any() for part in blocks)
        assert sum(bool(part.any()) for part in blocks) == count_masked(rows * cols, ratio)


@given(st.integers(1, 12), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**31))
def test_some_images_are_masked_as_a_whole(rows: int, ratio: float, seed: int) -> None:
    """The others as without; which ones follows from one number each, drawn after those of the blocks."""
    valid_B = torch.arange(rows) != 3
    patch_mask = mask_patches(valid_B, (5, 5), 2, ratio, Noise(seed), fully_masked=0.4)
    noise = Noise(seed)
    usual = mask_patches(valid_B, (5, 5), 2, ratio, noise)
    whole_B = (noise(rows) < 0.4) & valid_B
    assert patch_mask.mask_BN[whole_B].all()
    assert torch.equal(patch_mask.mask_BN[~whole_B], usual.mask_BN[~whole_B])
    assert patch_mask.visible == usual.visible
    assert_positions(patch_mask.mask_BN, patch_mask)


@settings(max_examples=40, deadline=None)
@given(st.lists(ratios, min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 2**31))
def test_every_image_may_have_a_share_of_its_own(shares: list[float], block: int, seed: int) -> None:
    """Which blocks follows from the same numbers as with one share for all."""
    valid_B = torch.ones(len(shares), dtype=torch.bool)
    ratio = Ratio(torch.tensor(shares)[:, None], max(shares), min(shares))
    patch_mask = mask_patches(valid_B, (6, 6), block, ratio, Noise(seed))
    assert_positions(patch_mask.mask_BN, patch_mask)
    for row, share in enumerate(shares):
        alone = mask_patches(valid_B, (6, 6), block, share, Noise(seed))
        assert torch.equal(patch_mask.mask_BN[row], alone.mask_BN[row])
    assert patch_mask.visible == int((~patch_mask.mask_BN).sum(1).max())


def test_drawn_blocks_are_of_every_size_in_training_alone() -> None:
    valid_B, masking = torch.ones(4000, dtype=torch.bool), DrawnBlocks(0.25, 0.75, 0.5, block=8)
    masking.check(8)
    measured = masking(valid_B, (4, 4), 8, Noise(), False).mask_BN
    assert torch.equal(measured, RandomBlocks(0.5, 8)(valid_B, (4, 4), 8, Noise(), False).mask_BN)
    patch_mask = masking(valid_B, (4, 4), 8, Noise(), True)
    assert_positions(patch_mask.mask_BN, patch_mask)
    count_S = torch.bincount(patch_mask.mask_BN.sum(1), minlength=17)
    # shares from 4 to 12 of 16, evenly, rounded: half as many at both ends
    assert count_S[4:13].sum() == 4000
    expected = torch.tensor([250.0, *[500.0] * 7, 250.0])
    assert ((count_S[4:13] - expected) ** 2 / expected).sum() < 26  # chi-square, eight degrees of freedom


def test_drawn_tokens_are_of_every_size_in_training_alone() -> None:
    parts = tokens([[5] * 8] * 4000)
    texts = Texts(parts["token_CT"], parts["special_CT"], parts["word_CT"])
    vocabulary, masking = (
        Vocabulary(MASK, VOCAB, texts.token_CT.shape[1], WORDS.__getitem__),
        DrawnTokens(0.25, 0.75, 0.5),
    )
    measured = masking(texts, vocabulary, Noise())
    assert torch.equal(measured.mask_CT, RandomTokens(0.5)(texts, vocabulary, Noise()).mask_CT)
    token_mask = masking(texts._replace(training=True), vocabulary, Noise())
    assert_positions(token_mask.mask_CT, token_mask)
    count_S = torch.bincount(token_mask.mask_CT.sum(1), minlength=9)
    expected = torch.tensor([500.0, 1000, 1000, 1000, 500])
    assert count_S[2:7].sum() == 4000
    assert ((count_S[2:7] - expected) ** 2 / expected).sum() < 18.5  # chi-square, four degrees of freedom


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


def chosen(rows: list[list[int]], training: bool = True, **settings: Any) -> tuple[TokenMask, TokenMask]:
    """What is masked with phrases, and what without them from the same numbers."""
    parts = whole_words(rows)
    texts = Texts(parts["token_CT"], parts["special_CT"], parts["word_CT"], training=training)
    vocabulary = Vocabulary(MASK, VOCAB, texts.token_CT.shape[1], ids)
    masking = ChosenPhrases(**({"phrases": ["left of", "above"], "ratio": 0.5} | settings))
    return masking(texts, vocabulary, Noise()), RandomTokens(0.5)(texts, vocabulary, Noise())


def test_chosen_phrases_are_masked_alone_and_other_texts_as_always() -> None:
    # A phrase; one of which the second word is missing; two phrases; a phrase at the end; none.
    rows = [[5, 11, 12, 6, 7], [5, 11, 6, 12, 7], [13, 5, 11, 12, 6], [5, 6, 7, 11, 12], [5, 6, 7, 8, 9]]
    token_mask, usual = chosen(rows)
    assert_positions(token_mask.mask_CT, token_mask)
    inner_CT = token_mask.mask_CT[:, 1:-1].int().tolist()
    assert [inner_CT[row] for row in (0, 2, 3)] == [[0, 1, 1, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    for row in (1, 4):
        assert torch.equal(token_mask.mask_CT[row], usual.mask_CT[row])
        assert torch.equal(token_mask.token_CT[row], usual.token_CT[row])
    parts = whole_words(rows)
    assert torch.equal(token_mask.token_CT, parts["token_CT"].masked_fill(token_mask.mask_CT, MASK))


def test_behind_a_space_a_phrase_may_have_other_tokens() -> None:
    """As of RoBERTa: "left of" at the beginning is 11 12, and 14 12 behind another word."""
    parts = whole_words([[11, 12, 5, 6, 7], [5, 14, 12, 6, 7], [5, 11, 6, 12, 14]])
    texts = Texts(parts["token_CT"], parts["special_CT"], parts["word_CT"], training=True)
    vocabulary = Vocabulary(MASK, VOCAB, 7, lambda words: [14, 12] if words[0] == " " else [11, 12])
    token_mask = ChosenPhrases(["left of"], ratio=0.5)(texts, vocabulary, Noise())
    assert token_mask.mask_CT[:2, 1:-1].int().tolist() == [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    assert torch.equal(token_mask.mask_CT[2], RandomTokens(0.5)(texts, vocabulary, Noise()).mask_CT[2])


def test_a_part_of_a_word_is_no_phrase() -> None:
    """13 is a word in the first text, and the first or last piece of one in the others."""
    parts = whole_words([[5, 13, 6, 7, 8]] * 3)
    parts["word_CT"][1, 1:-1] = torch.tensor([0, 1, 1, 2, 3])
    parts["word_CT"][2, 1:-1] = torch.tensor([0, 0, 1, 2, 3])
    texts = Texts(parts["token_CT"], parts["special_CT"], parts["word_CT"], training=True)
    phrase_CT = ChosenPhrases(["above"], ratio=0.5).phrases_in(texts, [tuple(ids("above"))])
    assert phrase_CT[:, 1:-1].int().tolist() == [[0, 1, 0, 0, 0], [0] * 5, [0] * 5]


def test_shares_that_are_none_are_refused_by_every_masking() -> None:
    for make, message in (
        (lambda: RandomTokens(30), "text_masking.ratio: 30 is out of range"),
        (lambda: RandomTokens(0.6, 0.2), "text_masking: most 0.2 is below ratio 0.6"),
        (lambda: ChosenPhrases(["above"], ratio=0.5, most=0.3), "text_masking: most 0.3 is below"),
        (lambda: RandomBlocks(60), "image_masking.ratio: 60 is out of range"),
        (lambda: RandomBlocks(0.6, whole=math.nan), "image_masking.whole: nan is out of range"),
    ):
        with pytest.raises(UserError, match=f"model.task.{message}"):
            make()


def test_chosen_phrases_may_count_more() -> None:
    rows = [[5, 11, 12, 6, 7], [5, 6, 7, 8, 9]]
    token_mask, plain = chosen(rows, weight=3.0)[0], chosen(rows)[0]
    assert torch.equal(token_mask.weight_CK, plain.weight_CK * torch.tensor([[3.0], [1.0]]))
    assert all(torch.equal(*pair) for pair in zip(token_mask[:3], plain[:3], strict=True))


def test_chosen_phrases_are_for_training_alone() -> None:
    token_mask, usual = chosen([[5, 11, 12, 6, 7]] * 3, training=False)
    assert all(torch.equal(*pair) for pair in zip(token_mask, usual, strict=True))


def test_phrases_that_no_text_can_hold_are_passed_over() -> None:
    token_mask, usual = chosen([[5, 11, 12, 6, 7]] * 3, phrases=["[SEP]", "a very long phrase"])
    assert torch.equal(token_mask.mask_CT, usual.mask_CT)
    assert torch.equal(token_mask.token_CT, usual.token_CT)


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5])
def test_a_phrase_is_masked_whole_however_long_the_other_texts_are(ratio: float) -> None:
    for others in ([], [[5, 6, 7, 8, 9, 13, 14, 5, 6, 7, 8, 9]]):
        token_mask, _ = chosen([[5, 11, 12, 6, 7], *others], ratio=ratio)
        assert token_mask.mask_CT[0, :7].tolist() == [False, False, True, True, False, False, False]
        assert token_mask.weight_CK[0].tolist()[:2] == [1.0, 1.0]
        assert token_mask.index_CK[0].tolist()[:2] == [2, 3]


def test_a_phrase_that_the_tokenizer_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match="the tokenizer does not know all words of 'unknown'"):
        chosen([[5, 11, 12, 6, 7]], phrases=["left of", "unknown"])


def test_a_share_of_the_texts_with_a_phrase() -> None:
    token_mask, _ = chosen([[5, 11, 12, 6, 7, 8]] * 4000, share=0.25)
    alone_C = (token_mask.mask_CT[:, 1:-1] == torch.tensor([0, 1, 1, 0, 0, 0]).bool()).all(1)
    # of the others, which mask three of six, none masks these two alone
    assert abs(int(alone_C.sum()) - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5


def test_of_several_maskings_of_a_text_the_first_alone() -> None:
    parts = whole_words([[5, 11, 12, 6, 7, 8]] * 6)
    texts = Texts(parts["token_CT"], parts["special_CT"], parts["word_CT"], masks_per_text=3, training=True)
    masking, vocabulary = ChosenPhrases(["left of"], ratio=0.5), Vocabulary(MASK, VOCAB, 8, ids)
    token_mask, usual = masking(texts, vocabulary, Noise()), RandomTokens(0.5)(texts, vocabulary, Noise())
    alone_T = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0]).bool()
    for row in range(6):
        assert torch.equal(token_mask.mask_CT[row], usual.mask_CT[row] if row % 3 else alone_T)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(10, 14), min_size=1, max_size=9), min_size=1, max_size=4), ratios)
def test_no_more_is_masked_than_is_read(rows: list[list[int]], ratio: float) -> None:
    token_mask, _ = chosen(rows, ratio=ratio)
    assert_positions(token_mask.mask_CT, token_mask)
    length = max(map(len, rows)) + 2
    assert token_mask.index_CK.shape[1] == max(2, count_masked(length, ratio))  # 2: of "left of"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phrases": []}, ": phrases \\[\\] are not a list of words"),
        ({"phrases": "above"}, ": phrases 'above' are not a list of words"),
        ({"phrases": ["above", " "]}, ": phrases .* are not a list of words"),
        ({"phrases": ["above"], "share": 1.5}, ".share: 1.5 is out of range"),
        ({"phrases": ["above"], "weight": 0.0}, ": weight 0.0 is not above 0"),
        ({"phrases": ["above"], "weight": math.nan}, ": weight nan is not above 0"),
    ],
)
def test_phrases_and_shares_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"model.task.text_masking{message}"):
        ChosenPhrases(**options)


@pytest.mark.parametrize("shares", [(0.5, 0.4, 0.3), (-0.1, 0.4, 0.3), (0.1, 1.1, 0.3), (0.1, 0.4, 1.5)])
def test_shares_out_of_order_are_refused(shares: tuple[float, float, float]) -> None:
    for kind, key in ((DrawnBlocks, "image_masking"), (DrawnTokens, "text_masking")):
        with pytest.raises(UserError, match=f"model.task.{key}: low .* are not shares in order"):
            kind(*shares)


def test_no_patch_at_ratio_zero_and_every_patch_at_ratio_one() -> None:
    valid_B = torch.ones(2, dtype=torch.bool)
    none, everything = (mask_patches(valid_B, (5, 5), 2, ratio, Noise()) for ratio in (0.0, 1.0))
    assert none.index_BK.shape == (2, 0)
    assert not none.mask_BN.any()
    assert everything.index_BK.shape == (2, 25)
    assert everything.weight_BK.all()
    assert everything.mask_BN.all()


def test_blocks_are_chosen_evenly_and_independently_for_each_image() -> None:
    mask_BN = mask_patches(torch.ones(6000, dtype=torch.bool), (5, 5), 2, 0.5, Noise()).mask_BN
    chosen_BU = mask_BN.view(-1, 5, 5)[:, ::2, ::2].flatten(1).double()  # one patch of each of the nine blocks
    expected = 6000 * 5 / 9
    assert ((chosen_BU.sum(0) - expected) ** 2 / expected).sum() < 20  # chi-square, eight degrees of freedom
    together = (chosen_BU.T @ chosen_BU)[~torch.eye(9, dtype=torch.bool)] / 6000
    torch.testing.assert_close(together, torch.full_like(together, 5 / 9 * 4 / 8), atol=0.03, rtol=0)
    assert len({tuple(row.tolist()) for row in chosen_BU}) == 126  # all choices of five out of nine


# ---------------------------------------------------------------------- words


@pytest.mark.parametrize("whole_word", [False, True])
def test_words_are_those_of_the_smallest_random_numbers(whole_word: bool) -> None:
    noise, ids = Noise(), [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [], [15]]
    token_mask = words(ids, 0.4, noise, whole_word=whole_word)
    text = tokens(ids)
    for row, noise_U in enumerate(noise.last[0].numpy()):
        places = np.arange(1, len(ids[row]) + 1)
        unit_of = (places - 1) // 2 if whole_word else places
        units = np.unique(unit_of)
        masked = units[np.argsort(noise_U[units])][: max(1, int(0.4 * len(units) + 0.5))]
        expected = np.zeros(9, dtype=bool)
        expected[places[np.isin(unit_of, masked)]] = True
        np.testing.assert_array_equal(token_mask.mask_CT[row].numpy(), expected)
        token_T = np.where(expected, MASK, text["token_CT"][row].numpy())
        np.testing.assert_array_equal(token_mask.token_CT[row].numpy(), token_T)


@settings(max_examples=60, deadline=None)
@given(captions, ratios, st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_word_masks_for_every_batch(
    ids: list[list[int]], ratio: float, whole_word: bool, keep_and_swap: bool, seed: int
) -> None:
    text = tokens(ids)
    token_mask = words(ids, ratio, Noise(seed), whole_word=whole_word, keep_and_swap=keep_and_swap)
    assert_positions(token_mask.mask_CT, token_mask)
    assert not (token_mask.mask_CT & text["special_CT"]).any()
    assert torch.equal(token_mask.token_CT[~token_mask.mask_CT], text["token_CT"][~token_mask.mask_CT])
    assert ((token_mask.token_CT >= 0) & (token_mask.token_CT < VOCAB)).all()
    if not keep_and_swap:
        assert (token_mask.token_CT[token_mask.mask_CT] == MASK).all()
    for row, mask_T in enumerate(token_mask.mask_CT):
        units = (text["word_CT"][row] if whole_word else torch.arange(len(mask_T)))[~text["special_CT"][row]]
        masked = units[mask_T[~text["special_CT"][row]]]
        assert len(masked.unique()) == (count_masked(len(units.unique()), ratio) if len(units) else 0)
        assert len(masked) == torch.isin(units, masked).sum()  # words entire


@settings(max_examples=30, deadline=None)
@given(captions, ratios, st.booleans(), st.booleans(), st.integers(0, 2))
def test_the_longest_caption_of_the_batch_does_not_matter(
    ids: list[list[int]], ratio: float, whole_word: bool, keep_and_swap: bool, extra: int
) -> None:
    trimmed = words(ids, ratio, Noise(3), whole_word=whole_word, keep_and_swap=keep_and_swap)
    length = trimmed.mask_CT.shape[1]
    padded = words(ids, ratio, Noise(3), min(length + extra, 11), whole_word=whole_word, keep_and_swap=keep_and_swap)
    assert torch.equal(padded.mask_CT[:, :length], trimmed.mask_CT)
    assert torch.equal(padded.token_CT[:, :length], trimmed.token_CT)
    assert not padded.mask_CT[:, length:].any()


@pytest.mark.parametrize("percent", range(0, 101, 7))
def test_the_count_is_exact_also_without_special_tokens(percent: int) -> None:
    """0.29 * 50 is 14.499999... in double precision and 14.5 in single: both counts must use one of them."""
    for ratio, units in itertools.product((percent / 100, 0.29), (1, 7, 50)):
        shape = (2, units)
        special, word = torch.zeros(shape, dtype=torch.bool), torch.arange(units).expand(shape)
        token_mask = mask_tokens(torch.full(shape, 7), special, word, ratio, Noise(), MASK, VOCAB, 50)
        assert token_mask.mask_CT.sum(1).tolist() == [count_masked(units, ratio)] * 2
        assert_positions(token_mask.mask_CT, token_mask)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(ratios, st.integers(0, 9)), min_size=1, max_size=5), st.integers(0, 2**31))
def test_every_caption_may_have_a_share_of_its_own(rows: list[tuple[float, int]], seed: int) -> None:
    ratio = Ratio(torch.tensor([[share] for share, _ in rows]), max(share for share, _ in rows))
    token_mask = words([[5] * length for _, length in rows], ratio, Noise(seed))
    assert_positions(token_mask.mask_CT, token_mask)
    assert token_mask.mask_CT.sum(1).tolist() == [
        count_masked(length, share) if length else 0 for share, length in rows
    ]


def test_drawn_shares_lie_between_the_two_evenly() -> None:
    ratio = Ratio.drawn(0.3, 0.9, torch.linspace(0, 1, 7))
    torch.testing.assert_close(ratio.share_C1, torch.tensor([[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]]).T)
    assert ratio.most == 0.9


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
    vocabulary = Vocabulary(MASK, VOCAB, 9, WORDS.__getitem__)
    measured, trained = (
        RandomTokens(1.0, keep_and_swap=True)(Texts(**parts, training=training), vocabulary, Noise())
        for training in (False, True)
    )
    assert (measured.token_CT == MASK).all()
    assert not (trained.token_CT == MASK).all()


def test_every_word_is_as_likely_as_any_other() -> None:
    mask_CT = words([[7] * 9] * 6000, 0.3, Noise()).mask_CT[:, 1:10].double()
    expected = 6000 * 3 / 9
    assert ((mask_CT.sum(0) - expected) ** 2 / expected).sum() < 20


def test_masks_are_drawn_without_asking_the_device() -> None:
    """A tensor without data cannot be copied to the host."""

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    text = {name: part.to("meta") for name, part in tokens([[5, 6, 7]] * 4).items()}
    for option in (False, True):
        token_mask = mask_tokens(
            text["token_CT"],
            text["special_CT"],
            text["word_CT"],
            0.3,
            uniform,
            MASK,
            VOCAB,
            11,
            option,
            option,
        )
        assert token_mask.mask_CT.shape == (4, 5)
    patches = mask_patches(torch.ones(4, dtype=torch.bool, device="meta"), (4, 4), 2, 0.6, uniform)
    assert patches.index_BK.shape == (4, 8)
