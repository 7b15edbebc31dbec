"""Captions: what is cleaned, what becomes which token, and the tokenizer trained on the spot."""

import pickle
import time
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from maskvlm.data.caption_text import MAX_CAPTION_BYTES, caption_id, clean_caption, stable_id
from maskvlm.data.text import SPECIAL_TOKENS, Captioner
from maskvlm.utils.errors import UserError

EXAMPLES = [
    ("a dog", "a dog", None),
    ("  a\tdog \n runs ", "a dog runs", None),
    ("", "", "empty"),
    (" \t\n\u2003", "", "empty"),
    ("\x00\u200b", "", "empty"),
    ("cafe\u0301", "caf\u00e9", None),
    ("a \x00dog\u200d", "a dog", "control"),
    ("a \x1b[1;31mred\x1b[0m dog", "a red dog", "control"),
    ("dog \ud800", "dog \ufffd", "surrogate"),
    ("\udc00 \ud800\x07", "\ufffd \ufffd", "surrogate"),
    ("smile \ud83d\ude00", "smile \U0001f600", "surrogate"),
    ("\ufb01ne \u2460 \u4e00", "\ufb01ne \u2460 \u4e00", None),
]


@pytest.mark.parametrize(("text", "clean", "note"), EXAMPLES)
def test_clean_caption_gives_the_exact_text_and_note(text: str, clean: str, note: str | None) -> None:
    assert clean_caption(text) == (clean, note)


@pytest.mark.parametrize("text", ["word " * 10_000, "x" * 100_000, "é" * 5_000, "e\u0301" * 50_000])
def test_an_overlong_caption_is_cut_at_the_cap(text: str) -> None:
    clean, note = clean_caption(text)
    assert note == "cut"
    assert MAX_CAPTION_BYTES // 2 < len(clean.encode()) <= MAX_CAPTION_BYTES
    assert unicodedata.normalize("NFC", text).startswith(clean)


def test_a_huge_caption_is_cut_before_any_work_is_done_on_it() -> None:
    text = "\u00e9" * 30_000_000
    start = time.perf_counter()
    assert clean_caption(text)[1] == "cut"
    assert time.perf_counter() - start < 0.2


