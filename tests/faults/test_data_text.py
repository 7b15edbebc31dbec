"""Texts that can be read in two ways: line ends, doubled keys, numbers that are none, depth, quotes left open."""

import json
import time
from contextlib import suppress
from pathlib import Path

import pytest
from guards import Build
from raw_toys import IMAGES, TOYS, write

from maskvlm.data.files import json_lines, load_json
from maskvlm.data.raw import BadRow, RawRow, open_raw
from maskvlm.data.strict_json import BadJson, parse_json
from maskvlm.utils.errors import ExitCode, UserError
from tasks.entailment.data import read_labels
from tasks.vqa.vocabulary import read_annotations, read_vocabulary


def rows(name: str, raw: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    """Captions of the good rows, reasons of the bad ones."""
    raw_rows = [*open_raw(name, str(raw)).rows()]
    good = [row.captions for row in raw_rows if isinstance(row, RawRow)]
    return good, [row.reason for row in raw_rows if isinstance(row, BadRow)]


# ------------------------------------------------------------------ line ends


@pytest.mark.guard(
    "maskvlm.data.safe_open:byte_lines",
    gives="((number, line.strip(), None) for number, line in enumerate(args[0], 1))",
)
@pytest.mark.parametrize("toy", ["flickr8k token", "csv", "jsonl", "cc3m", "cc12m"])
def test_cr_crlf_and_lf_give_the_same_rows(toy: str, tmp_path: Path, build: Build) -> None:
    """A token file with CR was one caption of all the file."""
    name, make_files = TOYS[toy]
    rows_by_end = {}
    for end in (b"\n", b"\r\n", b"\r"):
        texts = {
            file: content.replace(b"\n", end) for file, content in make_files().items() if not file.endswith("jpg")
        }
        folder = write(tmp_path / str(len(rows_by_end)), {**make_files(), **texts})
        rows_by_end[end] = rows(name, folder)
    assert len(rows_by_end[b"\n"][0]) == 3
    assert rows_by_end[b"\r"] == rows_by_end[b"\r\n"] == rows_by_end[b"\n"]


def test_mixed_line_ends_are_told_and_no_row_is_lost_or_moved(tmp_path: Path) -> None:
    """Line numbers stay: lists of addresses name images by them."""
    files = {f"{n}_a.jpg": IMAGES[n] for n in range(3)}
    write(tmp_path, {**files, "Flickr8k.token.txt": b"0_a.jpg#0\tone\r1_a.jpg#0\ttwo\n2_a.jpg#0\tthree\n"})
    raw_rows = [*open_raw("flickr8k", str(tmp_path)).rows()]
    assert [(row.reason, row.origin) for row in raw_rows if isinstance(row, BadRow)] == [
        ("line ends of two kinds", "Flickr8k.token.txt:1")
    ]
    assert [(row.captions, row.origin) for row in raw_rows if isinstance(row, RawRow)] == [
        (("three",), "Flickr8k.token.txt:2 (2_a.jpg)")
    ]


def test_lines_of_tasks_and_lists_of_answers_may_end_with_cr(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\r{"a": 2}\r')
    assert [line.record["a"] for line in json_lines(tmp_path / "a.jsonl")] == [1, 2]
    (tmp_path / "a.txt").write_bytes(b"yes\rno\r")
    assert read_vocabulary(tmp_path / "a.txt") == ("yes", "no")


# ------------------------------------------------------------------ json


DOUBLED = b'{"image": "0.jpg", "caption": "one", "caption": "two"}\n{"image": "1.jpg", "caption": "three"}\n'


@pytest.mark.guard("maskvlm.data.strict_json:each_key_once", gives="dict(args[0])")
def test_a_row_with_a_doubled_key_is_told_and_the_next_is_read(tmp_path: Path, build: Build) -> None:
    write(tmp_path, {"0.jpg": IMAGES[0], "1.jpg": IMAGES[1], "pairs.jsonl": DOUBLED})
    assert rows("jsonl", tmp_path) == ([("three",)], ["not JSON"])
    listed = b"[" + DOUBLED.strip().replace(b"\n", b",") + b"]"
    (tmp_path / "pairs.jsonl").unlink()
    write(tmp_path, {"pairs.json": listed})
    assert rows("jsonl", tmp_path) == ([("three",)], ["not JSON"])


@pytest.mark.guard("maskvlm.data.strict_json:each_key_once", gives="dict(args[0])")
def test_doubled_keys_of_documents_members_and_annotations_are_told(tmp_path: Path, build: Build) -> None:
    twice = b'{"images": [], "images": []}'
    write(tmp_path / "coco", {"dataset_coco.json": twice})
    with pytest.raises(UserError, match="key 'images' appears twice") as raised:
        rows("coco", tmp_path / "coco")
    assert raised.value.code == ExitCode.BAD_DATA
    good = TOYS["flickr8k"][1]()
    one = good["dataset_flickr8k.json"].replace(b'"split": "train"', b'"split": "train", "split": "val"')
    assert rows("flickr8k", write(tmp_path / "f", {**good, "dataset_flickr8k.json": one}))[1] == ["malformed row"]
    files = {"0.jpg": IMAGES[0], "0.txt": b"a", "0.json": b'{"key": "0", "key": "1"}'}
    assert rows("webdataset", write(tmp_path / "w", files)) == ([], ["not JSON"])
    (tmp_path / "a.json").write_text('{"annotations": [{"question_id": 1, "question_id": 2}]}')
    with pytest.raises(UserError, match=r"annotations\[0\]: key 'question_id' appears twice"):
        [*read_annotations(tmp_path / "a.json")]


@pytest.mark.guard("maskvlm.data.strict_json:no_number", gives="float('nan')")
def test_what_is_no_number_of_json_is_none(build: Build) -> None:
    for name in ("NaN", "Infinity", "-Infinity"):
        value = parse_json(f'{{"a": {name}}}')["a"]
        assert isinstance(value, BadJson)
        assert str(value) == f"{name} is not a JSON number"


@pytest.mark.guard("maskvlm.data.strict_json:checked", gives="args[0]")
def test_depth_is_one_line_before_the_stack_ends(build: Build) -> None:
    for depth in (100, 900, 100_000):
        with pytest.raises(UserError, match="nested too deeply"):
            load_json(b"[" * depth + b"]" * depth, Path("x.json"))
    assert load_json(b"[" * 40 + b"]" * 40, Path("x.json")) != []


def test_many_keys_of_which_one_is_doubled_take_no_time() -> None:
    text = json.dumps({f"k{number}": 0 for number in range(200_000)})[:-1] + ', "k0": 1}'
    started = time.monotonic()
    assert str(parse_json(text)) == "key 'k0' appears twice"
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("number", ["9" * 4000, "9" * 5000, "1e999", "-1", "1.5", "true"])
def test_numbers_beyond_all_bounds_are_one_line(tmp_path: Path, number: str) -> None:
    good = TOYS["vqav2"][1]()
    name = next(name for name in good if "questions" in name)
    good[name] = good[name].replace(b'"image_id": 2', f'"image_id": {number}'.encode())
    with suppress(UserError):
        assert len(rows("vqav2", write(tmp_path, good))[1]) <= 1


def test_what_follows_a_list_is_told(tmp_path: Path) -> None:
    good = TOYS["vg"][1]()
    good["region_descriptions.json"] += b' {"id": 7}'
    with pytest.raises(UserError, match="something follows the list"):
        rows("vg", write(tmp_path, good))


# ------------------------------------------------------------------ quotes


def test_a_quote_left_open_swallows_no_row(tmp_path: Path) -> None:
    lines = b'image,caption\n0.jpg,"a dog\n1.jpg,cat\n2.jpg,cow\n'
    write(tmp_path, {**{f"{n}.jpg": IMAGES[n] for n in range(3)}, "pairs.csv": lines})
    assert rows("csv", tmp_path) == ([("cat",), ("cow",)], ["quote left open"])
    (tmp_path / "labels.csv").write_text('pairID,gold_label,explanation\na,neutral,"open\nb,neutral,two\n')
    with pytest.raises(UserError, match=r"labels\.csv:2: not comma-separated text \(quote left open"):
        read_labels([tmp_path / "labels.csv"])


def test_rows_between_two_quotes_of_different_rows_are_not_swallowed(tmp_path: Path) -> None:
    """The quotes fit, and the field would be of two rows."""
    (tmp_path / "labels.csv").write_text('pairID,gold_label,explanation\na,neutral,"open\nb,neutral,two"\n')
    with pytest.raises(UserError, match=r"labels\.csv:2: "):
        read_labels([tmp_path / "labels.csv"])
