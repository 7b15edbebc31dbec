"""Held-out images in training data: found by id and by look, refused or dropped, never passed over."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from prepared_sets import jpeg, make, raw, toy_image
from toy_pairs import SPEC

from maskvlm.checkpoint.warm_start import LineageEntry
from maskvlm.data.contamination import held_out, leaks_left_out, without_leaks
from maskvlm.data.mix import Mix
from maskvlm.data.module import PairData
from maskvlm.data.phash import NEAR, distance, near, phash
from maskvlm.data.prepared.source import Prepared
from maskvlm.data.scenes.source import Scenes
from maskvlm.utils.errors import ExitCode, UserError

TEST = range(30, 36)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vg: ten images of its own; then coco's test images 30 under its own id, 31 and 32 as copies under others."""
    folder = tmp_path_factory.mktemp("sets")
    rows = [raw(number, "train", f"coco {number}") for number in range(10)]
    rows += [raw(number, "val", f"coco {number}") for number in range(20, 23)]
    make(folder, "coco", [*rows, *(raw(number, "test", f"coco {number}") for number in TEST)])
    own = [raw(number, image_id=f"vg {number}") for number in range(100, 110)]
    same = raw(30, image_id="coco 30", image=jpeg(Image.new("RGB", (64, 64), "red")))  # another image, so by id alone
    small = raw(31, image_id="vg 31", image=jpeg(toy_image(31).resize((40, 40)), 40))
    stretched = raw(32, image_id="vg 32", image=jpeg(toy_image(32).resize((90, 64)), 80))
    make(folder, "vg", [*own, same, small, stretched])
    return folder


def places(root: Path, *names: str) -> list[str]:
    return [str(root / name) for name in names]


# ---------------------------------------------------------------------- hashes


def brute(hash_N: np.ndarray, hash_M: np.ndarray, bits: int) -> list[bool]:
    return [any(distance(int(a), int(b)) <= bits and a and b for b in hash_M) for a in hash_N]


hashes = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30)


@given(hashes, hashes, st.lists(st.sets(st.integers(0, 63), max_size=12), min_size=1, max_size=30), st.integers(0, 11))
def test_near_hashes_are_those_that_differ_in_few_bits(
    one: list[int], other: list[int], flips: list[set[int]], bits: int
) -> None:
    """Fails where a band or a pattern of flipped bits is left out of the search."""
    changed = [one[n % len(one)] ^ sum(1 << bit for bit in flip) for n, flip in enumerate(flips)]
    hash_N = np.array([*other, *changed], np.uint64)
    hash_M = np.array([*one, 0], np.uint64)
    assert near(hash_N, hash_M, bits).tolist() == brute(hash_N, hash_M, bits)


def test_every_pattern_of_eight_bits_is_found_and_none_of_nine() -> None:
    rng = np.random.default_rng(0)
    for count, expected in ((8, True), (9, False)):
        flips = [sum(1 << int(bit) for bit in rng.choice(64, count, replace=False)) for _ in range(2000)]
        hash_N = np.array([0xDEADBEEF12345678 ^ flip for flip in flips], np.uint64)
        assert (near(hash_N, np.array([0xDEADBEEF12345678], np.uint64)) == expected).all()


def test_many_images_of_one_hash_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskvlm.data.phash.MOST", 100)
    hash_N = np.array([7] * 1000 + [2**63] * 5, np.uint64)
    hash_M = np.array([7, 6, 2**63 + 2**40], np.uint64)
    assert near(hash_N, hash_M).all()
    assert not near(hash_N, np.array([2**62 - 1], np.uint64)).any()


def test_copies_are_near_and_other_images_are_not() -> None:
    """What the limit was measured for (see the module), on drawn images."""
    own = [phash(toy_image(number)) for number in range(60)]
    copies = [phash(toy_image(number).resize((33, 29)).convert("L")) for number in range(60)]
    assert max(distance(one, copy) for one, copy in zip(own, copies, strict=True)) <= NEAR
    apart = [distance(own[one], own[other]) for one in range(60) for other in range(one)]
    assert min(apart) > NEAR


def test_flickr8k_has_hardly_any_false_copy(shared_data: Path) -> None:
    """500 photos of it: 125,000 pairs of different photos."""
    files = sorted((shared_data / "flickr8k" / "images").iterdir())[:500]
    own = [phash(Image.open(file).convert("RGB")) for file in files]
    assert sum(distance(one, other) <= NEAR for n, one in enumerate(own) for other in own[:n]) == 0


# ---------------------------------------------------------------------- refuse or drop


def test_leaks_are_refused_with_counts_and_ids(root: Path) -> None:
    with pytest.raises(UserError) as raised:
        without_leaks(Prepared(str(root / "vg")).split("train"), places(root, "coco/val", "coco/test"), "refuse")
    message = str(raised.value)
    assert raised.value.code == ExitCode.BAD_DATA
    assert "3 of 13 training rows show held-out images (by id and appearance)" in message
    assert "coco/test, same id: 1; coco/test, same look: 2; first coco 30, vg 31, vg 32" in message
    assert "\n" not in message
    assert "data.contamination to drop" in message


