"""COCO, Flickr30k and Flickr8k: Karpathy's split, the official files, and other forms of distribution."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from maskvlm.data.files import get, load_json, opened
from maskvlm.data.raw.base import BadRow, Facts, RawRow, RawSet
from maskvlm.data.raw.columns import Merged, leads_out, name_problem, split_named
from maskvlm.data.raw.lines import json_texts, one_line, read_text, text_lines
from maskvlm.data.raw.photos import PhotoIndex
from maskvlm.data.raw.table import RawTable
from maskvlm.data.safe_open import Inside, check_below
from maskvlm.utils.errors import ExitCode, UserError

KARPATHY = "Karpathy"
_MARKUP = re.compile(r"\[/EN#\S+ ([^\]]*)\]")


class ImagesByName:
    """The images of a set, anywhere in its folder: by their given path, else by file name."""

    def __init__(self, root: Path) -> None:
        self.root, self._inside = root.absolute(), Inside(root)
        self._index: PhotoIndex | None = None

    def find(self, name: str) -> tuple[str, tuple[str, str] | None]:
        """The path, or (reason, message)."""
        if problem := name_problem(name):
            return "", ("unsafe name", f"{one_line(name)!r}: {problem}")
        # by the given path, which needs no walk through the folder
        for folder in ("", "images"):
            if os.path.isfile(path := os.path.join(self.root, folder, name)):
                return (path, None) if self._inside.holds(path) else ("", leads_out(name, self.root))
        if self._index is None:
            # built at first use
            self._index = PhotoIndex(self.root)
        stem = PurePosixPath(name).stem
        padded = re.fullmatch(r"COCO_(?:train|val)20\d\d_(\d{12})", stem)  # the images of 2017 have only the number
        for each in (stem, padded[1]) if padded else (stem,):
            if path := self._index.find(each) or "":
                return path, None
        return "", ("missing image", f"{one_line(name)!r} is nowhere in {one_line(self.root)}")


class CaptionSet(RawSet):
    """Rows of one of the formats below, with image names resolved to files.

    Args:
        read: yields (name of the image, captions, id, split, origin), or a bad row.
    """

    def __init__(self, root: Path, facts: Facts, read: Callable[[], Iterator["CaptionRow | BadRow"]]) -> None:
        self.facts, self.notes, self._root, self._read = facts, [], root, read

    def rows(self) -> Iterator[RawRow | BadRow]:
        """Rows in the order of the file."""
        images = ImagesByName(self._root)
        for row in self._read():
            if isinstance(row, BadRow):
                yield row
                continue
            name, captions, image_id, split, origin = row
            path, problem = images.find(name)
            if not problem and not captions:
                problem = ("no caption", "no sentence for this image")
            if problem:
                yield BadRow(problem[0], origin, problem[1], split)
            else:
                yield RawRow(path, tuple(captions), image_id, split, origin)


CaptionRow = tuple[str, list[str], str, str, str]


def flickr_id(name: str) -> str:
    """`flickr` and the photo's Flickr number, which starts the file name: as in every other set of Flickr photos."""
    number = re.match(r"\d+", PurePosixPath(name).name)
    return f"flickr {number[0]}" if number else one_line(f"flickr {name}")


# ------------------------------------------------------------------ Karpathy's json


def karpathy(file: Path, prefix: str) -> Iterator[CaptionRow | BadRow]:
    """`images[]` with filename, filepath, split, sentences[].raw and cocoid.

    Raises:
        UserError: the JSON as a whole cannot be read.
    """
    with opened(file) as stream:
        images = get(load_json(stream.read(), file), "images", list, str(file), KARPATHY)
    photos = flickr_ids(prefix, images)
    for position, image in enumerate(images):
        origin = f"{file.name} image {position}"
        try:
            # one malformed row is left out and counted, the rest of the file is read
            yield _karpathy_row(image, origin, prefix, photos)
        except UserError as error:
            split = image.get("split") if isinstance(image, dict) else None
            yield BadRow("malformed row", origin, error.what, split_named(split) or "train")


