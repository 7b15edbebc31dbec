"""Row 55: texts that the tokenizer does not know are told at the start, by source, and stop a run that would learn
from nothing else."""

from typing import Any

import pytest
from guards import Build
from transformers import PreTrainedTokenizerFast

from maskvlm.data.batch import InputSpec
from maskvlm.data.module import PairData
from maskvlm.data.text import Captioner, train_tokenizer
from maskvlm.data.unknown_words import check_unknown, spelt_shares, unknown_shares
from maskvlm.utils.errors import ExitCode, UserError

ENGLISH, ARABIC = "a red dog in the snow", "كلب أحمر في الثلج"


class Two:
    """Rows of two sets, as `Mix` has them."""

    fingerprint = "x"

    def __init__(self, texts: dict[str, list[str]]) -> None:
        self.rows = [(name, text) for name, several in texts.items() for text in several]

    def __len__(self) -> int:
        return len(self.rows)

    def source(self, index: int) -> str:
        return self.rows[index][0]

    def captions(self, index: int) -> list[str]:
        return [self.rows[index][1]]

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("no image is opened")


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    tokenizer: PreTrainedTokenizerFast = train_tokenizer([ENGLISH, "two cats"], 100)
    return Captioner(tokenizer, 30)


def test_the_share_is_of_words_by_source(captioner: Captioner) -> None:
    split = Two({"coco": [ENGLISH] * 3, "mine": [ARABIC, f"{ENGLISH} كلب"]})
    assert unknown_shares(split, captioner) == {"coco": (0.0, 18), "mine": (5 / 11, 11)}


@pytest.mark.guard("maskvlm.data.unknown_words:check_unknown")
def test_it_is_told_and_stops_above_the_bound(
    captioner: Captioner, capsys: pytest.CaptureFixture[str], build: Build
) -> None:
    split = Two({"coco": [ENGLISH] * 3, "mine": [ARABIC, f"{ENGLISH} كلب"]})
    check_unknown(split, captioner, 0.5)
    output = capsys.readouterr().out
    assert output.startswith("unknown words in the training texts: mine 45.5 % (")
    assert "كلب" in output
    assert output.endswith("); they remain unknown, because the tokenizer comes from the model\n")
    with pytest.raises(
        UserError, match=r"data.source \(mine\): the tokenizer does not know 45 % of 11 words"
    ) as raised:
        check_unknown(split, captioner, 0.4)
    assert raised.value.code == ExitCode.BAD_DATA


def test_an_evaluation_tells_it_and_goes_on(captioner: Captioner, capsys: pytest.CaptureFixture[str]) -> None:
    class Source:
        def split(self, name: str) -> Two:
            return Two({"mine": [ARABIC]} if name == "val" else {"mine": [ENGLISH]})

    spec = InputSpec(16, (0.5,) * 3, (0.5,) * 3, 30, 100, captioner.tokenizer)
    PairData(Source(), spec, 2, steps=1).setup("validate")  # type: ignore[arg-type]
    output = capsys.readouterr().out
    assert output.startswith("unknown words in the measured texts: mine 100.0 % (")


def test_words_that_are_only_spelt_are_told(captioner: Captioner, capsys: pytest.CaptureFixture[str]) -> None:
    """All letters are known, and none of the words: two of eight."""
    split = Two({"coco": [ENGLISH] * 3, "mine": [ENGLISH, "gods tend"]})
    assert spelt_shares(split, captioner, unknown_shares(split, captioner)) == {"coco": 0.0, "mine": 2 / 8}
    check_unknown(split, captioner, 0.5)
    message = "words of the training texts that the tokenizer splits into single letters: mine 25 %\n"
    assert capsys.readouterr().out == message


def test_texts_that_are_cut_are_told(captioner: Captioner, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 30 tokens, two are the start and the end."""
    read, cut = "two cats " * 14, "two cats " * 14 + "two"
    assert (captioner.count(read), captioner.count(cut)) == (28, 29)
    check_unknown(Two({"coco": [read] * 3, "mine": [read, cut]}), captioner, 0.5)
    message = (
        "training texts that are longer than the 28 tokens that the model reads (model.backbone.text.text_length), "
    )
    assert capsys.readouterr().out == f"{message}and are cut: mine 50 %\n"
    check_unknown(Two({"coco": [read] * 99 + [cut]}), captioner, 0.5)
    assert not capsys.readouterr().out


def test_unknown_words_are_not_spelt_ones(captioner: Captioner) -> None:
    """Nor is a text without spaces more than its words."""
    split = Two({"mine": ["\u72d7\u5728\u96ea\u5730\u91cc", ENGLISH]})
    assert spelt_shares(split, captioner, unknown_shares(split, captioner)) == {"mine": 0.0}


def test_an_empty_split_and_empty_texts_are_told_by_others(captioner: Captioner) -> None:
    check_unknown(Two({"a": [""]}), captioner, 0.0)
    check_unknown(Two({"a": []}), captioner, 0.0)
