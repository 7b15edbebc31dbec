"""The Karpathy reader: true files, small made-up ones, and what it leaves out."""

import logging
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from karpathy_rows import image

from maskvlm.data.images import safe_open
from maskvlm.data.sources import Karpathy, _parse
from maskvlm.utils.errors import ExitCode, UserError

LONG = "dog " * 10_000


def test_rows_are_the_files_in_its_order(karpathy: Any, tmp_path: Path) -> None:
    file = karpathy(
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


def test_coco_folders_ids_and_restval(karpathy: Any, tmp_path: Path) -> None:
    file = karpathy(
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


def test_without_any_id_the_file_name_serves(karpathy: Any) -> None:
    assert (
        Karpathy(karpathy([image("a.png", "train", "a dog", imgid=None)])).split("train")[0]["image_id"] == "toy a.png"
    )


@pytest.mark.parametrize("folder", ["images", ".", "elsewhere"])
def test_pictures_are_found_beside_the_json_or_where_they_are_said_to_be(
    karpathy: Any, folder: str, tmp_path: Path
) -> None:
    file = karpathy([image("a.png", "train", "a dog", filepath="f")], folder)
    images = str(tmp_path / folder) if folder == "elsewhere" else None
    (tmp_path / "images").mkdir(exist_ok=True)
    pairs = Karpathy(file, images).split("train")
    assert Path(pairs[0]["image"]).is_file()


def test_the_table_is_kept_and_read_again_without_parsing(
    karpathy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = karpathy([image("a.png", "train", "a dog"), image("b.png", "train", "a cat", " ")])
    first = Karpathy(file, cache=str(tmp_path / "mine")).split("train")
    assert len(list((tmp_path / "mine").iterdir())) == 1
    monkeypatch.setattr("maskvlm.data.sources._parse", None)
    second = Karpathy(file, cache=str(tmp_path / "mine")).split("train")
    assert [second[i] for i in range(2)] == [first[i] for i in range(2)]
    assert second.skipped == first.skipped != {}
    assert second.fingerprint == first.fingerprint


def test_the_fingerprint_follows_the_content(karpathy: Any, tmp_path: Path) -> None:
    images = [image(f"{i}.png", "train", "a dog", imgid=i) for i in range(3)]
    images += [image("v.png", "val", "a cat", imgid=9)]
    seen = [Karpathy(karpathy(images)).split(name).fingerprint for name in ("train", "val")]
    (tmp_path / "images" / "1.png").unlink()
    seen.append(Karpathy(karpathy(images, absent=("1.png",)), max_missing=0.5).split("train").fingerprint)
    images[0]["sentences"][0]["raw"] = "a cow"
    seen.append(Karpathy(karpathy(images)).split("train").fingerprint)
    assert len(set(seen)) == 4
    shutil.rmtree(tmp_path / "cache")
    assert Karpathy(karpathy(images)).split("train").fingerprint == seen[-1]


def test_a_byte_order_mark_is_no_obstacle(karpathy: Any) -> None:
    file = Path(karpathy([image("a.png", "train", "a dog")]))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(Karpathy(str(file)).split("train")) == 1


def test_pairs_survive_the_way_to_a_data_worker(karpathy: Any) -> None:
    pairs = Karpathy(karpathy([image("a.png", "train", "a dog")])).split("train")
    assert pickle.loads(pickle.dumps(pairs))[0] == pairs[0]


def test_nothing_is_printed_or_logged(
    karpathy: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    with caplog.at_level(logging.INFO):
        Karpathy(karpathy([image("a.png", "train", "a dog")])).split("train")
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert not datasets.are_progress_bars_disabled()  # others' bars are theirs


def test_several_readers_can_make_the_same_table_at_once(
    karpathy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = karpathy([image(f"{i}.png", "train", "a dog", imgid=i) for i in range(20)])
    together = Barrier(3)

    def parse(content: bytes, path: Path) -> Any:
        together.wait(timeout=20)  # none has found the others' table
        return _parse(content, path)

    monkeypatch.setattr("maskvlm.data.sources._parse", parse)
    with ThreadPoolExecutor(3) as pool:
        pairs = list(pool.map(lambda _: Karpathy(file, cache=str(tmp_path / "shared")).split("train"), range(3)))
    assert [len(each) for each in pairs] == [20, 20, 20]
    assert pairs[0][7] == pairs[1][7] == pairs[2][7]
    assert len(list((tmp_path / "shared").iterdir())) == 1


# ------------------------------------------------------------------ what is left out, counted and listed


def test_empty_captions_and_pictures_without_any_are_left_out_and_listed(karpathy: Any) -> None:
    file = karpathy(
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


def test_mended_captions_are_counted(karpathy: Any) -> None:
    pairs = Karpathy(karpathy([image("a.png", "train", LONG, "dog \ud800", "a\x00 cow")])).split("train")
    assert [len(caption) < 5000 for caption in pairs[0]["captions"]] == [True] * 3
    assert pairs[0]["captions"][1:] == ["dog \ufffd", "a cow"]
    counts = {reason: len(places) for reason, places in pairs.skipped.items()}
    assert counts == {"caption cut": 1, "caption surrogate": 1, "caption control": 1}


def test_evaluation_leaves_no_picture_out(karpathy: Any) -> None:
    images = [image(f"{n}.png", "val", "a dog", imgid=n) for n in range(10)]
    with pytest.raises(UserError, match=r"1 of 10 pictures of split 'val'.*evaluation leaves nothing out"):
        Karpathy(karpathy(images, absent=("3.png",)), max_missing=0.5).split("val")


def test_a_few_missing_pictures_are_skipped_and_listed(karpathy: Any) -> None:
    images = [image(f"{i}.png", "train", f"dog {i}", imgid=i) for i in range(10)]
    pairs = Karpathy(karpathy(images, absent=("3.png",)), max_missing=0.1).split("train")
    assert [pairs[i]["image_id"] for i in range(9)] == [f"toy {i}" for i in range(10) if i != 3]
    assert pairs.skipped == {"missing picture": ["toy.json image 3 (3.png)"]}


def test_many_missing_pictures_are_an_error_that_names_the_first(karpathy: Any, tmp_path: Path) -> None:
    images = [image(f"{i}.png", "train", f"dog {i}", imgid=i) for i in range(10)]
    file = karpathy(images, absent=tuple(f"{i}.png" for i in range(2, 7)))
    with pytest.raises(UserError) as caught:
        Karpathy(file).split("train")
    assert caught.value.code == ExitCode.MISSING_INPUT
    assert str(caught.value) == (
        f"{file}: 5 of 10 pictures of split 'train' are not in {tmp_path}/images: 2.png, 3.png, 4.png, .... "
        "Set data.source.images to their folder, or raise data.source.max_missing."
    )


def test_no_picture_at_all_is_an_error_whatever_is_allowed(karpathy: Any) -> None:
    file = karpathy([image("a.png", "train", "a dog")], absent=("a.png",))
    with pytest.raises(UserError, match="1 of 1 pictures"):
        Karpathy(file, max_missing=1.0).split("train")


# ------------------------------------------------------------------ the real thing


def test_flickr8k_as_it_is(shared_data: Path, own_cache: None) -> None:
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
