"""Parts of a split: exact counts, the small inside the large, all rows of an image or none."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_pairs import Rows, row

from maskvlm.data.caption_text import stable_id
from maskvlm.data.subset import FRACTION, first_images, fraction_of, hashed_image_ids, row_hashes, row_ids
from maskvlm.utils.errors import UserError


class Known(Rows):
    """Pairs that tell their images' ids."""

    def image_ids(self) -> Iterator[str]:
        return (each["image_id"] for each in self.rows)


class Imaged:
    """Examples about two images each, of which the first has several."""

    fingerprint, skipped, image_identity = "imaged", {"empty text": ["toy:9"]}, "a.jpg 1"

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


def test_what_is_chosen_depends_on_the_seed_and_the_ids_alone() -> None:
    pairs = known(200)
    part = fraction_of(pairs, 0.3, 0)
    backwards = Known(known(200).rows[::-1])
    assert ids_of(fraction_of(backwards, 0.3, 0)) == ids_of(part)
    assert ids_of(fraction_of(pairs, 0.3, 1)) != ids_of(part)
    assert ids_of(part) < ids_of(fraction_of(pairs, 0.5, 0))
    expected = [stable_id(part[index]["image_id"]) for index in range(60)]
    assert row_ids(part)[:, 0].tolist() == expected  # type: ignore[index]
    assert hashed_image_ids(part).tolist() == sorted(expected)  # type: ignore[union-attr]
    assert row_hashes(part) is None
    assert fraction_of(pairs, 1.0, 0) is pairs
    prints = {fraction_of(pairs, share, seed).fingerprint for share, seed in ((0.3, 0), (0.31, 0), (0.3, 1), (1, 0))}
    assert len(prints) == 4
    assert part.fingerprint in prints


def test_all_rows_of_an_image_stay_together() -> None:
    examples = Imaged([[f"photo {number // 3}", f"other {number}"] for number in range(90)])
    part = fraction_of(examples, 0.2, 0)
    firsts = [part[index]["image_ids"][0] for index in range(len(part))]
    assert len(part) == 18
    assert len(set(firsts)) == 6
    assert (part.skipped, part.image_identity) == ({"empty text": ["toy:9"]}, examples.image_identity)
    assert (row_ids(examples).shape, row_ids(part).shape) == ((90, 2), (18, 2))  # type: ignore[union-attr]


def test_a_set_that_names_each_image_once_for_all_its_rows_has_no_ids_by_row() -> None:
    class Once(Known):
        def image_ids(self) -> Iterator[str]:
            return iter(sorted({each["image_id"] for each in self.rows}))

    pairs = Once([row(0), row(0), row(1)])
    assert row_ids(pairs) is None
    assert len(hashed_image_ids(pairs)) == 2  # type: ignore[arg-type]
    for bad, share in ((known(4), 0.0), (known(4), 1.5), (known(4), float("nan")), (known(4), 0.1), (pairs, 0.5)):
        with pytest.raises(UserError):
            fraction_of(bad, share, 0)
