"""Subsets of a split chosen by image, without opening any image: seeded, and nested.

Shapes: N rows, P images per row.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from maskvlm.data.caption_text import stable_id
from maskvlm.utils.distributed import mix
from maskvlm.utils.errors import ExitCode, UserError, check_positive_shares

Ids = NDArray[np.uint64]
PART = 100_000  # ids held as Python strings at a time
FRACTION, WEIGHT = 1, 2  # so that half of a mix's half is not the same half again
_FLICKR = re.compile(r"(?:.*[/ ])?(\d{3,11})_(?=\d*[a-f])[0-9a-f]{10}(?:_[a-z]{1,2})?(?:\.[A-Za-z]{3,4})?")
"""Flickr's file names: the photo's number, a secret of ten hexadecimal digits, optionally a letter for the size. A
secret without letters, as in 0.9 % of Flickr8k, may as well be a date, and is not matched."""


class Chosen:
    """A subset of the rows of a split, in order (a `Pairs`, or `Examples`).

    Args:
        pairs: all rows.
        row_N: the selected rows.
        how: how they were selected; the fingerprint depends on it.
        left_out: reason -> places of the rows left out that are listed as skipped.
    """

    def __init__(self, pairs: Any, row_N: NDArray[np.int64], how: str, left_out: dict[str, list[str]]) -> None:
        self.pairs, self.row_N = pairs, row_N
        self.skipped = {**getattr(pairs, "skipped", {}), **left_out}
        self.unprepared: dict[str, list[str]] = getattr(pairs, "unprepared", {})
        identity = hashlib.sha256(f"{how} {pairs.fingerprint}".encode())
        # little-endian on every machine
        identity.update(row_N.astype("<i8").tobytes())
        self.fingerprint = identity.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.row_N)

    def __getitem__(self, index: int, /) -> Any:
        return self.pairs[int(self.row_N[index])]

    @property
    def image_identity(self) -> str:
        """A hash of the image files of the whole split; only if that split has one."""
        identity: str = self.pairs.image_identity
        return identity


def photo_of_id(image_id: str) -> str:
    """ "flickr 1000268201" for an id that ends in Flickr's own file name of a photo, else the id itself.

    Published sets have such ids anyway (`RawRow.image_id`). In users' own sets, ids are file names:
    "mine images/1000268201_693b08cb0e.jpg" is the photo that Flickr30k calls 1000268201.jpg. A number alone proves
    nothing, as most sets number their images.
    """
    match = _FLICKR.fullmatch(image_id) if "_" in image_id else None
    return f"flickr {match[1]}" if match else image_id


def hash_of_photo(image_id: str) -> int:
    """63-bit hash that is the same for the same photo, whatever its name in a set."""
    return stable_id(photo_of_id(image_id))


def row_ids(pairs: Any) -> Ids | None:
    """Hashes (`hash_of_photo`) of the ids of each row's images, (N, P); None if they are not known without opening the
    images."""
    # (all rows, P) -> (selected rows, P)
    if isinstance(pairs, Chosen):
        whole = row_ids(pairs.pairs)
        return None if whole is None else whole[pairs.row_N]
    if hasattr(pairs, "row_ids"):
        # a mix
        own: Ids = pairs.row_ids()
        return own
    for name in ("image_id", "images"):  # of pairs, of examples
        if (ids := _column(pairs, name)) is not None:
            return _hashed(_texts(ids), len(pairs))
    names = getattr(pairs, "image_ids", None)
    return None if names is None else _hashed(names(), len(pairs))


def row_hashes(pairs: Any) -> Ids | None:
    """Perceptual hash of each row's image, (N); None if the split has none."""
    if isinstance(pairs, Chosen):
        whole = row_hashes(pairs.pairs)
        return None if whole is None else whole[pairs.row_N]
    column = _column(pairs, "phash")
    return None if column is None else column.to_numpy()


def hashed_image_ids(pairs: Any) -> Ids | None:
    """Ids as in `row_ids`, sorted and unique."""
    ids_NP = row_ids(pairs)
    if ids_NP is not None:
        return np.unique(ids_NP)
    names = getattr(pairs, "image_ids", None)
    return None if names is None else np.unique(np.fromiter(map(hash_of_photo, names()), np.uint64))


def _column(pairs: Any, name: str) -> pa.ChunkedArray | None:
    try:
        return pairs.column(name)
    except (AttributeError, KeyError):
        return None


def _texts(ids: pa.ChunkedArray) -> Iterator[str]:
    for chunk in ids.chunks:
        # examples have a list of P ids per row: N lists -> N * P ids
        flat = pc.list_flatten(chunk) if pa.types.is_list(chunk.type) else chunk
        # a part at a time, as millions of Python strings at once would cost gigabytes
        for first in range(0, len(flat), PART):
            yield from flat.slice(first, PART).to_pylist()


def _hashed(texts: Iterable[str], rows: int) -> Ids | None:
    """(N, P), or None if rows have different numbers of ids: some splits list each image once for all its rows."""
    ids = np.fromiter(map(hash_of_photo, texts), np.uint64)
    # (N * P,) -> (N, P)
    return ids.reshape(rows, -1) if rows and len(ids) and len(ids) % rows == 0 else None


def lots(ids_N: Ids, seed: int, purpose: int) -> Ids:
    """Each image's position in a seeded order of all possible images; different images never share a position.

    Args:
        ids_N: hashes of ids.
        seed: another seed gives another order.
        purpose: FRACTION or WEIGHT, which give independent orders.
    """
    # Each step is invertible, so different ids keep different positions. Overflow wraps, as intended.
    lot_N = ids_N ^ np.uint64(mix(seed, purpose))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64: one to one
        lot_N = (lot_N ^ (lot_N >> np.uint64(shift))) * np.uint64(factor)
    return lot_N ^ (lot_N >> np.uint64(31))


def first_images(ids_N: Ids, share: float, seed: int, purpose: int) -> NDArray[np.int64]:
    """Rows of the first round(share * images) images in the order of `lots`; all rows of an image, or none."""
    lot_N = lots(ids_N, seed, purpose)
    # sorted, each image once
    different = np.unique(lot_N)
    count = round(share * len(different))
    # up to the position of the last image: a larger share has a larger bound, so it includes the smaller one
    return np.flatnonzero(lot_N <= different[count - 1]) if count else np.empty(0, np.int64)


def fraction_of(pairs: Any, fraction: float, seed: int) -> Any:
    """A fraction of a training split: with the same seed, 10 % of the images are a subset of 25 % of them.

    An image's rows stay together; an example with several images is selected by its first.

    Args:
        fraction: above 0, at most 1 (all).

    Raises:
        UserError: it is out of range or leaves nothing, or the split does not know its images' ids.
    """
    check_positive_shares({"data.fraction": fraction})
    if fraction == 1:
        return pairs
    ids_NP = row_ids(pairs)
    if ids_NP is None:
        what = "this data set cannot list its image ids without opening the images"
        raise UserError("data.fraction", what, "Set it to 1, or prepare the data (maskvlm data)")
    row_N = first_images(ids_NP[:, 0], fraction, seed, FRACTION)
    if not len(row_N):
        what = f"{fraction} of {len(np.unique(ids_NP[:, 0]))} images leaves none"
        raise UserError("data.fraction", what, "Give a larger fraction", ExitCode.USAGE)
    return Chosen(pairs, row_N, f"fraction {fraction} seed {seed}", {})
