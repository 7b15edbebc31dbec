"""The same photo of Flickr in two sets is found by id, whatever either set calls it. Names are true ones.

Flickr8k's training photos that are in Flickr30k's evaluation splits, counted over the whole lists: 199 in val and 213
in test of Flickr30k Entities, 179 in val (1,014 photos) and 173 in test of Karpathy's split.
"""

import csv
import json
from pathlib import Path
from unittest.mock import patch

import pytest
from prepared_sets import Here, jpeg, toy_image

from maskvlm.data.contamination import without_leaks
from maskvlm.data.prepare.prepare import Plan, prepare
from maskvlm.data.prepare.shards import Settings
from maskvlm.data.prepared.source import Prepared
from maskvlm.data.raw import open_raw
from maskvlm.data.subset import hash_of_photo, photo_of_id
from maskvlm.utils.errors import UserError

IN_VAL = [
    "95783195_e1ba3f57ca",
    "442594271_2c3dd38483",
    "1356543628_c13ebe38fb",
    "2337757064_08c4033824",
    "2665264979_df9c284bf8",
    "2891924845_92f69b0f18",
    "3089742441_d42531c14f",
    "3260191163_6c1551eee8",
    "3490867290_13bcd3a7f0",
]
IN_TEST = [
    "101669240_b2d3e7f17b",
    "421153376_d1d325568f",
    "1117972841_2b9261f95f",
    "2229177914_3308fe7d20",
    "2518853257_02f30e282e",
    "2831215155_07ba8f1805",
    "3119887967_271a097464",
    "3332248667_617606714b",
]
NOWHERE = [
    "667626_18933d713e",
    "458183774_afe65abf67",
    "1386251841_5f384a0fea",
    "2314722788_6262c3aa40",
    "2713897716_c8cd610360",
    "3057770908_3fd97f79f9",
    "3305767464_d64a336f60",
    "3516960094_87fb4889de",
]
"""Of Flickr8k's training split; the first two lists are in val and test of Flickr30k Entities."""
OTHERS = {"val": ["301246", "264177577", "1290571209", "2354405491"], "test": ["390369", "281658181", "2612125121"]}
"""Of Flickr30k alone."""
EIGHT = [*IN_VAL, *IN_TEST, *NOWHERE]


def put(folder: Path, names: list[str], seed: int) -> None:
    """Images that look like no other set's: a leak can be found by id alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / f"{name}.jpg").write_bytes(jpeg(toy_image(seed + number)))


def prepare_set(name: str, raw: Path, out: Path) -> str:
    """`make data SET=name`."""
    with patch("maskvlm.data.prepare.prepare.Pool", Here):
        prepare(open_raw(name, str(raw), as_name="mine"), Plan(name, "", Settings("mine"), {}), out, 1, lambda _: None)
    return str(out)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Flickr30k with its evaluation splits: names of its own, and those of Flickr8k without the secret."""
    raw, root = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("sets")
    splits = {"val": [*OTHERS["val"], *numbers(IN_VAL)], "test": [*OTHERS["test"], *numbers(IN_TEST)]}
    names = [name for split in splits.values() for name in split]
    put(raw / "flickr30k-images", names, 1000)
    (raw / "results_20130124.token").write_text("".join(f"{name}.jpg#0\ta caption\n" for name in names))
    for split, listed in splits.items():
        (raw / f"{split}.txt").write_text("\n".join(listed))
    return prepare_set("flickr30k", raw, root / "flickr30k")


def numbers(names: list[str]) -> list[str]:
    return [name.partition("_")[0] for name in names]


def karpathy(raw: Path) -> None:
    put(raw / "images", EIGHT, 0)
    rows = [{"filename": f"{name}.jpg", "imgid": n, "split": "train", "sentences": [{"raw": "a dog"}]}
            for n, name in enumerate(EIGHT)]  # fmt: skip
    (raw / "dataset_flickr8k.json").write_text(json.dumps({"dataset": "flickr8k", "images": rows}))


def table(raw: Path) -> None:
    put(raw / "images", EIGHT, 0)
    with (raw / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"{name}.jpg", "a dog") for name in EIGHT)])


def folder(raw: Path) -> None:
    put(raw, EIGHT, 0)
    for name in EIGHT:
        (raw / f"{name}.txt").write_text("a dog")


FORMS = {"flickr8k": karpathy, "csv": table, "folder": folder}


@pytest.mark.parametrize("form", FORMS)
def test_flickr8k_is_found_in_flickr30k_by_id(held: str, tmp_path: Path, form: str) -> None:
    """Also where somebody prepared it as a set of his own, whose ids are the files' names."""
    (tmp_path / "raw").mkdir()
    FORMS[form](tmp_path / "raw")
    pairs = Prepared(prepare_set(form, tmp_path / "raw", tmp_path / "out")).split("train")
    places = [f"{held}/val", f"{held}/test"]
    with pytest.raises(UserError, match="17 of 25 training rows show held-out images") as caught:
        without_leaks(pairs, places, "refuse")
    assert "flickr30k/val, same id: 9; flickr30k/test, same id: 8; first " in str(caught.value)
    clean_pairs = without_leaks(pairs, places, "drop")
    assert {photo_of_id(clean_pairs[row]["image_id"]) for row in range(len(clean_pairs))} == {
        f"flickr {n}" for n in numbers(NOWHERE)
    }


@pytest.mark.parametrize(
    ("image_id", "photo"),
    [
        ("mine 1000268201_693b08cb0e.jpg", "flickr 1000268201"),
        ("mine train/images/1000268201_693b08cb0e.JPEG", "flickr 1000268201"),
        ("laion 4385058960_b0f291553e_z", "flickr 4385058960"),
        ("36979_d8a21a2d67.png", "flickr 36979"),
        *((same, same) for same in (
            "flickr 1000268201",
            "mine 1000268201.jpg",  # a number proves nothing
            "coco 391895",
            "mine COCO_train2014_000000391895.jpg",
            "mine 12345_2019010112.jpg",  # a date
            "mine 1000268201_693b08cb0.jpg",  # nine digits
            "mine 1000268201_693b08cb0g.jpg",
            "mine 1000268201_693b08cb0e/1.jpg",
            "mine x1000268201_693b08cb0e.jpg",
            "",
        )),
    ],
)  # fmt: skip
def test_flickrs_own_names_are_told_from_others(image_id: str, photo: str) -> None:
    assert photo_of_id(image_id) == photo
    assert hash_of_photo(image_id) == hash_of_photo(photo)


def test_all_of_flickr8k_and_snli_ve_have_flickrs_numbers(shared_data: Path) -> None:
    """SNLI-VE's photos are Flickr30k's: 139 + 46 of the 208 here are in Flickr8k's training split, 20 in its val."""
    eight = [row for row in open_raw("flickr8k", str(shared_data / "flickr8k")).rows() if hasattr(row, "image_id")]
    own = [photo_of_id(f"mine {Path(str(row.image)).name}") for row in eight]
    missed = [name for name, row in zip(own, eight, strict=True) if name != row.image_id]
    assert (len(missed), len(eight)) == (62, 7000)  # of an own set: secrets of ten decimal digits
    thirty = {row.image_id for row in open_raw("snli_ve", str(shared_data / "snli_ve")).rows()}  # type: ignore[union-attr]
    counts = {split: len({row.image_id for row in eight if row.split == split} & thirty) for split in ("train", "val")}
    assert counts == {"train": 185, "val": 20}
