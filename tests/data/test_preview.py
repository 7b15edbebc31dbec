"""The contact sheet: every image with its captions, and a reason where there is no image."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from maskvlm.data.batch import Row
from maskvlm.data.preview import contact_sheet, draw_sheet, read_row
from maskvlm.utils.errors import ExitCode, UserError


class Toys:
    """Pairs whose images are wide red cards, except that the last is no image."""

    fingerprint = "toys"

    def __init__(self, count: int) -> None:
        self.count, self.read = count, list[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Row:
        self.read.append(index)
        image = Image.new("RGB", (30, 20), "red") if index < self.count - 1 else b"no image"
        captions = [f"{index} cards for $^$ each", "word " * 500, *"abcd"]
        return Row(image=image, captions=captions, image_id=f"card-{index}", origin=f"toys row {index}")


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text()]


def test_a_sheet_is_an_image_file_of_rows_from_all_over(tmp_path: Path) -> None:
    toys = Toys(100)
    path = contact_sheet(toys, tmp_path / "new" / "sheet.png", count=5)
    assert path == tmp_path / "new" / "sheet.png"
    assert toys.read == [0, 20, 40, 60, 80]
    sheet = Image.open(path).convert("RGB")
    assert sheet.format is None or sheet.format == "PNG"
    reds = sum(count for count, colour in sheet.getcolors(sheet.width * sheet.height) or [] if colour == (255, 0, 0))
    assert reds / (sheet.width * sheet.height) > 0.1


def test_every_row_is_shown_when_there_are_fewer_than_asked_for(tmp_path: Path) -> None:
    toys = Toys(3)
    contact_sheet(toys, tmp_path / "sheet.png", count=24)
    assert toys.read == [0, 1, 2]


def test_captions_stand_below_their_image_shortened_and_as_they_are() -> None:
    toys = Toys(3)
    figure = draw_sheet([read_row(toys, 0), read_row(toys, 1)])
    below = texts_of(figure)
    assert [text.splitlines()[0] for text in below] == ["- 0 cards for $^$ each", "- 1 cards for $^$ each"]
    assert below[0].splitlines()[-1] == "  and 1 more"
    assert "word ..." in below[0]
    assert len(below[0].splitlines()) < 12
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["card-0", "card-1"]
    figure.draw_without_rendering()  # a dollar sign read as a formula would raise here


def test_a_row_that_cannot_be_read_says_why_in_its_place() -> None:
    toys = Toys(2)
    figure = draw_sheet([read_row(toys, 0), read_row(toys, 1)])
    (reason,) = [text for text in texts_of(figure) if "not readable" in text]
    assert "toys row 1" in reason


@pytest.mark.parametrize(("length", "count"), [(0, 24), (5, 0)])
def test_nothing_to_show_is_a_users_mistake(tmp_path: Path, length: int, count: int) -> None:
    with pytest.raises(UserError, match="no images to show"):
        contact_sheet(Toys(length), tmp_path / "sheet.png", count)
    assert not list(tmp_path.iterdir())


def test_letters_that_the_font_lacks_are_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class Cat(Toys):
        def __getitem__(self, index: int, /) -> Row:
            return {**super().__getitem__(index), "captions": ["\u732b"]}

    contact_sheet(Cat(2), tmp_path / "sheet.png")
    assert not [each for each in recwarn if "Glyph" in str(each.message)]


def test_a_sheet_that_cannot_be_written_names_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "sheet.png"
    with pytest.raises(UserError, match=r"sheet\.png") as caught:
        contact_sheet(Toys(2), path)
    assert caught.value.code == ExitCode.CANNOT_CREATE
