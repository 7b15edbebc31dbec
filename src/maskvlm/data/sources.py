"""Readers of public data sets' files: each hands out `Pairs` and knows nothing of models.

The table of a data set is read once into memory-mapped Arrow (Hugging Face datasets), so that neither a large
annotation file nor many processes cost memory; pictures stay files until they are needed.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from maskvlm.data.batch import Row, Source
from maskvlm.data.text import clean_caption
from maskvlm.errors import ExitCode, UserError

if TYPE_CHECKING:
    from datasets import Dataset  # takes a second to import: only where it is used

TABLE_VERSION = 1
"""Raise it when the same file gives another table; older cached tables are then left alone."""

T = TypeVar("T")
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
        content = _read_bytes(self.file)
        digest = hashlib.sha256(content).hexdigest()
        table, all_skipped = _cached_table(content, digest, self.file, self.cache)
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
            self._check_missing(name, root, image_N[absent_N].tolist(), len(row_N))
            places = [_origin(self.file.name, table[int(row)]["position"], image_N[row]) for row in absent_N]
            skipped["missing picture"] = places
        identity = repr((TABLE_VERSION, digest, name, np.flatnonzero(~there_N).tolist()))
        fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return KarpathyPairs(table, row_N[there_N], root, self.file.name, fingerprint, skipped)

    def _root(self, first: str) -> Path:
        if self.images is not None:
            if not self.images.is_dir():
                what = "there is no such folder of pictures"
                raise UserError(self.images, what, "Correct data.source.images", ExitCode.MISSING_INPUT)
            return self.images
        beside, own = self.file.parent / "images", self.file.parent
        if (own / first).is_file() and not (beside / first).is_file():
            return own
        return beside if beside.is_dir() else own

    def _check_missing(self, name: str, root: Path, absent: list[str], total: int) -> None:
        most = self.max_missing * total if name == "train" else 0  # evaluation never skips
        if len(absent) > most or len(absent) == total:
            first = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
            what = f"{len(absent)} of {total} pictures of split '{name}' are not in {root}: {first}"
            way = "raise data.source.max_missing" if name == "train" else "fetch them: evaluation leaves nothing out"
            todo = f"Set data.source.images to their folder, or {way}"
            raise UserError(self.file, what, todo, ExitCode.MISSING_INPUT)


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
    names = {folder: set(os.listdir(root / folder)) for folder in folders if (root / folder).is_dir()}
    paths = map(PurePosixPath, images)
    return [path.name in names.get(str(path.parent), ()) for path in paths]


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(
            file, "no such file", "Set data.source.file (with make: DATA_ROOT= its folder)", ExitCode.MISSING_INPUT
        ) from error
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise UserError(file, what, "Check disk and permissions", ExitCode.IO_ERROR) from error


# ------------------------------------------------------------------ the cached table


def _cached_table(content: bytes, digest: str, file: Path, cache: str | None) -> tuple["Dataset", dict[str, Skipped]]:
    """The table of the file's content, from the cache or made now, and what it leaves out by split."""
    import datasets

    parent = Path(cache).expanduser() if cache else Path(datasets.config.HF_DATASETS_CACHE) / "maskvlm"
    folder = parent / f"karpathy-{TABLE_VERSION}-{digest[:32]}"
    if not folder.is_dir():
        rows, skipped = _parse(content, file)
        try:
            _write_table(rows, skipped, folder)
        except OSError as error:
            what = f"the cache cannot be written ({error.strerror or error})"
            raise UserError(parent, what, "Set `cache` to another folder", ExitCode.CANNOT_CREATE) from error
    try:
        return datasets.Dataset.load_from_disk(folder / "table"), json.loads((folder / "skipped.json").read_text())
    except Exception as error:
        what = f"the cached table cannot be read ({type(error).__name__})"
        raise UserError(folder, what, "Delete this folder; it is made again", ExitCode.IO_ERROR) from error


