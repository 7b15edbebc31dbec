"""Held-out images in training data: found by id and by look, refused or dropped, never passed over."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prepared_sets import jpeg, make, raw, toy_image
from toy_pairs import SPEC
from toy_raw import encoded, photo

from maskvlm.checkpoint.warm_start import LineageEntry
from maskvlm.data.contamination import held_out, leaks_left_out, without_leaks
from maskvlm.data.images import safe_open
from maskvlm.data.mix import Mix
from maskvlm.data.module import PairData
from maskvlm.data.phash import distance, near, phash
from maskvlm.data.prepared.source import Prepared
from maskvlm.data.scenes.source import Scenes
from maskvlm.utils.errors import UserError

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


@settings(max_examples=30)
@given(hashes, hashes, st.lists(st.sets(st.integers(0, 63), max_size=12), min_size=1, max_size=30), st.integers(0, 11))
def test_near_hashes_are_those_that_differ_in_few_bits(
    one: list[int], other: list[int], flips: list[set[int]], bits: int
) -> None:
    """Fails where a band or a pattern of flipped bits is left out of the search."""
    changed = [one[n % len(one)] ^ sum(1 << bit for bit in flip) for n, flip in enumerate(flips)]
    hash_N = np.array([*other, *changed], np.uint64)
    hash_M = np.array([*one, 0], np.uint64)
    assert near(hash_N, hash_M, bits).tolist() == brute(hash_N, hash_M, bits)


def test_the_hash_is_the_same_everywhere_and_near_for_copies_alone() -> None:
    """Fails with cosines of another SIDE, with the mean for the median, without the resize."""
    assert [phash(photo(seed)) for seed in (0, 1)] == [15885642605859576127, 3216646951451477809]
    image = photo(0, 480, 320)
    copies = [
        safe_open(encoded(image, quality=60), "x"),
        safe_open(encoded(image.resize((240, 160)), quality=60), "x"),
        image.resize((300, 300), Image.Resampling.LANCZOS),
        image.convert("L"),
    ]
    assert max(distance(phash(image), phash(copy)) for copy in copies) <= 4
    hashes = [phash(photo(seed)) for seed in range(40)]
    hashes.append(phash(photo(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    assert min(distance(one, other) for place, one in enumerate(hashes) for other in hashes[:place]) >= 12
    assert phash(Image.new("RGB", (30, 33), (7, 200, 90))) == 0  # of one colour


# ---------------------------------------------------------------------- refuse or drop


def test_leaks_are_refused_or_dropped_with_counts_and_listed(root: Path, tmp_path: Path) -> None:
    pairs = Prepared(str(root / "vg")).split("train")
    counts = "coco/test, same id: 1; coco/test, same look: 2; first coco 30, vg 31, vg 32"
    with pytest.raises(UserError, match=f"3 of 13 training rows.*{counts}"):
        without_leaks(pairs, places(root, "coco/val", "coco/test"), "refuse")
    clean_pairs = without_leaks(pairs, places(root, "coco/test"), "drop")
    ids = [clean_pairs[index]["image_id"] for index in range(len(clean_pairs))]
    assert ids == [f"vg {number}" for number in range(100, 110)]
    assert [len(clean_pairs.skipped[f"in coco/test, same {kind}"]) for kind in ("id", "look")] == [1, 2]
    assert "row 31" in clean_pairs.skipped["in coco/test, same look"][0]
    assert clean_pairs.fingerprint != pairs.fingerprint
    place = str(root / "coco" / "test")  # named twice
    assert len(without_leaks(pairs, [place, f"{place}/"], "drop")) == 10
    assert leaks_left_out(clean_pairs, [place, place]) == {"coco/test": 3}
    make(tmp_path, "coco", [raw(number, "test", f"vg {number}") for number in (100, 101)])
    both = [place, str(tmp_path / "coco" / "test")]  # places whose names end alike both count
    clean_pairs = without_leaks(pairs, both, "drop")
    assert (len(clean_pairs), leaks_left_out(clean_pairs, both)) == (8, {both[0]: 3, both[1]: 2})


def test_what_cannot_be_held_out_is_refused(root: Path) -> None:
    """Where nothing is held out the split stays as it is; the one without hashes is compared by id alone."""
    pairs, drawn = Prepared(str(root / "coco")).split("train"), Scenes(5, 2, 2, 24).split("train")
    assert without_leaks(pairs, [], "refuse") is pairs
    assert without_leaks(pairs, places(root, "coco/val", "coco/test"), "refuse") is pairs
    assert without_leaks(drawn, places(root, "coco/test"), "refuse") is drawn
    test = Prepared(str(root / "coco")).split("test")
    for place, name in (("coco", "coco"), (str(root / "nowhere/test"), "nowhere"), (str(root / "coco/dev"), "dev")):
        with pytest.raises(UserError, match=name):
            held_out(place, "x")
    with pytest.raises(UserError, match="ignore"):
        without_leaks(None, [], "ignore")
    with pytest.raises(UserError, match="nothing is left"):
        without_leaks(test, places(root, "coco/test"), "drop")


def test_a_mix_trains_without_its_leaks(root: Path) -> None:
    mix = Mix({"coco": 1.0, "vg": 1.0}, "coco", str(root))

    def ready(**settings: Any) -> PairData:
        data = PairData(mix, SPEC, 4, steps=2, held_out=places(root, "coco/val", "coco/test"), **settings)
        data.setup("fit")
        return data

    with pytest.raises(UserError, match=r"data\.contamination"):
        ready()
    data = ready(contamination="drop")
    assert len(data.splits["train"]) == len(data.hashed_image_ids("train")) == 20  # type: ignore[arg-type]
    assert len(data.bad_rows()["left_out"]["train"]["in coco/test, same look"]) == 2
    assert sum(len(batch.valid_B) for batch in data.train_dataloader()) == 8
    counts = data.left_out()  # evaluation cards state it in their lineage
    assert counts == {"coco/val": 0, "coco/test": 3}
    assert LineageEntry("t", "s", "sha", 20, 1, None, counts).words()["held_out"] == counts
    assert len(ready(contamination="drop", fraction=0.5).splits["train"]) == 10  # of what is left
