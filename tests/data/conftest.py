"""What the tests of readers and of captions share."""

from pathlib import Path

import pytest
from transformers import BertTokenizerFast, PreTrainedTokenizerFast, RobertaTokenizerFast

from maskvlm.data.text import train_tokenizer


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of data sets go to the test's folder, not to the user's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def captions() -> list[str]:
    """A small language of 108 captions."""
    return [
        f"{start} {size} {colour} {thing} {place} the {colour} {other} ."
        for start in ("There is a", "A", "One")
        for size in ("small", "large", "tiny")
        for colour in ("red", "green", "blue")
        for thing, other in (("circle", "square"), ("triangle", "star"))
        for place in ("left of", "beside", "unbelievably near")
    ]


@pytest.fixture(scope="session")
def trained(captions: list[str]) -> PreTrainedTokenizerFast:
    return train_tokenizer(captions, 200)


@pytest.fixture(scope="session")
def bert() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "[", "]", "mask", "run", "##ning", "##s"]
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})


@pytest.fixture(scope="session")
def roberta(shared_data: Path) -> PreTrainedTokenizerFast:
    return RobertaTokenizerFast.from_pretrained(shared_data / "roberta_vocab")
