"""Captions: what is cleaned, what becomes which token, the tokenizer trained on the spot or stored as text."""

import time
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from maskvlm.data.caption_text import MAX_CAPTION_BYTES, caption_id, clean_caption, stable_id
from maskvlm.data.text import (
    SPECIAL_TOKENS,
    Captioner,
    tokenizer_from_json,
    tokenizer_hash,
    tokenizer_json,
    train_tokenizer,
)
from maskvlm.utils.errors import ExitCode, UserError


@pytest.mark.parametrize(
    ("text", "clean", "note"),
    [
        ("  a\tdog \n runs ", "a dog runs", None),
        ("", "", "empty"),
        (" \t\n\u2003", "", "empty"),
        ("\x00\u200b", "", "empty"),
        ("cafe\u0301", "caf\u00e9", None),
        ("a \x00dog\u200d", "a dog", "control"),
        ("a \x1b[1;31mred\x1b[0m dog", "a red dog", "control"),
        ("\udc00 \ud800\x07", "\ufffd \ufffd", "surrogate"),
        ("smile \ud83d\ude00", "smile \U0001f600", "surrogate"),
        ("\ufb01ne \u2460 \u4e00", "\ufb01ne \u2460 \u4e00", None),
    ],
)
def test_clean_caption_gives_the_exact_text_and_note(text: str, clean: str, note: str | None) -> None:
    assert clean_caption(text) == (clean, note)