def _write_table(rows: list[dict[str, Any]], skipped: dict[str, Skipped], folder: Path) -> None:
    """Complete or not at all: other processes may read or write the same table at this moment."""
    import datasets

    text, number = datasets.Value("string"), datasets.Value("int64")
    columns = {"image": text, "split": text, "image_id": text, "position": number}
    features = datasets.Features({**columns, "captions": datasets.List(text)})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as work, _no_bars():
        made = Path(work) / folder.name
        table = datasets.Dataset.from_dict({key: [row[key] for row in rows] for key in features}, features)
        table.save_to_disk(made / "table")
        (made / "skipped.json").write_text(json.dumps(skipped))
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # unless another process was faster
                raise


@contextmanager
def _no_bars() -> Iterator[None]:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


# ------------------------------------------------------------------ the json


def _parse(content: bytes, file: Path) -> tuple[list[dict[str, Any]], dict[str, Skipped]]:
    """Rows with a caption in the file's order, and what was left out or mended, by split and reason."""
    document = _load_json(content, file)
    images = _get(document, "images", list, f"{file}")
    name = document.get("dataset", file.stem)  # ids count from 0 in every file
    rows: list[dict[str, Any]] = []
    skipped: dict[str, Skipped] = {}
    seen: dict[str, int] = {}
    for position, image in enumerate(images):
        row, notes = _parse_image(image, position, file)
        row["image_id"] = f"{name} {row['image_id']}"
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


def _parse_image(image: Any, position: int, file: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    where = f"{file} images[{position}]"
    name = _get(image, "filename", str, where)
    if image.get("filepath"):
        name = f"{_get(image, 'filepath', str, where)}/{name}"
    _check_name(name, where)
    origin = _origin(file.name, position, name)
    captions, notes = [], []
    for number, sentence in enumerate(_get(image, "sentences", list, where)):
        caption, note = clean_caption(_get(sentence, "raw", str, f"{where}.sentences[{number}]"))
        if note:
            reason = "empty caption" if note == "empty" else f"caption {note}"
            notes.append((reason, f"{origin} sentence {number}"))
        if caption:
            captions.append(caption)
    if not captions:
        notes.append(("no caption", origin))
    split = _get(image, "split", str, where)
    identity = next((image[key] for key in ("cocoid", "imgid") if image.get(key) is not None), name)
    row = {"image": name, "captions": captions, "image_id": str(identity), "position": position}
    return {**row, "split": "train" if split == "restval" else split}, notes


def _get(record: Any, key: str, kind: type[T], where: str) -> T:
    """A value of a json object; its absence or another type is the user's error, named by its place."""
    if not isinstance(record, dict):
        what = f"{type(record).__name__} where an object with '{key}' belongs"
    elif key not in record:
        what = f"key '{key}' is missing"
    elif not isinstance(record[key], kind):
        what = f"'{key}' is {type(record[key]).__name__} instead of {kind.__name__}"
    else:
        return cast(T, record[key])
    raise UserError(where, what, "A file in the Karpathy layout is needed", ExitCode.BAD_DATA)


def _check_name(name: str, where: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\x00" in name or clean_caption(name)[1] == "surrogate":
        what = f"file name {name!r} leads out of the folder of pictures or is not text"
        raise UserError(where, what, "Name files relative to that folder", ExitCode.BAD_DATA)


def _load_json(content: bytes, file: Path) -> Any:
    todo = "Fetch it again"
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        where, what = f"{file}:{error.lineno}", f"not JSON (column {error.colno}: {error.msg})"
        raise UserError(where, what, todo, ExitCode.BAD_DATA) from error
    except UnicodeDecodeError as error:
        raise UserError(file, f"not UTF-8 text (byte {error.start})", todo, ExitCode.BAD_DATA) from error
    except RecursionError as error:
        raise UserError(file, "nested too deeply for JSON data", todo, ExitCode.BAD_DATA) from error
