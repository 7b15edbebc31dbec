"""Texts that can be read in two ways: line ends, doubled keys, numbers that are none, depth, quotes left open."""

import json
import time
from pathlib import Path

import pytest
from raw_toys import IMAGES, TOYS, write

from maskvlm.data.files import load_json
from maskvlm.data.raw import BadRow, RawRow, open_raw
from maskvlm.data.strict_json import BadJson, parse_json
from maskvlm.utils.errors import UserError
from tasks.entailment.data import read_labels


def rows(name: str, raw: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    """Captions of the good rows, reasons of the bad ones."""
    raw_rows = [*open_raw(name, str(raw)).rows()]
    good = [row.captions for row in raw_rows if isinstance(row, RawRow)]
    return good, [row.reason for row in raw_rows if isinstance(row, BadRow)]


@pytest.mark.parametrize("toy", ["flickr8k token", "cc3m"])
def test_cr_crlf_and_lf_give_the_same_rows(toy: str, tmp_path: Path) -> None:
    """A token file with CR was one caption of all the file."""
    name, make_files = TOYS[toy]
    rows_by_end = []
    for number, end in enumerate((b"\n", b"\r\n", b"\r")):
        texts = {file: text.replace(b"\n", end) for file, text in make_files().items() if not file.endswith("jpg")}
        rows_by_end.append(rows(name, write(tmp_path / str(number), {**make_files(), **texts})))
    assert len(rows_by_end[0][0]) == 3
    assert rows_by_end[0] == rows_by_end[1] == rows_by_end[2]


def test_what_json_lets_through_is_refused() -> None:
    """Numbers that are none; depth, before the stack ends; many keys of which one is doubled, in no time."""
    for name in ("NaN", "Infinity", "-Infinity"):
        assert isinstance(parse_json(f'{{"a": {name}}}')["a"], BadJson)
    for depth in (100, 100_000):
        with pytest.raises(UserError, match="nested too deeply"):
            load_json(b"[" * depth + b"]" * depth, Path("x.json"))
    assert load_json(b"[" * 40 + b"]" * 40, Path("x.json")) != []
    text = json.dumps({f"k{number}": 0 for number in range(200_000)})[:-1] + ', "k0": 1}'
    started = time.process_time()
    assert str(parse_json(text)) == "key 'k0' appears twice"
    assert time.process_time() - started < 5


def test_a_quote_left_open_swallows_no_row(tmp_path: Path) -> None:
    lines = b'image,caption\n0.jpg,"a dog\n1.jpg,cat\n2.jpg,cow\n'
    write(tmp_path, {**{f"{n}.jpg": IMAGES[n] for n in range(3)}, "pairs.csv": lines})
    assert rows("csv", tmp_path) == ([("cat",), ("cow",)], ["quote left open"])
    for end in ("two", 'two"'):  # the quotes may fit, and the field would be of two rows
        (tmp_path / "labels.csv").write_text(f'pairID,gold_label,explanation\na,neutral,"open\nb,neutral,{end}\n')
        with pytest.raises(UserError, match=r"labels\.csv:2: "):
            read_labels([tmp_path / "labels.csv"])
