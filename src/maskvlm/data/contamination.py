"""Finds training images that are also in an evaluation split, by id and by look.

A photo from COCO, Flickr or Visual Genome has the same id in every set (`subset.photo_of_id`).

The distance at which two perceptual hashes match was measured on the 7,000 photos of Flickr8k (hash of `phash.py`). Of
24.5 million pairs of different photos, one is within 8 bits, 20 within 10. Of copies, 100 % are within 8 bits after
JPEG of quality 20, half the size or other proportions; 99.5 % after cropping 2 % per side, 93 % after 5 %, 38 % after
10 %; a mirrored copy is not found. Of three million training images against five thousand held out, some 600 (0.02 %)
would be false positives.

Shapes: N training rows, P images per row, M held-out images.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskvlm.data.phash import near
from maskvlm.data.subset import Chosen, Ids, row_hashes, row_ids
from maskvlm.utils.distributed import rank
from maskvlm.utils.errors import ExitCode, UserError

WAYS = ("same id", "same look")


class HeldOut(NamedTuple):
    """An evaluation split. `name` is for display: coco/test."""

    name: str
    id_M: Ids
    hash_M: Ids


def split_names(places: list[str]) -> dict[str, str]:
    """Place -> display name: `.../data/coco/test` is coco/test, unless another place has the same ending; unique."""
    places = list(dict.fromkeys(place.rstrip("/") for place in places))
    short = {place: "/".join(place.split("/")[-2:]) for place in places}
    count = Counter(short.values())
    return {place: name if count[name] == 1 else place for place, name in short.items()}


def leaks_left_out(pairs: Any, places: list[str]) -> dict[str, int]:
    """Number of rows that `without_leaks` left out, by held-out split."""
    counts = {way: len(rows) for way, rows in getattr(pairs, "skipped", {}).items()}
    names = split_names(places).values()
    return {name: sum(counts.get(f"in {name}, {way}", 0) for way in WAYS) for name in names}


def held_out(place: str, name: str) -> HeldOut:
    """The images of a split of a prepared set.

    Args:
        place: folder of the set, a slash and the split: `data/coco/test`.
        name: unique display name.

    Raises:
        UserError: the place names no split, or there is no such set.
    """
    from maskvlm.data.prepared.source import Prepared

    folder, _, split = place.rstrip("/").rpartition("/")
    if not folder:
        raise UserError(
            "data.held_out", f"'{place}' does not name a split", "Give FOLDER/SPLIT, such as data/coco/test"
        )
    pairs = Prepared(folder).split(split)
    id_NP, hash_N = row_ids(pairs), row_hashes(pairs)
    assert id_NP is not None
    assert hash_N is not None
    # all images of a row count: (M, P) -> (M',)
    return HeldOut(name, np.unique(id_NP), np.unique(hash_N))


def find_leaks(id_NP: Ids, hash_N: Ids | None, held: list[HeldOut]) -> dict[str, NDArray[np.int64]]:
    """Rows that show a held-out image, by split and kind of match ("coco/test, same id"); each row once, ids first.

    Args:
        id_NP, hash_N: of the training rows (`row_ids`, `row_hashes`); without hashes only ids are compared.
    """
    # rows not matched so far
    free_N = np.ones(len(id_NP), bool)
    leaks = {}
    for way in WAYS:
        for split in held:
            if way == "same id":
                # (N, P) -> (N,): one held-out image of a row is enough
                hit_N = np.isin(id_NP, split.id_M).any(1)
            else:
                hit_N = np.zeros(len(free_N), bool) if hash_N is None else near(hash_N, split.hash_M)
            leaks[f"{split.name}, {way}"] = np.flatnonzero(free_N & hit_N)
            # a row is reported once, for its first match
            free_N &= ~hit_N
    return {name: row_N for name, row_N in leaks.items() if len(row_N)}


def without_leaks(pairs: Any, places: list[str], leaks: str) -> Any:
    """The training split without held-out images.

    Args:
        places: evaluation splits, as for `held_out`; if empty, no search is made.
        leaks: `refuse` raises an error if there is a leak; `drop` leaves its rows out, reports how many, and lists
            them in `skipped`.

    Raises:
        UserError: there is a leak and `leaks` is `refuse`, or nothing is left (65); `leaks` has another value, or the
            training split does not know its images' ids (2); as `held_out`.
    """
    if leaks not in ("refuse", "drop"):
        raise UserError("data.contamination", f"'{leaks}' is not a valid value", "Use refuse or drop")
    if not places:
        return pairs
    id_NP, hash_N = row_ids(pairs), row_hashes(pairs)
    if id_NP is None:
        what = "this data set cannot list its image ids without opening the images"
        raise UserError("data.held_out", what, "Prepare the data (maskvlm data), or leave data.held_out empty")
    leaked_rows = find_leaks(id_NP, hash_N, [held_out(*named) for named in split_names(places).items()])
    count, names = sum(map(len, leaked_rows.values())), ", ".join(places)
    by = "by id and appearance" if hash_N is not None else "by id alone, as this data set has no hashes"
    # reported even so, to show that the search took place
    if not leaked_rows:
        _tell(f"no training image is held out ({by}: {names})")
        return pairs
    counts = "; ".join(f"{name}: {len(row_N)}" for name, row_N in leaked_rows.items())
    message = f"{count} of {len(pairs)} training rows show held-out images ({by}): {counts}"
    # name three rows, so that users can look at them
    if leaks == "refuse":
        first = ", ".join(_id(pairs[int(row)]) for row in np.concatenate([*leaked_rows.values()])[:3])
        todo = "Set data.contamination to drop, which leaves them out, or use another data set"
        raise UserError("data.held_out", f"{message}; first {first}", todo, ExitCode.BAD_DATA)
    if count == len(pairs):
        raise UserError("data.held_out", f"{message}; nothing is left", "Train on another data set", ExitCode.BAD_DATA)
    _tell(f"{message}; left out")
    kept_N = np.ones(len(pairs), bool)
    # row numbers of all splits and ways, (leaked rows,)
    kept_N[np.concatenate([*leaked_rows.values()])] = False
    listed = {f"in {name}": [pairs[int(row)]["origin"] for row in row_N] for name, row_N in leaked_rows.items()}
    # the held-out splits are part of the fingerprint, as they decide which rows are left out
    return Chosen(pairs, np.flatnonzero(kept_N), f"without {sorted(places)}", listed)


def _id(row: Any) -> str:
    return str(row["image_id"] if "image_id" in row else row["image_ids"][0])


def _tell(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)