def _karpathy_row(image: Any, origin: str, prefix: str, photos: dict[str, str]) -> CaptionRow | BadRow:
    name = get(image, "filename", str, origin, KARPATHY)
    if image.get("filepath"):
        name = f"{get(image, 'filepath', str, origin, KARPATHY)}/{name}"
    origin = f"{origin} ({one_line(name)})"
    sentences = get(image, "sentences", list, origin, KARPATHY)
    captions = [get(sentence, "raw", str, origin, KARPATHY) for sentence in sentences]
    split = split_named(get(image, "split", str, origin, KARPATHY))
    if split is None:
        return BadRow("unknown split", origin, f"split {one_line(image['split'], 40)!r}", "train")
    # COCO's own number if there is one; it may be 0
    own = next((image[key] for key in ("cocoid", "imgid") if image.get(key) is not None), name)
    return name, captions, photos.get(name) or one_line(f"{prefix} {own}"), split, origin


# ------------------------------------------------------------------ COCO's own


def official(files: list[Path]) -> Iterator[CaptionRow | BadRow]:
    """captions_train2014.json and the like: `images[]` (id, file_name), `annotations[]` (image_id, caption).

    Raises:
        UserError: a JSON file as a whole cannot be read.
    """
    layout = "COCO captions"
    for file in files:
        with opened(file) as stream:
            document = load_json(stream.read(), file)
        split = "train" if "train" in file.stem else "val"
        # captions first, as the file lists them separately from the images, in any order
        captions: dict[Any, list[str]] = {}
        for position, record in enumerate(get(document, "annotations", list, str(file), layout)):
            where = f"{file.name} annotations[{position}]"
            try:
                image = get(record, "image_id", int, where, layout)
                captions.setdefault(image, []).append(get(record, "caption", str, where, layout))
            except UserError as error:
                yield BadRow("malformed row", where, error.what, split)
        for position, image in enumerate(get(document, "images", list, str(file), layout)):
            where = f"{file.name} images[{position}]"
            try:
                name, number = get(image, "file_name", str, where, layout), get(image, "id", int, where, layout)
            except UserError as error:
                yield BadRow("malformed row", where, error.what, split)
                continue
            # captions_train2014.json -> train2014/, where COCO's archives put the images
            folder = file.stem.removeprefix("captions_")
            origin = f"{file.name} image {position} ({one_line(name)})"
            yield f"{folder}/{name}", captions.get(number, []), f"coco {number}", split, origin


# ------------------------------------------------------------------ Flickr's other forms


def token(file: Path, split_of: Callable[[str], str]) -> Iterator[CaptionRow | BadRow]:
    """results_20130124.token, Flickr8k.token.txt: `name.jpg#0`, a tab, a caption; the lines of an image are merged."""
    merged = Merged(file.name, "flickr", lambda name, _: flickr_id(name))
    for line in text_lines(file):
        origin = f"{file.name}:{line.number}"
        name, tab, caption = line.text.partition("\t")
        # name.jpg#0: the number of the caption
        name = name.rpartition("#")[0] or name
        if line.problem:
            yield BadRow(line.problem[0], origin, line.problem[1], "train")
        elif tab and (bad := merged.add(name, [caption], split_of(name), line.number)):
            yield bad
        elif not tab and line.text.strip():
            yield BadRow("malformed row", origin, "no tab between image and caption", "train")
    yield from _named(merged)


