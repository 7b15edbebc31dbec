"""Every way in which a Karpathy file can be wrong is one line that names file, row and key."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from karpathy_rows import image, sentence

from maskvlm.data.sources import Karpathy
from maskvlm.utils.errors import ExitCode, UserError


@pytest.fixture
def refusal(tmp_path: Path, own_cache: None) -> Any:
    """Write a json's text as it is, read a split, return the error."""

    def read(text: str | bytes, split: str = "train") -> UserError:
        file = tmp_path / "toy.json"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(UserError) as caught:
            Karpathy(str(file)).split(split)
        assert "\n" not in str(caught.value)
        return caught.value

    return read


def test_a_missing_json_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.json", tmp_path, tmp_path / "no.json" / "x"):
        with pytest.raises(UserError, match="no such file") as caught:
            Karpathy(str(path)).split("train")
        assert caught.value.code == ExitCode.MISSING_INPUT
        assert caught.value.where == str(path)


def test_a_missing_folder_of_pictures_is_named(karpathy: Any) -> None:
    with pytest.raises(UserError, match=r"/nowhere: there is no such folder of pictures") as caught:
        Karpathy(karpathy([image("a.png", "train", "a dog")]), images="/nowhere").split("train")
    assert caught.value.code == ExitCode.MISSING_INPUT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "toy.json: empty file. Fetch it again."),
        ('{"images": [\n  {"filename": "a.jpg",}\n]}', "toy.json:2: not JSON (column 2"),
        ('{"images": [', "toy.json:1: not JSON (column 13: "),
        (b'{"images": "\xe9"}', "toy.json: not UTF-8 text (byte 12)"),
        ("[" * 200_000, "toy.json: nested too deeply for JSON data"),
        ("<html>", "toy.json:1: not JSON"),
    ],
)
def test_malformed_json_says_where(refusal: Any, text: str | bytes, message: str) -> None:
    error = refusal(text)
    assert message in str(error)
    assert error.code == ExitCode.BAD_DATA


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "toy.json: list where an object with 'images' belongs"),
        ({}, "toy.json: key 'images' is missing"),
        ({"images": {}}, "toy.json: 'images' is dict instead of list"),
        ({"images": ["a.jpg"]}, "toy.json images[0]: str where an object with 'filename' belongs"),
        ({"images": [{"filename": 3}]}, "images[0]: 'filename' is int instead of str"),
        ({"images": [{"filename": "a", "split": "train"}]}, "images[0]: key 'sentences' is missing"),
        ({"images": [{"filename": "a", "sentences": []}]}, "images[0]: key 'split' is missing"),
        (
            {"images": [image("a"), {**image("b"), "sentences": [sentence("x"), {"tokens": []}]}]},
            "toy.json images[1].sentences[1]: key 'raw' is missing",
        ),
        ({"images": [{**image("a"), "sentences": [{"raw": None}]}]}, "'raw' is NoneType instead of str"),
        ({"images": [image("a", filepath=3)]}, "'filepath' is int instead of str"),
        ({"images": [image("../a")]}, "images[0]: file name '../a' leads out of the folder"),
        ({"images": [image("a", filepath="/etc")]}, "file name '/etc/a' leads out of the folder"),
        ({"images": [image("\ud800.jpg")]}, "leads out of the folder of pictures or is not text"),
        (
            {"images": [image("a", imgid=7), image("b"), image("c", imgid=7)]},
            "images 0 and 2 have the same id 'toy 7'",
        ),
    ],
)
def test_another_structure_says_which_key_of_which_row(refusal: Any, content: Any, message: str) -> None:
    error = refusal(json.dumps(content))
    assert message in str(error)
    assert error.code == ExitCode.BAD_DATA


def test_a_missing_split_names_those_there(karpathy: Any) -> None:
    file = karpathy([image("a.png", "train", "a", imgid=0), image("b.png", "restval", "b"), image("c.png", "val", "c")])
    with pytest.raises(UserError, match=r"split 'test' \(there is train with 2, val with 1\)") as caught:
        Karpathy(file).split("test")
    assert caught.value.code == ExitCode.MISSING_INPUT


@pytest.mark.parametrize("images", [[], [image("a", "train", " ")]])
def test_a_file_without_any_caption_is_refused(refusal: Any, images: list[Any]) -> None:
    error = refusal(json.dumps({"images": images}))
    assert "toy.json: no picture with a caption." in str(error)
    assert error.code == ExitCode.BAD_DATA


def test_a_split_whose_captions_are_all_empty_is_a_missing_split(refusal: Any) -> None:
    error = refusal(json.dumps({"images": [image("a", "train", " "), image("b", "val", "a dog")]}))
    assert "no picture with a caption in split 'train' (there is val with 1)" in str(error)


def test_a_cache_that_cannot_be_written_is_named(karpathy: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the cache cannot be written") as caught:
        Karpathy(karpathy([image("a.png", "train", "a dog")]), cache=str(tmp_path / "file" / "cache")).split("train")
    assert caught.value.code == ExitCode.CANNOT_CREATE


def test_a_damaged_cache_says_what_to_delete(karpathy: Any, tmp_path: Path) -> None:
    file = karpathy([image("a.png", "train", "a dog")])
    Karpathy(file).split("train")
    (folder,) = (tmp_path / "cache" / "maskvlm").iterdir()
    for table in folder.rglob("*.arrow"):
        table.write_bytes(table.read_bytes()[:10])
    with pytest.raises(UserError, match=f"{folder.name}: the cached table cannot be read .* Delete this folder"):
        Karpathy(file).split("train")
    shutil.rmtree(folder)
    assert len(Karpathy(file).split("train")) == 1
