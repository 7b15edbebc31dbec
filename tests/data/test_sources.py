"""The Karpathy reader: true files, small made-up ones, and every way one can be wrong."""

import json
import logging
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from PIL import Image

from maskvlm.data.images import safe_open
from maskvlm.data.sources import Karpathy, _parse
from maskvlm.errors import ExitCode, UserError

LONG = "dog " * 10_000


def sentence(raw: str) -> dict[str, Any]:
    return {"raw": raw, "tokens": raw.split(), "sentid": 0}


def image(name: str, split: str = "train", *captions: str, **more: Any) -> dict[str, Any]:
    return {"filename": name, "split": split, "sentences": [sentence(text) for text in captions], **more}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Write a json and its pictures; returns the json's path."""

    def write(images: list[dict[str, Any]], folder: str = "images", absent: tuple[str, ...] = ()) -> str:
        for row in images:
            path = tmp_path / folder / row.get("filepath", "") / row["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if row["filename"] not in absent:
                Image.new("RGB", (16, 16)).save(path)
        file = tmp_path / "toy.json"
        file.write_text(json.dumps({"images": images, "dataset": "toy"}))
        return str(file)

    return write


@pytest.fixture
def refusal(tmp_path: Path) -> Any:
    """Write a json's text as it is, read a split, return the error."""

    def read(text: str | bytes, split: str = "train") -> UserError:
        file = tmp_path / "toy.json"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(UserError) as caught:
            Karpathy(str(file)).split(split)
        assert "\n" not in str(caught.value)
        return caught.value

    return read


# ------------------------------------------------------------------ what comes out


def test_rows_are_the_files_in_its_order(make: Any, tmp_path: Path) -> None:
    file = make(
        [
            image("a.png", "train", "a dog", "a cat", imgid=0),
            image("b.png", "val", "a bird", imgid=1),
            image("c.png", "train", "a cow", imgid=2),
        ]
    )
    pairs = Karpathy(file).split("train")
    assert len(pairs) == 2
    assert [pairs[0], pairs[1]] == [
        {
            "image": str(tmp_path / "images" / "a.png"),
            "captions": ["a dog", "a cat"],
            "image_id": "toy 0",
            "origin": "toy.json image 0 (a.png)",
        },
        {
            "image": str(tmp_path / "images" / "c.png"),
            "captions": ["a cow"],
            "image_id": "toy 2",
            "origin": "toy.json image 2 (c.png)",
        },
    ]
    assert pairs.captions(0) == ["a dog", "a cat"]
    assert pairs.skipped == {}
    assert [row["captions"] for row in (pairs[i] for i in range(len(pairs)))] == [
        ["a dog", "a cat"],
        ["a cow"],
    ]
    with pytest.raises(IndexError):
        pairs[2]


def test_coco_folders_ids_and_restval(make: Any, tmp_path: Path) -> None:
    file = make(
        [
            image("COCO_1.png", "restval", "a dog", filepath="val2014", cocoid=391895, imgid=0),
            image("COCO_2.png", "train", "a cat", filepath="train2014", cocoid=12, imgid=1),
        ]
    )
    pairs = Karpathy(file).split("train")
    assert [pairs[i]["image_id"] for i in range(2)] == ["toy 391895", "toy 12"]
    assert pairs[0]["image"] == str(tmp_path / "images" / "val2014" / "COCO_1.png")
    assert pairs[0]["origin"] == "toy.json image 0 (val2014/COCO_1.png)"
    assert safe_open(pairs[0]["image"], "x").size == (16, 16)


def test_without_any_id_the_file_name_serves(make: Any) -> None:
    assert (
        Karpathy(make([image("a.png", "train", "a dog", imgid=None)])).split("train")[0]["image_id"]
        == "toy a.png"
    )


@pytest.mark.parametrize("folder", ["images", ".", "elsewhere"])
def test_pictures_are_found_beside_the_json_or_where_they_are_said_to_be(
    make: Any, folder: str, tmp_path: Path
) -> None:
    file = make([image("a.png", "train", "a dog", filepath="f")], folder)
    images = str(tmp_path / folder) if folder == "elsewhere" else None
    pairs = Karpathy(file, images).split("train")
    assert Path(pairs[0]["image"]).is_file()


def test_the_table_is_kept_and_read_again_without_parsing(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make([image("a.png", "train", "a dog"), image("b.png", "train", "a cat", " ")])
    first = Karpathy(file, cache=str(tmp_path / "mine")).split("train")
    assert len(list((tmp_path / "mine").iterdir())) == 1
    monkeypatch.setattr("maskvlm.data.sources._parse", None)
    second = Karpathy(file, cache=str(tmp_path / "mine")).split("train")
    assert [second[i] for i in range(2)] == [first[i] for i in range(2)]
    assert second.skipped == first.skipped != {}
    assert second.fingerprint == first.fingerprint


def test_the_fingerprint_follows_the_content(make: Any, tmp_path: Path) -> None:
    images = [image(f"{i}.png", "train", "a dog", imgid=i) for i in range(3)]
    images += [image("v.png", "val", "a cat", imgid=9)]
    seen = [Karpathy(make(images)).split(name).fingerprint for name in ("train", "val")]
    (tmp_path / "images" / "1.png").unlink()
    seen.append(Karpathy(make(images, absent=("1.png",)), max_missing=0.5).split("train").fingerprint)
    images[0]["sentences"][0]["raw"] = "a cow"
    seen.append(Karpathy(make(images)).split("train").fingerprint)
    assert len(set(seen)) == 4
    shutil.rmtree(tmp_path / "cache")
    assert Karpathy(make(images)).split("train").fingerprint == seen[-1]


def test_a_byte_order_mark_is_no_obstacle(make: Any) -> None:
    file = Path(make([image("a.png", "train", "a dog")]))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(Karpathy(str(file)).split("train")) == 1


def test_pairs_survive_the_way_to_a_data_worker(make: Any) -> None:
    pairs = Karpathy(make([image("a.png", "train", "a dog")])).split("train")
    assert pickle.loads(pickle.dumps(pairs))[0] == pairs[0]


def test_nothing_is_printed_or_logged(
    make: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    with caplog.at_level(logging.INFO):
        Karpathy(make([image("a.png", "train", "a dog")])).split("train")
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert not datasets.are_progress_bars_disabled()  # others' bars are theirs


def test_several_readers_can_make_the_same_table_at_once(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make([image(f"{i}.png", "train", "a dog", imgid=i) for i in range(20)])
    together = Barrier(3)

    def parse(content: bytes, path: Path) -> Any:
        together.wait(timeout=20)  # none has found the others' table
        return _parse(content, path)

    monkeypatch.setattr("maskvlm.data.sources._parse", parse)
    with ThreadPoolExecutor(3) as pool:
        pairs = list(
            pool.map(lambda _: Karpathy(file, cache=str(tmp_path / "shared")).split("train"), range(3))
        )
    assert [len(each) for each in pairs] == [20, 20, 20]
    assert pairs[0][7] == pairs[1][7] == pairs[2][7]
    assert len(list((tmp_path / "shared").iterdir())) == 1


# ------------------------------------------------------------------ what is left out, counted and listed


def test_empty_captions_and_pictures_without_any_are_left_out_and_listed(make: Any) -> None:
    file = make(
        [
            image("a.png", "train", "a dog", " \t", "", imgid=0),
            image("b.png", "train", " ", imgid=1),
            image("c.png", "train", imgid=2),
            image("d.png", "val", "a cat", "\u200b", imgid=3),
        ]
    )
    train, val = Karpathy(file).split("train"), Karpathy(file).split("val")
    assert [train[i]["captions"] for i in range(len(train))] == [["a dog"]]
    assert train.skipped == {
        "empty caption": [
            "toy.json image 0 (a.png) sentence 1",
            "toy.json image 0 (a.png) sentence 2",
            "toy.json image 1 (b.png) sentence 0",
        ],
        "no caption": ["toy.json image 1 (b.png)", "toy.json image 2 (c.png)"],
    }
    assert val.skipped == {"empty caption": ["toy.json image 3 (d.png) sentence 1"]}


def test_mended_captions_are_counted(make: Any) -> None:
    pairs = Karpathy(make([image("a.png", "train", LONG, "dog \ud800", "a\x00 cow")])).split("train")
    assert [len(caption) < 5000 for caption in pairs[0]["captions"]] == [True] * 3
    assert pairs[0]["captions"][1:] == ["dog \ufffd", "a cow"]
    counts = {reason: len(places) for reason, places in pairs.skipped.items()}
    assert counts == {"caption cut": 1, "caption surrogate": 1, "caption control": 1}


def test_a_few_missing_pictures_are_skipped_and_listed(make: Any) -> None:
    images = [image(f"{i}.png", "train", f"dog {i}", imgid=i) for i in range(10)]
    pairs = Karpathy(make(images, absent=("3.png",)), max_missing=0.1).split("train")
    assert [pairs[i]["image_id"] for i in range(9)] == [f"toy {i}" for i in range(10) if i != 3]
    assert pairs.skipped == {"missing picture": ["toy.json image 3 (3.png)"]}


def test_many_missing_pictures_are_an_error_that_names_the_first(make: Any, tmp_path: Path) -> None:
    images = [image(f"{i}.png", "train", f"dog {i}", imgid=i) for i in range(10)]
    file = make(images, absent=tuple(f"{i}.png" for i in range(2, 7)))
    with pytest.raises(UserError) as caught:
        Karpathy(file).split("train")
    assert caught.value.code == ExitCode.MISSING_INPUT
    assert str(caught.value) == (
        f"{file}: 5 of 10 pictures of split 'train' are not in {tmp_path}/images: 2.png, 3.png, 4.png, .... "
        "Set `images` to their folder, fetch them, or raise `max_missing`."
    )


def test_no_picture_at_all_is_an_error_whatever_is_allowed(make: Any) -> None:
    file = make([image("a.png", "train", "a dog")], absent=("a.png",))
    with pytest.raises(UserError, match="1 of 1 pictures"):
        Karpathy(file, max_missing=1.0).split("train")


# ------------------------------------------------------------------ what is refused


def test_a_missing_json_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.json", tmp_path, tmp_path / "no.json" / "x"):
        with pytest.raises(UserError, match="no such file") as caught:
            Karpathy(str(path)).split("train")
        assert caught.value.code == ExitCode.MISSING_INPUT
        assert caught.value.where == str(path)


def test_a_missing_folder_of_pictures_is_named(make: Any) -> None:
    with pytest.raises(UserError, match=r"/nowhere: there is no such folder of pictures") as caught:
        Karpathy(make([image("a.png", "train", "a dog")]), images="/nowhere").split("train")
    assert caught.value.code == ExitCode.MISSING_INPUT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "toy.json:1: not JSON (column 1: Expecting value)"),
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


def test_a_missing_split_names_those_there(make: Any) -> None:
    file = make(
        [image("a.png", "train", "a", imgid=0), image("b.png", "restval", "b"), image("c.png", "val", "c")]
    )
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


def test_a_cache_that_cannot_be_written_is_named(make: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the cache cannot be written") as caught:
        Karpathy(make([image("a.png", "train", "a dog")]), cache=str(tmp_path / "file" / "cache")).split(
            "train"
        )
    assert caught.value.code == ExitCode.CANNOT_CREATE


def test_a_damaged_cache_says_what_to_delete(make: Any, tmp_path: Path) -> None:
    file = make([image("a.png", "train", "a dog")])
    Karpathy(file).split("train")
    (folder,) = (tmp_path / "cache" / "maskvlm").iterdir()
    for table in folder.rglob("*.arrow"):
        table.write_bytes(table.read_bytes()[:10])
    with pytest.raises(
        UserError, match=f"{folder.name}: the cached table cannot be read .* Delete this folder"
    ):
        Karpathy(file).split("train")
    shutil.rmtree(folder)
    assert len(Karpathy(file).split("train")) == 1


# ------------------------------------------------------------------ the real thing


def test_flickr8k_as_it_is(shared_data: Path) -> None:
    file = shared_data / "flickr8k" / "dataset_flickr8k.json"
    source = Karpathy(str(file))
    train, val = source.split("train"), source.split("val")
    assert (len(train), len(val)) == (6000, 1000)
    assert sum(len(val.captions(i)) for i in range(1000)) == 5000
    assert train.skipped == val.skipped == {}
    assert train.fingerprint != val.fingerprint
    row = train[0]
    assert row["origin"] == f"dataset_flickr8k.json image 0 ({Path(str(row['image'])).name})"
    assert row["captions"][0] == "A black dog is running after a white dog in the snow ."
    assert safe_open(row["image"], row["origin"]).size == (160, 160)
    ids = {val[i]["image_id"] for i in range(1000)} | {train[i]["image_id"] for i in range(6000)}
    assert len(ids) == 7000
