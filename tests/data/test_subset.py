"""Parts of a split: exact counts, the small inside the large, all rows of an image or none."""

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_pairs import SPEC, Rows, Squares, row

from maskvlm.data.batch import Source
from maskvlm.data.caption_text import stable_id
from maskvlm.data.module import PairData
from maskvlm.data.scenes.source import Scenes
from maskvlm.data.subset import FRACTION, WEIGHT, first_images, fraction_of, hashed_image_ids, lots, row_hashes, row_ids
from maskvlm.utils.errors import UserError


class Known(Rows):
    """Pairs that tell their images' ids."""

    def image_ids(self) -> Iterator[str]:
        return (each["image_id"] for each in self.rows)


class Imaged:
    """Examples about two images each, of which the first has several."""

    fingerprint, skipped = "imaged", {"empty text": ["toy:9"]}

    def __init__(self, images: list[list[str]]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"images": [], "image_ids": self.images[index], "origin": f"toy:{index}"}

    def column(self, name: str) -> pa.ChunkedArray:
        return pa.table({"images": self.images}).column(name)


def known(count: int) -> Known:
    return Known([row(number) for number in range(count)])


def ids_of(pairs: Any) -> set[str]:
    return {pairs[index]["image_id"] for index in range(len(pairs))}


@given(st.integers(1, 400), st.lists(st.floats(0.01, 1.0), min_size=2, max_size=4), st.integers(0, 2**40))
def test_smaller_parts_are_inside_larger_ones_and_have_their_exact_size(
    count: int, shares: list[float], seed: int
) -> None:
    ids = np.array([stable_id(f"photo {number}") for number in range(count)], np.uint64)
    chosen = [set(first_images(ids, share, seed, FRACTION).tolist()) for share in sorted(shares)]
    assert [len(rows) for rows in chosen] == [round(share * count) for share in sorted(shares)]
    assert all(small <= large for small, large in pairwise(chosen))


def test_ten_percent_are_inside_a_quarter_are_inside_a_half() -> None:
    pairs = known(200)
    small, quarter, half = (fraction_of(pairs, share, 0) for share in (0.1, 0.25, 0.5))
    assert (len(small), len(quarter), len(half)) == (20, 50, 100)
    assert ids_of(small) < ids_of(quarter) < ids_of(half)
    assert fraction_of(pairs, 1.0, 0) is pairs


def test_what_is_chosen_depends_on_the_seed_and_the_ids_alone() -> None:
    first = ids_of(fraction_of(known(200), 0.3, 0))
    backwards = Known(known(200).rows[::-1])
    assert ids_of(fraction_of(backwards, 0.3, 0)) == first
    assert ids_of(fraction_of(known(200), 0.3, 1)) != first


def test_different_images_never_share_a_lot_and_purposes_have_their_own() -> None:
    """Fails with one order for both: a mix's half would be the very images that half of the data keeps."""
    ids = np.arange(100_000, dtype=np.uint64)
    assert len(np.unique(lots(ids, 3, FRACTION))) == len(ids)
    halves = [set(first_images(ids, 0.5, 3, purpose).tolist()) for purpose in (FRACTION, WEIGHT)]
    assert 0.49 < len(halves[0] & halves[1]) / 50_000 < 0.51


def test_all_rows_of_an_image_stay_together() -> None:
    examples = Imaged([[f"photo {number // 3}", f"other {number}"] for number in range(90)])
    part = fraction_of(examples, 0.2, 0)
    firsts = [part[index]["image_ids"][0] for index in range(len(part))]
    assert len(part) == 18
    assert len(set(firsts)) == 6
    assert part.skipped == {"empty text": ["toy:9"]}
    assert (row_ids(examples).shape, row_ids(part).shape) == ((90, 2), (18, 2))  # type: ignore[union-attr]


def test_the_fingerprint_changes_with_the_part() -> None:
    prints = [
        fraction_of(known(50), share, seed).fingerprint for share, seed in ((0.5, 0), (0.52, 0), (0.5, 1), (1, 0))
    ]
    assert len(set(prints)) == 4
    assert prints[0] == fraction_of(known(50), 0.5, 0).fingerprint


def test_ids_and_hashes_of_a_part_are_those_of_its_rows() -> None:
    part = fraction_of(known(40), 0.5, 0)
    expected = [stable_id(part[index]["image_id"]) for index in range(20)]
    assert row_ids(part)[:, 0].tolist() == expected  # type: ignore[index]
    assert hashed_image_ids(part).tolist() == sorted(expected)  # type: ignore[union-attr]
    assert row_hashes(part) is None


def test_a_part_tells_when_photos_are_others() -> None:
    """Fails where it is silent: features that were kept of photos would be read for those in their place."""
    photos = SimpleNamespace(size=1)

    class Photos(Imaged):
        @property
        def image_identity(self) -> str:
            return f"a.jpg {photos.size}"

    part = fraction_of(fraction_of(Photos([[f"photo {number}"] for number in range(8)]), 0.5, 0), 0.5, 1)
    before = part.image_identity
    photos.size = 2
    assert part.image_identity != before
    # The features' cache asks each split by `getattr`.
    assert getattr(fraction_of(known(8), 0.5, 0), "image_identity", "") == ""


def test_a_set_that_names_each_image_once_for_all_its_rows_has_no_ids_by_row() -> None:
    class Once(Known):
        def image_ids(self) -> Iterator[str]:
            return iter(sorted({each["image_id"] for each in self.rows}))

    pairs = Once([row(0), row(0), row(1)])
    assert row_ids(pairs) is None
    assert len(hashed_image_ids(pairs)) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pairs", "fraction", "message"),
    [
        (known(4), 0.0, "data.fraction: 0.0 is out of range"),
        (known(4), 1.5, "1.5 is out of range"),
        (known(4), float("nan"), "nan is out of range"),
        (known(4), 0.1, "0.1 of 4 images leaves none"),
        (Rows([row(0)]), 0.5, "cannot list its image ids"),
    ],
)
def test_a_part_that_cannot_be_taken_is_one_line(pairs: Any, fraction: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fraction_of(pairs, fraction, 0)


# ---------------------------------------------------------------------- in the data module


class KnownSquares(Squares):
    def split(self, name: str) -> Any:
        return Known(super().split(name).rows)  # type: ignore[attr-defined]


def ready(source: Source, **settings: Any) -> PairData:
    data = PairData(source, SPEC, **{"batch_size": 4, "epochs": 1, "workers": 0, **settings})
    data.setup("fit")
    return data


def test_training_sees_the_part_alone_and_evaluation_all() -> None:
    data = ready(KnownSquares(), fraction=0.5)
    image_ids = [index for batch in data.train_dataloader() for index in batch.image_id_B.tolist()]
    assert len(image_ids) == data.total_steps * 4 == 8
    assert sorted(image_ids) == data.hashed_image_ids("train").tolist()  # type: ignore[union-attr]
    assert sum(len(batch.valid_B) for batch in data.val_dataloader()) == 7
    assert data.fingerprint()["train"]["pictures"] == 8
    assert data.fingerprint()["sha"] != ready(KnownSquares()).fingerprint()["sha"]


def test_the_built_in_world_can_be_cut_too() -> None:
    data = ready(Scenes(40, 4, 4, 24), fraction=0.25)
    different = len(set(Scenes(40, 4, 4, 24).split("train").image_ids()))
    assert len(data.hashed_image_ids("train")) == round(0.25 * different)  # type: ignore[arg-type]
