"""The tokenizer trained on the spot, and any tokenizer stored as text."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, RobertaTokenizerFast

from maskvlm.data.caption_text import clean_caption
from maskvlm.data.text import (
    SPECIAL_TOKENS,
    Captioner,
    _alphabet,
    tokenizer_from_json,
    tokenizer_hash,
    tokenizer_json,
    train_tokenizer,
)
from maskvlm.utils.errors import ExitCode, UserError


def test_a_trained_tokenizer_has_the_five_special_ids_and_lower_cases(
    trained: PreTrainedTokenizerFast,
) -> None:
    assert trained.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    names = ("pad", "unk", "cls", "sep", "mask")
    assert [getattr(trained, f"{name}_token_id") for name in names] == [0, 1, 2, 3, 4]
    assert trained.all_special_ids == [1, 3, 0, 2, 4]
    assert sorted(trained.get_vocab().values()) == list(range(len(trained)))
    assert trained.tokenize("A Red CIRCLE") == ["a", "red", "circle"]


def test_a_frequent_word_is_one_piece_and_an_unseen_one_several(trained: PreTrainedTokenizerFast) -> None:
    assert trained.tokenize("circle") == ["circle"]
    pieces = trained.tokenize("reddest")
    assert len(pieces) > 1
    assert "".join(pieces).replace("##", "") == "reddest"
    assert trained.tokenize("犬") == ["[UNK]"]


@pytest.mark.parametrize("size", [20, 60, 200])
def test_the_vocabulary_never_exceeds_its_size(size: int, captions: list[str]) -> None:
    chinese = [chr(0x4E00 + i) + chr(0x5000 + i) for i in range(500)]
    assert len(train_tokenizer(captions, size)) <= size
    assert len(train_tokenizer(chinese, size)) <= size


@given(st.lists(st.text(st.characters(max_codepoint=0x4E10) | st.sampled_from(" \t\u3000")), max_size=5))
def test_the_alphabet_is_that_of_whole_texts(captions: list[str]) -> None:
    """Though it is counted part by part."""
    tokenizer = Tokenizer(models.WordPiece())
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [clean_caption(caption)[0] for caption in captions]
    words = [
        word
        for text in texts
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    ]
    counts = Counter("".join(words))
    first = sorted(sorted(counts, key=lambda letter: (-counts[letter], letter))[:4])
    inner = {letter for word in words for letter in word[1:]}
    assert _alphabet(tokenizer, texts, 4) == (first, [f"##{letter}" for letter in first if letter in inner])


TRAIN_ELSEWHERE = """
import sys
from maskvlm.data.text import tokenizer_json, train_tokenizer
captions = sys.stdin.read().splitlines()
sys.stdout.write(tokenizer_json(train_tokenizer(captions, 200)))
"""


@pytest.mark.parametrize("threads", ["1", "4"])
def test_training_again_elsewhere_in_another_order_gives_the_same_json(
    trained: PreTrainedTokenizerFast, captions: list[str], threads: str, root: Path
) -> None:
    environment = {
        "RAYON_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONPATH": str(root / "src"),
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": "1",
    }
    text = "\n".join(reversed(captions))
    command = [sys.executable, "-c", TRAIN_ELSEWHERE]
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == tokenizer_json(trained)


def test_real_captions_train_in_seconds_and_leave_nothing_unknown(shared_data: Path) -> None:
    images = json.loads((shared_data / "flickr8k" / "dataset_flickr8k.json").read_text())["images"]
    captions = [sentence["raw"] for image in images for sentence in image["sentences"]]
    tokenizer = train_tokenizer(captions, 4000)
    assert len(tokenizer) == 4000
    tokens = Captioner(tokenizer, 30)(captions[:2000]).token_CT
    assert (tokens == tokenizer.unk_token_id).float().mean() < 1e-4


@pytest.mark.parametrize("kind", ["trained", "bert", "roberta"])
def test_a_stored_tokenizer_comes_back_the_same(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(kind)
    text = tokenizer_json(tokenizer)
    back = tokenizer_from_json(text)
    assert tokenizer_json(back) == text
    assert back.special_tokens_map == tokenizer.special_tokens_map
    assert back.all_special_ids == tokenizer.all_special_ids
    for caption in ("a dog runs", "A <mask> [MASK] dog's café</s>", "  two  spaces"):
        assert back(caption)["input_ids"] == tokenizer(caption)["input_ids"]


def test_a_stored_tokenizer_keeps_extra_special_tokens_and_forgets_padding(shared_data: Path) -> None:
    folder = shared_data / "roberta_vocab"
    tokenizer = RobertaTokenizerFast.from_pretrained(folder, extra_special_tokens=["<region>"])
    text = tokenizer_json(tokenizer)
    assert tokenizer_from_json(text).all_special_tokens == tokenizer.all_special_tokens
    tokenizer("a dog", padding="max_length", max_length=9, truncation=True)
    assert tokenizer_json(tokenizer) == text


def test_the_hash_tells_tokenizers_apart(
    trained: PreTrainedTokenizerFast, bert: PreTrainedTokenizerFast, captions: list[str]
) -> None:
    assert tokenizer_hash(trained) == tokenizer_hash(tokenizer_from_json(tokenizer_json(trained)))
    assert len({tokenizer_hash(tokenizer) for tokenizer in (trained, bert, train_tokenizer(captions, 100))}) == 3


@pytest.mark.parametrize("text", ["", "{", "{}", '{"tokenizer": {}, "special": {}, "extra": []}', "[" * 100_000])
def test_a_broken_stored_tokenizer_is_one_clear_line(text: str) -> None:
    with pytest.raises(UserError, match="the stored tokenizer cannot be read") as caught:
        tokenizer_from_json(text)
    assert caught.value.code == ExitCode.BAD_DATA
    assert "\n" not in str(caught.value)
