"""The same photo of Flickr in two sets is found by id, whatever either set calls it. Names are true ones.

Flickr8k's training photos that are in Flickr30k's evaluation splits, counted over the whole lists: 199 in val and 213
in test of Flickr30k Entities, 179 in val (1,014 photos) and 173 in test of Karpathy's split.
"""

from pathlib import Path

import pytest

from maskvlm.data.raw import open_raw
from maskvlm.data.subset import hash_of_photo, photo_of_id


@pytest.mark.parametrize(
    ("image_id", "photo"),
    [
        ("mine 1000268201_693b08cb0e.jpg", "flickr 1000268201"),
        ("mine train/images/1000268201_693b08cb0e.JPEG", "flickr 1000268201"),
        ("laion 4385058960_b0f291553e_z", "flickr 4385058960"),
        *((same, same) for same in (
            "flickr 1000268201",
            "mine 1000268201.jpg",  # a number proves nothing
            "mine COCO_train2014_000000391895.jpg",
            "mine 12345_2019010112.jpg",  # a date
            "mine 1000268201_693b08cb0.jpg",  # nine digits
            "mine 1000268201_693b08cb0g.jpg",
            "mine 1000268201_693b08cb0e/1.jpg",
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