def hub_csv(file: Path, split_of: Callable[[str], str]) -> Iterator[CaptionRow | BadRow]:
    """flickr_annotations_30k.csv (raw, sentids, split, filename, img_id), or results.csv (image_name, comment)."""
    table = RawTable(file)
    merged = Merged(file.name, "flickr", lambda name, _: flickr_id(name))
    image, caption = ("filename", "raw") if "raw" in table.columns else ("image_name", "comment")
    if missing := [name for name in (image, caption) if name not in table.columns]:
        what = f"no column {missing[0]!r} (available: {', '.join(map(repr, table.columns))})"
        raise UserError(file, one_line(what), "Fetch it again, or prepare it as csv", ExitCode.BAD_DATA)
    for record in table.records():
        values = dict(zip(table.columns, map(str.strip, record.fields), strict=False))
        problem = record.problem
        # `raw` holds a JSON list, `comment` one caption per row
        captions = [] if problem else json_texts(values[caption]) if caption == "raw" else [values[caption]]
        # the table's own split, else that of the split lists
        split = split_named(values["split"]) if values.get("split") else split_of(values.get(image, ""))
        if captions is None:
            problem = ("malformed row", "the captions are not a JSON list of texts")
        if split is None:
            problem = ("unknown split", f"split {one_line(values['split'], 40)!r}")
        if problem:
            yield BadRow(problem[0], f"{file.name}:{record.number}", problem[1], split or "train")
        elif bad := merged.add(values[image], captions or [], split or "train", record.number):
            yield bad
    yield from _named(merged)


def _named(merged: Merged) -> Iterator[CaptionRow]:
    for row in merged.rows():
        yield str(row.image), list(row.captions), row.image_id, row.split, f"{row.origin} ({one_line(row.image)})"


def entities(folder: Path, split_of: Callable[[str], str]) -> Iterator[CaptionRow | BadRow]:
    """Flickr30k Entities' `sentences/<photo>.txt`: one caption per line; the markup of its phrases is removed."""
    inside = Inside(folder)
    for file in sorted(folder.glob("*.txt")):
        text, problem = read_text(file) if inside.holds(file) else ("", leads_out(file.name, folder))
        origin, name = f"{folder.name}/{one_line(file.name)}", f"{file.stem}.jpg"
        if problem:
            yield BadRow(problem[0], origin, problem[1], split_of(name))
        else:
            # [/EN#3/people a man] -> a man
            captions = [_MARKUP.sub(r"\1", line) for line in text.splitlines() if line.strip()]
            yield name, captions, flickr_id(name), split_of(name), origin


def split_lists(folder: Path) -> Callable[[str], str]:
    """Split of a photo according to val.txt, flickr30k_val.txt, Flickr_8k.devImages.txt ...; "train" if not listed."""
    named: dict[str, str] = {}
    kinds = {"val": "val", "dev": "val", "test": "test"}
    for file in sorted(folder.glob("*.txt")):
        word = re.fullmatch(r"(?:flickr_?\d+k[_.])?(val|dev|test)(?:images)?\.txt", file.name, re.I)
        # only files whose whole name denotes a split
        if word:
            check_below(file, folder)
            for line in text_lines(file):
                if line.text.strip():
                    named[flickr_id(line.text.strip())] = kinds[word[1].lower()]
    return lambda name: named.get(flickr_id(name), "train")


def flickr_ids(name: Any, images: list[Any]) -> dict[str, str]:
    """Path -> `flickr` and the photo's Flickr number, with which its file name starts; only if the number is unique.

    The same photo then has the same id in Flickr8k, Flickr30k and SNLI-VE.
    """
    if not str(name).lower().startswith("flickr"):
        return {}
    # malformed rows are reported elsewhere
    named = [image for image in images if isinstance(image, dict) and isinstance(image.get("filename"), str)]
    starts = [re.match(r"\d+", PurePosixPath(image["filename"]).name) for image in named]
    # a number that starts several names is not a photo's number
    count = Counter(start[0] for start in starts if start)
    pairs = zip(named, starts, strict=True)
    return {_path_of(image): f"flickr {start[0]}" for image, start in pairs if start and count[start[0]] == 1}


def _path_of(image: dict[str, Any]) -> str:
    return f"{image['filepath']}/{image['filename']}" if image.get("filepath") else str(image["filename"])
