"""Mixes of prepared sets: how often each image comes, who it is from, what two sets share."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prepared_sets import jpeg, make, raw, toy_image

from maskvlm.data.caption_text import stable_id
from maskvlm.data.mix import Mix
from maskvlm.data.raw.base import BadRow
from maskvlm.data.subset import row_hashes, row_ids
from maskvlm.utils.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """coco: 20 images to train on, 3 each to evaluate; vg: ten of its own, and five of coco's with other bytes."""
    folder = tmp_path_factory.mktemp("sets")
    splits = ["train"] * 20 + ["val"] * 3 + ["test"] * 3
    make(folder, "coco", [raw(number, split, f"coco {number}") for number, split in enumerate(splits)])
    own = [raw(number, image_id=f"vg {number}") for number in range(100, 110)]
    shared = [raw(number, image_id=f"coco {number}", image=jpeg(toy_image(number), 60)) for number in range(5)]
    make(folder, "vg", [*own, BadRow("no image", "row 7", "is not there", "train"), *shared])
    return folder


def mixed(root: Path, seed: int = 0, **sets: float) -> Any:
    return Mix(sets, "coco", str(root), seed).split("train")


def counts(pairs: Any) -> Counter[str]:
    return Counter(pairs[index]["image_id"] for index in range(len(pairs)))


def test_a_weight_says_how_often_each_image_comes(root: Path) -> None:
    pairs = mixed(root, coco=2.0, vg=1.0)
    image_counts = counts(pairs)
    assert len(pairs) == 55
    assert {image_counts[f"coco {number}"] for number in range(5, 20)} == {2}
    assert {image_counts[f"coco {number}"] for number in range(5)} == {3}  # of both
    assert {image_counts[f"vg {number}"] for number in range(100, 110)} == {1}


def test_parts_of_weights_are_nested_and_seeded(root: Path) -> None:
    part = {weight: counts(mixed(root, coco=weight)) for weight in (0.1, 0.25, 0.5, 1.5)}
    assert [part[weight].total() for weight in (0.1, 0.25, 0.5, 1.5)] == [2, 5, 10, 30]
    assert part[0.1].keys() < part[0.25].keys() < part[0.5].keys()
    assert {name for name, often in part[1.5].items() if often == 2} == part[0.5].keys()
    assert counts(mixed(root, seed=1, coco=0.5)) != part[0.5]


def test_what_two_sets_share_is_told_and_kept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = mixed(root, coco=1.0, vg=1.0)
    output = capsys.readouterr().out
    assert "5 images are in coco and in vg" in output
    assert pairs.shared() == {("coco", "vg"): 5}
    assert (pairs.unprepared, pairs.skipped) == ({"no image": ["vg: row 7"]}, {})
    others = [mixed(root, coco=1.0), mixed(root, coco=1.0, vg=2.0), mixed(root, seed=1, coco=1.0, vg=1.0)]
    assert len({pairs.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert mixed(root, coco=1.0, vg=1.0).fingerprint == pairs.fingerprint


def test_rows_columns_and_ids_say_which_set_they_are_from(root: Path) -> None:
    pairs = mixed(root, vg=1.0, coco=0.5)
    assert [pairs.source(index) for index in (0, 14, 15, 24)] == ["vg", "vg", "coco", "coco"]
    assert [pairs[index]["origin"].partition(":")[0] for index in (0, 20)] == ["vg", "coco"]
    assert pairs.captions(3) == pairs[3]["captions"] == ["number 103"]
    names = [pairs[index]["image_id"] for index in range(25)]
    assert pairs.column("image_id").to_pylist() == names
    assert pairs.column("source").to_pylist() == [pairs.source(index) for index in range(25)]
    assert row_ids(pairs)[:, 0].tolist() == [stable_id(name) for name in names]  # type: ignore[index]
    assert row_hashes(pairs).shape == (25,)  # type: ignore[union-attr]
    assert sorted(pairs.image_ids()) == sorted(set(names))
    for index in (-1, 25):
        with pytest.raises(IndexError):
            pairs[index]
    assert [len(Mix({"vg": 1.0}, "coco", str(root)).split(name)) for name in ("val", "test")] == [3, 3]


@pytest.mark.parametrize(
    ("sets", "name"),
    [
        ({"coco": 0.0}, r"sets\.coco"),
        ({"coco": 1.0, "vg": 0.01}, r"sets\.vg"),
        ({"coco": 1.0, "sbu": 1.0, "cc3m": 1.0}, "sbu, cc3m"),
    ],
)
def test_a_mix_of_nothing_is_refused(root: Path, sets: dict[str, float], name: str) -> None:
    with pytest.raises(UserError, match=name):
        mixed(root, **sets)