def test_a_caption_of_exactly_the_cap_is_not_cut() -> None:
    assert clean_caption("x" * MAX_CAPTION_BYTES) == ("x" * MAX_CAPTION_BYTES, None)
    assert clean_caption("é" * (MAX_CAPTION_BYTES // 2))[1] is None


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


def test_caption_ids_ignore_case_and_white_space_only() -> None:
    assert caption_id("A  Dog\n") == caption_id("a dog")
    assert caption_id("a dog") != caption_id("a dog .")


def _read(tokenizer: PreTrainedTokenizerFast, caption: str) -> list[str]:
    tokens = Captioner(tokenizer, 30)([caption])
    return [str(token) for token in tokenizer.convert_ids_to_tokens(tokens.token_CT[0].tolist())]


def test_special_tokens_in_a_caption_are_plain_text_to_bert(bert: PreTrainedTokenizerFast) -> None:
    assert bert.mask_token_id in bert("a [MASK] dog")["input_ids"]  # what the library does unasked
    assert _read(bert, "a [MASK] dog") == ["[CLS]", "a", "[", "mask", "]", "dog", "[SEP]"]
    assert _read(bert, "[PAD][SEP]")[1:-1] == ["[", "[UNK]", "]", "[", "[UNK]", "]"]


def test_special_tokens_in_a_caption_are_plain_text_to_roberta(roberta: PreTrainedTokenizerFast) -> None:
    assert roberta.mask_token_id in roberta("a <mask> dog")["input_ids"]
    assert _read(roberta, "a <mask> dog</s>") == [
        "<s>",
        "a",
        "Ġ<",
        "mask",
        ">",
        "Ġdog",
        "</",
        "s",
        ">",
        "</s>",
    ]


def test_a_tokenizer_that_keeps_brackets_whole_reads_them_as_unknown() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {token: number for number, token in enumerate([*SPECIAL_TOKENS, "dog"])}
    whole = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, **dict(zip(names, SPECIAL_TOKENS, strict=True)))
    assert Captioner(tokenizer, 9)(["dog [MASK] [PAD] dog"]).token_CT.tolist() == [[2, 5, 1, 1, 5, 3]]


def test_a_word_in_pieces_of_hardly_two_characters_is_unknown() -> None:
    """Foreign words are spelled so: `Katze` as `ka ##t ##z ##e`, but also as `ein ##e ##r` by chance."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = ["ka", "##tz", "##e", "##tzen", "##t", "dog", "##gy"]
    words = Tokenizer(models.WordPiece({t: n for n, t in enumerate([*SPECIAL_TOKENS, *pieces])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    captioner = Captioner(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"), 30)
    assert captioner.unknown_words("katze katzene kat doggy dog dogtt") == ["katze", "dogtt"]


def test_using_a_captioner_leaves_the_tokenizer_as_it_was(bert: PreTrainedTokenizerFast) -> None:
    before = bert("a [MASK] dog")["input_ids"]
    Captioner(bert, 5)(["a dog runs runs runs runs"])
    backend = bert.backend_tokenizer  # looked at before the library sets it up for its next call
    assert (backend.truncation, backend.padding, backend.encode_special_tokens) == (None, None, False)
    assert bert("a [MASK] dog")["input_ids"] == before


def test_captions_are_padded_to_the_longest_and_marked(bert: PreTrainedTokenizerFast) -> None:
    tokens = Captioner(bert, 30)(["a dog", "", "a dog runs"])
    assert tokens.token_CT.tolist() == [[2, 5, 6, 3, 0, 0], [2, 3, 0, 0, 0, 0], [2, 5, 6, 10, 12, 3]]
    assert tokens.attention_CT.int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6]
    assert tokens.special_CT.int().tolist() == [[1, 0, 0, 1, 1, 1], [1] * 6, [1, 0, 0, 0, 0, 1]]
    assert tokens.word_CT.tolist() == [[-1, 0, 1, -1, -1, -1], [-1] * 6, [-1, 0, 1, 2, 2, -1]]
    kinds = [tensor.dtype for tensor in tokens]
    assert kinds == [torch.long, torch.bool, torch.bool, torch.long]


def test_a_long_caption_keeps_its_end_token(bert: PreTrainedTokenizerFast) -> None:
    tokens = Captioner(bert, 5)(["a dog " * 10_000, "dog"])
    assert tokens.token_CT.tolist() == [[2, 5, 6, 5, 3], [2, 6, 3, 0, 0]]


def test_captions_are_cleaned_before_they_become_tokens(bert: PreTrainedTokenizerFast) -> None:
    assert Captioner(bert, 9)(["a\x00 d\u200bog"]).token_CT.tolist() == [[2, 5, 6, 3]]
    Captioner(bert, 9)(["dog \ud800"])  # the library alone raises TypeError


def test_no_captions_give_empty_tensors(bert: PreTrainedTokenizerFast) -> None:
    assert [tuple(tensor.shape) for tensor in Captioner(bert, 9)([])] == [(0, 0)] * 4


def test_the_pieces_of_a_word_share_its_number_in_roberta(roberta: PreTrainedTokenizerFast) -> None:
    tokens = Captioner(roberta, 30)(["the man's unbelievableness, tall"])
    pieces = roberta.convert_ids_to_tokens(tokens.token_CT[0].tolist())
    assert pieces == ["<s>", "the", "Ġman", "'s", "Ġunbeliev", "abl", "eness", ",", "Ġtall", "</s>"]
    assert tokens.word_CT[0].tolist() == [-1, 0, 1, 2, 3, 3, 3, 4, 5, -1]


def test_a_captioner_sent_to_a_data_worker_still_guards(bert: PreTrainedTokenizerFast) -> None:
    sent = pickle.loads(pickle.dumps(Captioner(bert, 6)))
    for tensor, same in zip(sent(["a [MASK]"]), Captioner(bert, 6)(["a [MASK]"]), strict=True):
        assert torch.equal(tensor, same)
    assert bert.mask_token_id not in sent(["a [MASK] dog"]).token_CT


def test_what_a_captioner_cannot_use_is_named(bert: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="text_length: 2 leaves no room"):
        Captioner(bert, 2)
    with pytest.raises(UserError, match="str is not a fast tokenizer"):
        Captioner("bert", 30)  # type: ignore[arg-type]
    padless = PreTrainedTokenizerFast(tokenizer_object=bert.backend_tokenizer)
    with pytest.raises(UserError, match="no padding token"):
        Captioner(padless, 30)
