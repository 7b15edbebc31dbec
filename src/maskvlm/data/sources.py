"""Readers of public data sets' files: each hands out `Pairs` and knows nothing of models.

The table of a data set is read once into memory-mapped Arrow (Hugging Face datasets), so that neither a large
annotation file nor many processes cost memory; pictures stay files until they are needed.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from maskvlm.data.batch import Row, Source
from maskvlm.data.files import check_missing, check_name, get, load_json, opened, picture_folder
from maskvlm.data.opening import Inside
from maskvlm.data.table import Columns, ParsedColumns, cached_table
from maskvlm.data.text import clean_caption
from maskvlm.utils.errors import ExitCode, UserError

if TYPE_CHECKING:
    from datasets import Dataset  # takes a second to import: only where it is used

TABLE_VERSION = 2
"""Raise it when the same file gives another table; older cached tables are then left alone."""

COLUMNS: Columns = {
    "image": "string",
    "split": "string",
    "image_id": "string",
    "position": "int64",
    "captions": ["string"],
}
LAYOUT = "Karpathy"
Skipped = dict[str, list[str]]


class KarpathyPairs:
    """One split of a Karpathy file.

    Attributes:
        fingerprint: changes with the file, the split, and the pictures that are absent.
        skipped: reason -> the rows or sentences that were left out ("missing picture", "no caption",
            "empty caption") or mended ("caption cut", "caption surrogate", "caption control").
    """

    def __init__(
        self, table: "Dataset", row_N: np.ndarray, root: Path, file: str, fingerprint: str, skipped: Skipped
    ) -> None:
        self._table, self._row_N, self._root, self._file = table, row_N, root, file
        self.fingerprint, self.skipped = fingerprint, skipped

    def __len__(self) -> int:
        return len(self._row_N)

    def __getitem__(self, index: int, /) -> Row:
        row = self._table[int(self._row_N[index])]
        return Row(
            image=str(self._root / row["image"]),
            captions=row["captions"],
            image_id=row["image_id"],
            origin=_origin(self._file, row["position"], row["image"]),
        )

    def captions(self, index: int) -> list[str]:
        """The captions of a picture, without building the rest of its row."""
        return list(self._table[int(self._row_N[index])]["captions"])

    def image_ids(self) -> Iterator[str]:
        """Of all its pictures, each once, without opening them."""
        for image in pc.unique(self._table.data.column("image_id").take(self._row_N)):
            yield image.as_py()


class Karpathy(Source):
    """COCO, Flickr30k or Flickr8k captions in the json layout of Karpathy's splits (a `Source`).

    `images[]` with `filename`, perhaps `filepath` (a folder), `split` (`restval` counts as `train`), `cocoid`
    or `imgid`, and `sentences[].raw`.

    Args:
        file: the json.
        images: folder of the pictures; by default `images/` beside the json, or the json's own folder.
        cache: where the tables are kept; by default with those of Hugging Face datasets.
        max_missing: a split with more than this share of its pictures absent is refused; up to it, their rows
            are skipped and listed.
    """

    def __init__(
        self, file: str, images: str | None = None, cache: str | None = None, max_missing: float = 0.01
    ) -> None:
        self.file = Path(file).expanduser()
        self.images = None if images is None else Path(images).expanduser()
        self.cache, self.max_missing = cache, max_missing

    def split(self, name: str) -> KarpathyPairs:
        """The pairs of one split.

        Raises:
            UserError: json or pictures are missing, the json is malformed or of another structure, it has no
                such split, or the cache cannot be written.
        """
        with opened(self.file, "Set data.source.file to the json, or prepare the set (make data)") as stream:
            content = stream.read()
        digest = hashlib.sha256(content).hexdigest()
        key = f"karpathy-{TABLE_VERSION}-{digest[:32]}"
        _, table, all_skipped = cached_table(key, self.cache, COLUMNS, lambda: _columns(*_parse(content, self.file)))
        split_N = np.asarray(table.data.column("split").to_numpy())
        row_N = np.flatnonzero(split_N == name)
        if not len(row_N):
            raise _no_split(self.file, name, split_N)
        skipped = {reason: list(places) for reason, places in all_skipped.get(name, {}).items()}
        image_N = table.data.column("image").to_numpy()
        root = self._root(image_N[row_N[0]])
        there_N = np.array(_present(root, image_N[row_N].tolist()))
        if not there_N.all():
            absent_N = row_N[~there_N]
            check_missing(self.file, name, root, image_N[absent_N].tolist(), len(row_N), self.max_missing)
            places = [_origin(self.file.name, table[int(row)]["position"], image_N[row]) for row in absent_N]
            skipped["missing picture"] = places
        identity = repr((TABLE_VERSION, digest, name, np.flatnonzero(~there_N).tolist()))
        fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return KarpathyPairs(table, row_N[there_N], root, self.file.name, fingerprint, skipped)

    def _root(self, first: str) -> Path:
        """The named folder, `images/` beside the json, or the json's own where the first picture is there."""
        own = self.file.parent
        if self.images is None and (own / first).is_file() and not (own / "images" / first).is_file():
            return own
        return picture_folder(self.images, own)


