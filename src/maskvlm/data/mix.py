"""Several prepared data sets combined for training, each with a weight."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, combinations
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from maskvlm.data.batch import Row, Source
from maskvlm.data.subset import WEIGHT, Ids, first_images, row_ids
from maskvlm.utils.distributed import rank
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.paths import expand_user

if TYPE_CHECKING:
    from maskvlm.data.prepared.source import PreparedPairs


class MixedPairs:
    """The concatenated training splits of several sets (a `Pairs`).

    Args:
        parts: name -> its training split.
        weights: name -> how often each of its images is shown per epoch.
        seed: selects the images that a weight below 1 keeps; those of a smaller weight are a subset of a larger one's.

    Attributes:
        ends: end of each part's rows.
        rows: for each part, the rows shown, in order, followed by repeated ones.
        skipped, unprepared: reason -> places, of all parts (see `PreparedPairs`).
    """

    def __init__(self, parts: "dict[str, PreparedPairs]", weights: dict[str, float], seed: int) -> None:
        self.parts = [*parts.values()]
        self.names = [*parts]
        self.ids = [_ids(pairs) for pairs in self.parts]
        self.rows = [_weighted(ids, weights[name], seed) for name, ids in zip(self.names, self.ids, strict=True)]
        self.ends = [*accumulate(map(len, self.rows))]
        self.skipped: dict[str, list[str]] = {}
        self.unprepared: dict[str, list[str]] = {}
        for name, pairs in parts.items():
            for reason, places in pairs.unprepared.items():
                self.unprepared.setdefault(reason, []).extend(f"{name}: {place}" for place in places)
        # the order of the parts matters, as it numbers the rows
        identity = [(name, weights[name], pairs.fingerprint) for name, pairs in parts.items()]
        self.fingerprint = hashlib.sha256(repr((seed, identity)).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int, /) -> Row:
        part, row = self.place(index)
        record = self.parts[part][row]
        # the row is a new dictionary, so it may be changed
        record["origin"] = f"{self.names[part]}: {record['origin']}"
        return record

    def place(self, index: int) -> tuple[int, int]:
        """Number of the part, and the row in it. Raises IndexError outside 0 to length - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"no row {index} in a mix of {len(self)}")
        # the first part that ends beyond the index
        part = bisect_right(self.ends, index)
        return part, int(self.rows[part][index - self.ends[part]])  # counted from its end

    def captions(self, index: int) -> list[str]:
        """The captions of an image, without building the rest of its row."""
        part, row = self.place(index)
        return self.parts[part].captions(row)

    def source(self, index: int) -> str:
        """Name of the set that a row comes from."""
        return self.names[self.place(index)[0]]

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of all rows, such as image_id or phash, in order."""
        # repeated as often as a row is shown, so the column has the mix's length
        columns = [pairs.column(name).take(rows) for pairs, rows in zip(self.parts, self.rows, strict=True)]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)

    def row_ids(self) -> Ids:
        """63-bit hash of the image id of each row, (N, 1)."""
        parts = zip(self.ids, self.rows, strict=True)
        # (N,) -> (N, 1): one image per row
        return np.concatenate([ids[rows] for ids, rows in parts])[:, None]

    def image_ids(self) -> Iterator[str]:
        """Ids of all its images, each once, without opening them."""
        for image in pc.unique(self.column("image_id")):
            yield image.as_py()

    def shared(self) -> dict[tuple[str, str], int]:
        """Number of images shared by two sets of the mix, by id; without pairs of sets that share none."""
        # an image counts once, even if its weight shows it several times
        different = [np.unique(ids[rows]) for ids, rows in zip(self.ids, self.rows, strict=True)]
        both = {
            (self.names[one], self.names[other]): len(np.intersect1d(different[one], different[other], True))
            for one, other in combinations(range(len(different)), 2)
        }
        return {names: count for names, count in both.items() if count}


def _ids(pairs: "PreparedPairs") -> Ids:
    ids_NP = row_ids(pairs)
    assert ids_NP is not None
    return ids_NP[:, 0]


def _weighted(ids_N: Ids, weight: float, seed: int) -> NDArray[np.int64]:
    """All rows, as often as the integer part of the weight; for its fraction, the rows of the first images."""
    # 1.5 -> once all rows, and half of the images again
    often, rest = divmod(weight, 1)
    more = [first_images(ids_N, rest, seed, WEIGHT)] if rest else []
    return np.concatenate([*[np.arange(len(ids_N))] * int(often), *more])


class Mix(Source):
    """Prepared data sets mixed for training (a `Source`); one of them, or another set, is used for evaluation.

    A photo that is in two of them stays in both, as its captions differ; the number of such photos is reported.

    Args:
        sets: name of a folder under the root -> how often each of its images is shown per epoch. 0.5 shows a
            seeded half of them, always the same; 1.5 shows all, and that half twice.
        evaluate: the set whose `val` and `test` are used for evaluation; it need not be in the mix.
        root: the folder that contains one folder per set.
        seed: selects the images that a weight below 1 keeps.
    """

    def __init__(self, sets: dict[str, float], evaluate: str, root: str = "data", seed: int = 0) -> None:
        if not sets:
            raise UserError("data.source.sets", "no data set was given", "Name at least one, such as coco: 1.0")
        for name, weight in sets.items():
            if not 0 < weight < float("inf"):
                todo = "Give a number above 0, or leave the set out"
                raise UserError(f"data.source.sets.{name}", f"weight {weight} selects nothing", todo)
        self.sets, self.evaluate, self.root, self.seed = sets, evaluate, expand_user(root), seed

    def split(self, name: str) -> "MixedPairs | PreparedPairs":
        """The mix for `train`; for any other split, that of the set for evaluation.

        Raises:
            UserError: a set is not prepared, or a weight keeps none of its images.
        """
        from maskvlm.data.prepared.source import Prepared

        wanted = [*self.sets] if name == "train" else [self.evaluate]
        # collect all missing sets, so that one error names them
        absent = [each for each in wanted if not (self.root / each / "manifest.json").is_file()]
        if absent:
            commands = "; ".join(f"maskvlm data {each} <its folder>" for each in absent)
            what = f"there is no prepared data set {', '.join(absent)}"
            raise UserError(self.root, what, f"Prepare it ({commands}), or set DATA_ROOT", ExitCode.MISSING_INPUT)
        # evaluation metrics are of one set, never of a mix
        if name != "train":
            return Prepared(str(self.root / self.evaluate)).split(name)
        pairs = MixedPairs({each: Prepared(str(self.root / each)).split(name) for each in wanted}, self.sets, self.seed)
        for each, rows in zip(pairs.names, pairs.rows, strict=True):
            if not len(rows):
                what = f"weight {self.sets[each]} leaves it no images"
                raise UserError(f"data.source.sets.{each}", what, "Give a larger one, or leave the set out")
        self._tell(pairs)
        return pairs

    def _tell(self, pairs: MixedPairs) -> None:
        if rank() == 0:
            counts = ", ".join(f"{name} {len(rows)}" for name, rows in zip(pairs.names, pairs.rows, strict=True))
            print(f"mix of {len(pairs)} rows per epoch: {counts}", flush=True)
            for (one, other), count in pairs.shared().items():
                print(f"{count} images are in {one} and in {other}: kept in both, captions differ", flush=True)
