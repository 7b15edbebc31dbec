"""Texts that the tokenizer does not know are told at the start, by source, and stop a run that would learn nothing."""

import pytest

from maskvlm.data.text import Captioner, train_tokenizer
from maskvlm.data.unknown_words import check_unknown
from maskvlm.utils.errors import ExitCode, UserError

ENGLISH, ARABIC = "a red dog in the snow", "كلب أحمر في الثلج"


class TwoSets:
    """Rows of two sets, as `Mix` has them; no image is opened."""

    fingerprint = "x"
    rows = [*[("coco", ENGLISH)] * 3, ("mine", ARABIC), ("mine", f"{ENGLISH} كلب")]

    def __len__(self) -> int:
        return len(self.rows)

    def source(self, index: int) -> str:
        return self.rows[index][0]

    def captions(self, index: int) -> list[str]:
        return [self.rows[index][1]]

    def __getitem__(self, index: int) -> object:
        raise AssertionError("no image is opened")


def test_the_share_of_words_is_told_by_source_and_stops_above_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    captioner = Captioner(train_tokenizer([ENGLISH, "two cats"], 100), 30)
    check_unknown(TwoSets(), captioner, 0.5)
    assert "mine 45.5 %" in capsys.readouterr().out  # 5 of 11 words
    with pytest.raises(UserError, match=r"data.source \(mine\)") as raised:
        check_unknown(TwoSets(), captioner, 0.4)
    assert raised.value.code == ExitCode.BAD_DATA