def test_leaks_are_dropped_with_counts_and_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = Prepared(str(root / "vg")).split("train")
    clean_pairs = without_leaks(pairs, places(root, "coco/test"), "drop")
    assert [clean_pairs[index]["image_id"] for index in range(len(clean_pairs))] == [
        f"vg {number}" for number in range(100, 110)
    ]
    assert {reason: len(rows) for reason, rows in clean_pairs.skipped.items()} == {
        "in coco/test, same id": 1,
        "in coco/test, same look": 2,
    }
    assert "row 31" in clean_pairs.skipped["in coco/test, same look"][0]
    assert clean_pairs.fingerprint != pairs.fingerprint
    assert "coco/test, same id: 1; coco/test, same look: 2; left out" in capsys.readouterr().out


def test_a_place_that_is_named_twice_holds_out_what_it_holds(root: Path) -> None:
    place = str(root / "coco" / "test")
    clean_pairs = without_leaks(Prepared(str(root / "vg")).split("train"), [place, f"{place}/"], "drop")
    assert len(clean_pairs) == 10
    assert leaks_left_out(clean_pairs, [place, place]) == {"coco/test": 3}


def test_places_whose_names_end_alike_both_count(root: Path, tmp_path: Path) -> None:
    make(tmp_path, "coco", [raw(number, "test", f"vg {number}") for number in (100, 101)])
    places = [str(folder / "coco" / "test") for folder in (root, tmp_path)]
    clean_pairs = without_leaks(Prepared(str(root / "vg")).split("train"), places, "drop")
    assert len(clean_pairs) == 8
    assert leaks_left_out(clean_pairs, places) == {places[0]: 3, places[1]: 2}


def test_where_nothing_is_held_out_the_split_stays_as_it_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = Prepared(str(root / "coco")).split("train")
    assert without_leaks(pairs, [], "refuse") is pairs
    assert without_leaks(pairs, places(root, "coco/val", "coco/test"), "refuse") is pairs
    assert "no training image is held out (by id and appearance: " in capsys.readouterr().out


def test_a_set_without_hashes_is_compared_by_id_and_that_is_said(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = Scenes(5, 2, 2, 24).split("train")
    assert without_leaks(pairs, places(root, "coco/test"), "refuse") is pairs
    assert "by id alone, as this data set has no hashes" in capsys.readouterr().out


def test_a_set_that_is_all_held_out_is_refused_in_any_case(root: Path) -> None:
    with pytest.raises(UserError, match="nothing is left"):
        without_leaks(Prepared(str(root / "coco")).split("test"), places(root, "coco/test"), "drop")


@pytest.mark.parametrize(
    ("place", "message"),
    [("coco", "'coco' does not name a split"), ("nowhere/test", "nowhere"), ("coco/dev", "no split 'dev'")],
)
def test_a_held_out_split_that_is_not_there_is_one_line(root: Path, place: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        held_out(place if "/" not in place else str(root / place), "x")
    with pytest.raises(UserError, match="'ignore' is not a valid value"):
        without_leaks(None, [], "ignore")


# ---------------------------------------------------------------------- in the data module


def ready(root: Path, **settings: Any) -> PairData:
    mix = Mix({"coco": 1.0, "vg": 1.0}, "coco", str(root))
    data = PairData(
        mix, SPEC, batch_size=4, steps=2, workers=0, held_out=places(root, "coco/val", "coco/test"), **settings
    )
    data.setup("fit")
    return data


def test_a_mix_trains_without_its_leaks(root: Path) -> None:
    data = ready(root, contamination="drop")
    assert len(data.splits["train"]) == 20
    listed = data.bad_rows()["left_out"]["train"]
    assert len(listed["in coco/test, same id"]) == 1
    assert len(listed["in coco/test, same look"]) == 2
    assert len(data.hashed_image_ids("train")) == 20  # type: ignore[arg-type]
    assert sum(len(batch.valid_B) for batch in data.train_dataloader()) == 8


def test_the_history_of_weights_tells_what_was_left_out(root: Path) -> None:
    """Evaluation cards state it in their lineage."""
    counts = ready(root, contamination="drop").left_out()
    assert counts == {"coco/val": 0, "coco/test": 3}
    assert LineageEntry("t", "s", "sha", 20, 1, None, counts).words()["held_out"] == counts
    assert "held_out" not in LineageEntry("t", "s", "sha", 20, 1, None).words()


def test_a_mix_with_leaks_is_refused_unless_told_otherwise(root: Path) -> None:
    with pytest.raises(UserError, match=r"Set data\.contamination to drop"):
        ready(root)


def test_a_part_is_taken_of_what_is_left(root: Path) -> None:
    data = ready(root, contamination="drop", fraction=0.5)
    assert len(data.splits["train"]) == 10
    assert "in coco/test, same id" in data.splits["train"].skipped
