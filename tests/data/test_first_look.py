"""The first look: what is counted of captions and rows, and the image of it.

How to break the code so that these fail: count captions before cleaning, sample the first rows only, draw without
`SHEET_IMAGES`, write anything besides first-look.png.
"""

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from toy_raw import Toy, encoded, make, photo, row

from maskvlm.data.prepare import first_look
from maskvlm.data.prepare.first_look import Captions, DrawnSample, look_at_raw
from maskvlm.data.prepare.rows import Settings
from maskvlm.data.raw.base import BadRow
from maskvlm.utils.errors import ExitCode, UserError

SETTINGS = Settings("mine", 48)


def test_captions_are_counted() -> None:
    captions = Captions()
    captions.add(["a dog", "A dog", "three whole words"])
    captions.add(["a  dog here now"])
    assert captions.words == Counter({2: 2, 3: 1, 4: 1})
    assert captions.card() == {"repeated_captions": 1, "caption_words": {"5 %": 2, "50 %": 2, "95 %": 4}}
    assert captions.line() == "captions have 2 words (2 to 4 for nine of ten); 25.0 % repeat another one"
    assert Captions().card() == {"repeated_captions": 0, "caption_words": {"5 %": 0, "50 %": 0, "95 %": 0}}


def test_a_raw_set_is_told_and_drawn_but_not_prepared(tmp_path: Path) -> None:
    rows = [*(row(number) for number in range(30)), row(3), row(40, captions=(" ",)), row(41, image="/no.jpg")]
    rows += [row(42, image=encoded(photo(1))[:300]), row(43, "val"), BadRow("gone", "x", "x", "train")]  # type: ignore[list-item]
    lines = look_at_raw(Toy(rows), SETTINGS, tmp_path / "mine" / "first-look.png")  # type: ignore[arg-type]
    assert lines == [
        "mine: 32 images with 64 captions (train 31, val 1)",
        "captions have 3 words (3 to 3 for nine of ten); 48.4 % repeat another one",
        "would be left out: 4",
        "          1  duplicate image id; for example toy.csv:3: id 'toy 3' was given to an earlier row; "
        "each image needs its own",
        "          1  empty caption; for example toy.csv:40: no caption is left",
        "          1  missing; for example toy.csv:41: /no.jpg: there is no such file",
        "          1  gone; for example x",
        "unusable among the 32 images that were opened: 1",
        "          1  truncated; for example toy.csv:42: bad image, truncated (Truncated File Read). Replace it or"
        " drop its row.",
    ]
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["first-look.png"]
    with Image.open(tmp_path / "mine" / "first-look.png") as image:
        assert image.width == 1600
        assert image.height > 1500


def test_of_a_long_set_the_first_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_look, "MOST_ROWS", 5)
    lines = look_at_raw(Toy([row(number) for number in range(9)]), SETTINGS, tmp_path / "a.png")
    assert lines[0] == "mine, the first 5: 5 images with 10 captions (train 5)"


def test_nothing_to_look_at_says_why(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"mine: no row can be used \(would be left out: 1; +1  missing; for example toy.csv:1: /no.jpg: there is",
    ) as caught:
        look_at_raw(Toy([row(1, image="/no.jpg")]), SETTINGS, tmp_path / "a.png")
    assert caught.value.code == ExitCode.BAD_DATA


def test_the_sample_is_spread_over_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_look, "SAMPLE", 20)
    samples = []
    for _ in range(2):
        sample = DrawnSample()
        for number in range(400):
            sample.add(row(1)._replace(image_id=str(number)))
        samples.append([each.image_id for each in sample.rows])
    assert samples[0] == samples[1]
    numbers = sorted(map(int, samples[0]))
    assert len(numbers) == 20
    assert numbers[2] < 200 < numbers[-3]


def test_a_prepared_set_has_its_look(tmp_path: Path) -> None:
    rows = [row(number, image=encoded(photo(number % 3), "PNG")) for number in range(5)]
    manifest = make(tmp_path / "toy", [*rows, row(9, captions=("\U0001f600 猫 قطة $x_1$",))])
    assert manifest["look"] == {
        "repeated_captions": 4,
        "caption_words": {"5 %": 3, "50 %": 3, "95 %": 4},
        "repeated_looks": 2,
    }
    with Image.open(tmp_path / "toy" / "first-look.png") as image:
        assert image.size[0] == 1600