def _origin(file: str, position: int, image: str) -> str:
    return f"{file} image {position} ({image})"


def _no_split(file: Path, name: str, split_N: np.ndarray) -> UserError:
    names, counts = np.unique(split_N, return_counts=True)
    there = ", ".join(f"{other} with {count}" for other, count in zip(names, counts, strict=True))
    what = f"no picture with a caption in split '{name}' (there is {there})"
    return UserError(file, what, "Take the complete file or another split", ExitCode.MISSING_INPUT)


def _present(root: Path, images: list[str]) -> list[bool]:
    """Whether each file is there; a listing per folder is far cheaper than a look at every file."""
    folders = {str(PurePosixPath(image).parent) for image in images}
    inside = Inside(root)
    names = {folder: _names(root / folder, inside) for folder in folders if (root / folder).is_dir()}
    paths = map(PurePosixPath, images)
    return [path.name in names.get(str(path.parent), ()) for path in paths]


def _names(folder: Path, inside: Inside) -> set[str]:
    """Of the files in a folder, without links that lead out."""
    if not inside.holds(folder / "x"):
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if not entry.is_symlink() or inside.holds(entry.path)}


# ------------------------------------------------------------------ the json


def _columns(rows: list[dict[str, Any]], skipped: dict[str, Skipped]) -> ParsedColumns:
    return ParsedColumns({name: [row[name] for row in rows] for name in COLUMNS}, skipped)


def _parse(content: bytes, file: Path) -> tuple[list[dict[str, Any]], dict[str, Skipped]]:
    """Rows with a caption in the file's order, and what was left out or mended, by split and reason."""
    document = load_json(content, file)
    images = get(document, "images", list, f"{file}", LAYOUT)
    name = document.get("dataset", file.stem)  # ids count from 0 in every file
    photos = _photos(name, images)
    rows: list[dict[str, Any]] = []
    skipped: dict[str, Skipped] = {}
    seen: dict[str, int] = {}
    for position, image in enumerate(images):
        row, notes = _parse_image(image, position, file)
        row["image_id"] = photos.get(row["image"], f"{name} {row['image_id']}")
        lists = skipped.setdefault(row["split"], {})
        for reason, place in notes:
            lists.setdefault(reason, []).append(place)
        if row["captions"]:
            rows.append(row)
        if (first := seen.setdefault(row["image_id"], position)) != position:
            what = f"images {first} and {position} have the same id '{row['image_id']}'"
            raise UserError(file, what, "Make `cocoid` or `imgid` unique", ExitCode.BAD_DATA)
    if not rows:
        raise UserError(file, "no picture with a caption", "Take the complete file", ExitCode.BAD_DATA)
    return rows, skipped


def _photos(name: Any, images: list[Any]) -> dict[str, str]:
    """Path -> `flickr` and the photo's number there, which starts the file's name; where it names one photo only.

    The same photo then has the same id in Flickr8k, Flickr30k and SNLI-VE.
    """
    if not str(name).lower().startswith("flickr"):
        return {}
    named = [image for image in images if isinstance(image, dict) and isinstance(image.get("filename"), str)]
    starts = [re.match(r"\d+", PurePosixPath(image["filename"]).name) for image in named]
    count = Counter(start[0] for start in starts if start)
    pairs = zip(named, starts, strict=True)
    return {_path(image): f"flickr {start[0]}" for image, start in pairs if start and count[start[0]] == 1}


def _path(image: dict[str, Any]) -> str:
    return f"{image['filepath']}/{image['filename']}" if image.get("filepath") else str(image["filename"])


def _parse_image(image: Any, position: int, file: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    where = f"{file} images[{position}]"
    name = get(image, "filename", str, where, LAYOUT)
    if image.get("filepath"):
        name = f"{get(image, 'filepath', str, where, LAYOUT)}/{name}"
    check_name(name, where)
    origin = _origin(file.name, position, name)
    captions, notes = [], []
    for number, sentence in enumerate(get(image, "sentences", list, where, LAYOUT)):
        caption, note = clean_caption(get(sentence, "raw", str, f"{where}.sentences[{number}]", LAYOUT))
        if note:
            reason = "empty caption" if note == "empty" else f"caption {note}"
            notes.append((reason, f"{origin} sentence {number}"))
        if caption:
            captions.append(caption)
    if not captions:
        notes.append(("no caption", origin))
    split = get(image, "split", str, where, LAYOUT)
    identity = next((image[key] for key in ("cocoid", "imgid") if image.get(key) is not None), name)
    row = {"image": name, "captions": captions, "image_id": str(identity), "position": position}
    return {**row, "split": "train" if split == "restval" else split}, notes