@pytest.mark.parametrize(
    "text", ["word " * 10_000, "é" * 5_000, "e\u0301" * 50_000, "é" * 30_000_000], ids=["words", "é", "e", "huge"]
)
def test_an_overlong_caption_is_cut_at_the_cap_before_any_work_is_done_on_it(text: str) -> None:
    start = time.perf_counter()
    clean, note = clean_caption(text)
    assert time.perf_counter() - start < 0.2
    assert note == "cut"
    assert MAX_CAPTION_BYTES // 2 < len(clean.encode()) <= MAX_CAPTION_BYTES
    assert unicodedata.normalize("NFC", text[:MAX_CAPTION_BYTES]).startswith(clean)
    assert clean_caption("é" * (MAX_CAPTION_BYTES // 2))[1] is None
    assert clean_caption("x" * MAX_CAPTION_BYTES) == ("x" * MAX_CAPTION_BYTES, None)


@given(st.text(st.characters(exclude_categories=[]), max_size=200))
def test_clean_text_is_one_printable_composed_line_and_stays_so(text: str) -> None:
    clean, note = clean_caption(text)
    assert clean == unicodedata.normalize("NFC", clean) == " ".join(clean.split())
    assert not any(unicodedata.category(character) in ("Cc", "Cf", "Cs") for character in clean)
    assert (note == "empty") == (clean == "")
    assert clean_caption(clean)[0] == clean


def test_ids_are_63_bit_and_the_same_everywhere() -> None:
    assert stable_id("") == 0xE4A6A0577479B2B4 >> 1  # `printf '' | b2sum -l 64`
    assert stable_id("a dog") == 0xFE02E6665A225AC7 >> 1
    ids = [stable_id(str(number)) for number in range(1000)]
    assert len(set(ids)) == 1000
    assert 0 <= min(ids) < 2**55
    assert 2**62 < max(ids) < 2**63
    assert stable_id("\ud800") != stable_id("\ud801")
    assert caption_id("A  Dog\n") == caption_id("a dog") != caption_id("a dog .")


def _read(tokenizer: PreTrainedTokenizerFast, caption: str) -> list[str]:
    tokens = Captioner(tokenizer, 30)([caption])
    return [str(token) for token in tokenizer.convert_ids_to_tokens(tokens.token_CT[0].tolist())]


def test_special_tokens_in_a_caption_are_plain_text(
    bert: PreTrainedTokenizerFast, roberta: PreTrainedTokenizerFast
) -> None:
    assert bert.mask_token_id in bert("a [MASK] dog")["input_ids"]  # what the library does unasked
    assert _read(bert, "a [MASK] dog") == ["[CLS]", "a", "[", "mask", "]", "dog", "[SEP]"]
    assert _read(bert, "[PAD][SEP]")[1:-1] == ["[", "[UNK]", "]", "[", "[UNK]", "]"]
    assert roberta.mask_token_id in roberta("a <mask> dog")["input_ids"]
    assert _read(roberta, "a <mask> dog</s>") == ["<s>", "a", "Ġ<", "mask", ">", "Ġdog", "</", "s", ">", "</s>"]


def wordpiece(*pieces: str) -> Tokenizer:
    """A tokenizer of the special tokens and these pieces, which splits at spaces alone."""
    vocab = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def test_a_tokenizer_that_keeps_brackets_whole_reads_them_as_unknown() -> None:
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    special = dict(zip(names, SPECIAL_TOKENS, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=wordpiece("dog"), **special)
    assert Captioner(tokenizer, 9)(["dog [MASK] [PAD] dog"]).token_CT.tolist() == [[2, 5, 1, 1, 5, 3]]


def test_a_word_in_pieces_of_hardly_two_characters_is_unknown() -> None:
    """Foreign words are spelled so: `Katze` as `ka ##t ##z ##e`, but also as `ein ##e ##r` by chance."""
    words = wordpiece("ka", "##tz", "##e", "##tzen", "##t", "dog", "##gy")
    captioner = Captioner(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"), 30)
    assert captioner.unknown_words("katze katzene kat doggy dog dogtt") == ["katze", "dogtt"]


def test_captions_are_padded_to_the_longest_and_marked(bert: PreTrainedTokenizerFast) -> None:
    tokens = Captioner(bert, 30)(["a dog", "", "a dog runs"])
    assert tokens.token_CT.tolist() == [[2, 5, 6, 3, 0, 0], [2, 3, 0, 0, 0, 0], [2, 5, 6, 10, 12, 3]]
    assert tokens.attention_CT.int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6]
    assert tokens.special_CT.int().tolist() == [[1, 0, 0, 1, 1, 1], [1] * 6, [1, 0, 0, 0, 0, 1]]
    assert tokens.word_CT.tolist() == [[-1, 0, 1, -1, -1, -1], [-1] * 6, [-1, 0, 1, 2, 2, -1]]
    kinds = [tensor.dtype for tensor in tokens]
    assert kinds == [torch.long, torch.bool, torch.bool, torch.long]
    short = Captioner(bert, 5)(["a dog " * 10_000, "dog"]).token_CT
    assert short.tolist() == [[2, 5, 6, 5, 3], [2, 6, 3, 0, 0]]  # a long one keeps its end
    assert Captioner(bert, 9)(["a\x00 d\u200bog"]).token_CT.tolist() == [[2, 5, 6, 3]]  # cleaned before
    assert [tuple(tensor.shape) for tensor in Captioner(bert, 9)([])] == [(0, 0)] * 4


def test_the_pieces_of_a_word_share_its_number_in_roberta(roberta: PreTrainedTokenizerFast) -> None:
    tokens = Captioner(roberta, 30)(["the man's unbelievableness, tall"])
    pieces = roberta.convert_ids_to_tokens(tokens.token_CT[0].tolist())
    assert pieces == ["<s>", "the", "Ġman", "'s", "Ġunbeliev", "abl", "eness", ",", "Ġtall", "</s>"]
    assert tokens.word_CT[0].tolist() == [-1, 0, 1, 2, 3, 3, 3, 4, 5, -1]


# ---------------------------------------------------------------------- the tokenizer


def test_a_trained_tokenizer_has_the_five_special_ids_and_lower_cases(
    trained: PreTrainedTokenizerFast,
) -> None:
    assert trained.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    names = ("pad", "unk", "cls", "sep", "mask")
    assert [getattr(trained, f"{name}_token_id") for name in names] == [0, 1, 2, 3, 4]
    assert trained.all_special_ids == [1, 3, 0, 2, 4]
    assert sorted(trained.get_vocab().values()) == list(range(len(trained)))
    assert trained.tokenize("A Red CIRCLE") == ["a", "red", "circle"]
    pieces = trained.tokenize("reddest")
    assert len(pieces) > 1
    assert "".join(pieces).replace("##", "") == "reddest"
    assert trained.tokenize("犬") == ["[UNK]"]


def test_training_in_another_order_gives_the_same_json_and_other_captions_another(
    trained: PreTrainedTokenizerFast, bert: PreTrainedTokenizerFast, captions: list[str]
) -> None:
    again = train_tokenizer(captions[::-1], 200)
    assert tokenizer_json(again) == tokenizer_json(trained)
    assert tokenizer_hash(again) == tokenizer_hash(trained)
    assert len({tokenizer_hash(tokenizer) for tokenizer in (trained, bert, train_tokenizer(captions, 100))}) == 3


@pytest.mark.parametrize("kind", ["trained", "roberta"])
def test_a_stored_tokenizer_comes_back_the_same(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(kind)
    text = tokenizer_json(tokenizer)
    back = tokenizer_from_json(text)
    assert tokenizer_json(back) == text
    assert back.special_tokens_map == tokenizer.special_tokens_map
    assert back.all_special_ids == tokenizer.all_special_ids
    for caption in ("a dog runs", "A <mask> [MASK] dog's café</s>", "  two  spaces"):
        assert back(caption)["input_ids"] == tokenizer(caption)["input_ids"]


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"tokenizer": {}, "special": {}, "extra": []}', "[" * 100_000], ids=["cut", "0", "no", "deep"]
)
def test_a_broken_stored_tokenizer_is_one_clear_line(text: str) -> None:
    with pytest.raises(UserError, match="the stored tokenizer cannot be read") as caught:
        tokenizer_from_json(text)
    assert caught.value.code == ExitCode.BAD_DATA
    assert "\n" not in str(caught.value)
