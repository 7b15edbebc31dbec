"""The contact sheet: every image with its captions, and a reason where there is no image."""

from pathlib import Path

import pytest
from PIL import Image
from toy_pairs import Rows, row

from maskvlm.data.preview import contact_sheet
from maskvlm.utils.errors import UserError


def test_a_sheet_is_an_image_file_of_rows_from_all_over(tmp_path: Path) -> None:
    pairs = Rows([row(number, image=Image.new("RGB", (30, 20), (number, 0, 0))) for number in range(100)])
    path = contact_sheet(pairs, tmp_path / "new" / "sheet.png", count=5)
    sheet = Image.open(path)
    assert sheet.format == "PNG"
    colours = {colour[:3] for _, colour in sheet.convert("RGB").getcolors(sheet.width * sheet.height) or []}
    assert [number for number in range(100) if (number, 0, 0) in colours and number] == [20, 40, 60, 80]
    for length, count in ((0, 24), (5, 0)):
        with pytest.raises(UserError, match="no images to show"):
            contact_sheet(Rows(pairs.rows[:length]), tmp_path / "none.png", count)
    assert not (tmp_path / "none.png").exists()
