"""Parts of a split chosen by image, before any image is opened: seeded, and the small inside the large.

Shapes: N rows, P images a row.
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
from maskvlm.utils.errors import ExitCode, UserError

Ids = NDArray[np.uint64]
PART = 100_000  # ids that are Python texts at the same time
FRACTION, WEIGHT = 1, 2  # so that half of a mix's half is not the very same half
_FLICKR = re.compile(r"(?:.*[/ ])?(\d{3,11})_(?=\d*[a-f])[0-9a-f]{10}(?:_[a-z]{1,2})?(?:\.[A-Za-z]{3,4})?")
"""How Flickr names its files: the photo's number, a secret of ten hexadecimal digits, perhaps a letter for the size. A
secret without a letter, as 0.9 % of Flickr8k's are, may as well be a date, and is not taken for one."""


class Chosen:
    """Some rows of a split, in their order (a `Pairs`, or `Examples`).

    Args:
        pairs: all rows.
        row_N: which.
        how: what they were chosen by; the fingerprint depends on it.
        left_out: reason -> places of those left out that are listed as skipped.
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
        """Another text where images of the whole split are other files; only where that split tells it."""
        identity: str = self.pairs.image_identity
        return identity


def photo_of_id(image_id: str) -> str:
    """ "flickr 1000268201" for an id that ends in Flickr's own name of a photo's file, else the id itself.

    Sets that are known by name have such ids anyway (`RawRow.image_id`). The ids of people's own sets are the names of
    their files: "mine images/1000268201_693b08cb0e.jpg" is the photo that Flickr30k calls 1000268201.jpg. A number
    alone proves nothing, as most sets count their images.
    """
    match = _FLICKR.fullmatch(image_id) if "_" in image_id else None
    return f"flickr {match[1]}" if match else image_id


def hash_of_photo(image_id: str) -> int:
    """63 bits that are the same for the same photo, whatever its set calls it."""
    return stable_id(photo_of_id(image_id))


def row_ids(pairs: Any) -> Ids | None:
    """Hashes (`hash_of_photo`) of the ids of each row's images, (N, P); None where they cannot be told without
    opening the images."""
    # (whole rows, P) -> (rows chosen, P)
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
    """Perceptual hash of each row's image, (N); None where the split has none."""
    if isinstance(pairs, Chosen):
        whole = row_hashes(pairs.pairs)
        return None if whole is None else whole[pairs.row_N]
    column = _column(pairs, "phash")
    return None if column is None else column.to_numpy()


def hashed_image_ids(pairs: Any) -> Ids | None:
    """Ids as `row_ids` gives them, each image once, sorted."""
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
        # examples have a list of P ids a row: N lists -> N * P ids
        flat = pc.list_flatten(chunk) if pa.types.is_list(chunk.type) else chunk
        # a part at a time: millions of Python texts at once would cost gigabytes
        for first in range(0, len(flat), PART):
            yield from flat.slice(first, PART).to_pylist()


def _hashed(texts: Iterable[str], rows: int) -> Ids | None:
    """(N, P), or None where not every row has as many: some splits name each image once for all its rows."""
    ids = np.fromiter(map(hash_of_photo, texts), np.uint64)
    # (N * P,) -> (N, P)
    return ids.reshape(rows, -1) if rows and len(ids) and len(ids) % rows == 0 else None


def lots(ids_N: Ids, seed: int, purpose: int) -> Ids:
    """Each image's place in a seeded order of all images there could be; different ones never share it.

    Args:
        ids_N: hashes of ids.
        seed: another seed, another order.
        purpose: FRACTION or WEIGHT, orders that know nothing of each other.
    """
    # Each step can be undone, so different ids keep different lots. Overflow wraps, as it should.
    lot_N = ids_N ^ np.uint64(mix(seed, purpose))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64: one to one
        lot_N = (lot_N ^ (lot_N >> np.uint64(shift))) * np.uint64(factor)
    return lot_N ^ (lot_N >> np.uint64(31))


def first_images(ids_N: Ids, share: float, seed: int, purpose: int) -> NDArray[np.int64]:
    """Rows of the first round(share * images) images in the order of their lots; all rows of an image, or none."""
    lot_N = lots(ids_N, seed, purpose)
    # sorted, each image once
    different = np.unique(lot_N)
    count = round(share * len(different))
    # up to the lot of the last image taken: a larger share has a larger bound, so it holds the smaller one
    return np.flatnonzero(lot_N <= different[count - 1]) if count else np.empty(0, np.int64)


def fraction_of(pairs: Any, fraction: float, seed: int) -> Any:
    """A part of a training split: with the same seed, 10 % of the images are among 25 % of them.

    An image's rows stay together; an example of several images goes with its first.

    Args:
        fraction: above 0, at most 1 (all).

    Raises:
        UserError: it is out of range or leaves nothing, or the split does not know its images' ids.
    """
    if not 0 < fraction <= 1:
        raise UserError("data.fraction", f"{fraction} is out of range", "Give a number above 0, up to 1")
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
