"""Web-scale sets as webdataset and img2dataset (github.com/rom1504/img2dataset) write them: tars, Parquet or files."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskvlm.data.raw.archive import TAR
from maskvlm.data.raw.base import BadRow, Facts, RawRow, RawSet
from maskvlm.data.raw.columnar import has_images, listed_names, parquet_samples, without_images
from maskvlm.data.raw.columns import ROLES, not_looked_at, split_named, split_of_path
from maskvlm.data.raw.csv_jsonl_folder import texts_in
from maskvlm.data.raw.lines import decoded, one_line, one_line_id, read_text
from maskvlm.data.raw.photos import photo_of
from maskvlm.data.raw.samples import KeyedFiles, file_samples, images_of, tar_samples
from maskvlm.data.safe_open import Inside, Walk
from maskvlm.data.strict_json import flaw, parse_json
from maskvlm.utils.errors import ExitCode, UserError

MAX_TEXT_BYTES = 16_000_000
STATS = "_stats.json"
READERS = {"tar": tar_samples, "files": file_samples, "parquet": parquet_samples}
FORMS = "*.tar, *.parquet with a column of images, or folders of images with .json and .txt beside them"


class WebShards(RawSet):
    """A folder of shards, or a single shard.

    The caption is the `.txt` member, else `caption` in the `.json` member. An image's id is that of the photo if its
    address is at COCO, Flickr or Visual Genome, else the set's name and img2dataset's key, else name, shard and key.
    Splits are given by folder or file names. Counts are compared with those in `_stats.json`.

    Args:
        root: the folder or file.
        name: name of the set; prefix of the ids.
        columns: role -> key of the `.json` member, column of the Parquet file, or extension of a member.
    """

    def __init__(self, root: Path, name: str, columns: dict[str, str] | None = None) -> None:
        self.root, self.name, self.columns = root, name, columns or {}
        self.facts, self.notes = Facts(name, None, None, "that of each image: addresses are in the .json"), []
        self._left_out: dict[str, list[str]] = {}
        self._kind, self._shards = find_shards(root, self.columns, self._left_out)
        self._urls = self._successes = 0

    def rows(self) -> Iterator[RawRow | BadRow]:
        """Rows in the order of shard names and of their contents; a duplicate key in a shard is a bad row."""
        self._urls = self._successes = 0
        yield from not_looked_at(self._left_out, self.root, "train")
        for shard in self._shards:
            yield from self._rows_of(shard)
        if self._urls:
            share = 100 * self._successes / self._urls
            self.notes = [f"img2dataset asked for {self._urls:,} images and got {self._successes:,} ({share:.0f} %)"]

    def _rows_of(self, shard: Path) -> Iterator[RawRow | BadRow]:
        inside = shard.relative_to(self.root).as_posix() if shard != self.root else shard.name
        split, images, cut = split_of_path(inside), 0, False
        # key -> its first member; of one shard, as the keys of all shards would not fit into memory
        seen_keys: dict[str, str] = {}
        # one sample at a time; the problem of a whole shard has no key
        for sample in READERS[self._kind](shard, self.columns):
            origin = one_line(f"{inside}!{sample.origin}" if sample.origin else inside)
            row = self._row(sample, shard, origin, split)
            # downloaded images, usable or not, to compare with img2dataset's count
            images += isinstance(row, RawRow) or "image" in sample.parts
            if sample.key in seen_keys:
                row = BadRow("duplicate key", origin, self._twice(sample.key, seen_keys[sample.key]), split)
            elif sample.key:
                seen_keys[sample.key] = sample.origin
            cut |= not sample.key
            yield row
        yield from self._compare(shard, inside, split, images, cut)

    def _twice(self, key: str, first: str) -> str:
        """The message on the second sample of a key."""
        what = f"key {one_line(key)!r} appears twice, first at {one_line(first)}"
        if self._kind != "tar":
            return what
        return f"{what}; the members of a key must be adjacent, and it ends at the first dot of their names"

    def _row(self, sample: KeyedFiles, shard: Path, origin: str, split: str) -> RawRow | BadRow:
        meta, problem = _meta(sample)
        problem = sample.problem or problem
        status = meta.get("status")
        if not problem and "image" not in sample.parts:
            failed = isinstance(status, str) and status != "success"
            # img2dataset also writes a row for an image that it could not fetch
            problem = (one_line(status, 40).replace("_", " "), one_line(meta.get("error_message"))) if failed else None
            problem = problem or ("no image", "no image of that name")
        captions = problem or self._captions(sample, meta)
        # (reason, message); captions are a list
        if isinstance(captions, tuple):
            return BadRow(captions[0], origin, captions[1], split)
        # a column takes precedence over the names of files and folders
        named = split_named(meta[self.columns["split"]]) if self.columns.get("split") in meta else None
        # img2dataset's own number, else shard and member
        key = meta.get(self.columns.get("id", "key"))
        own = str(key) if isinstance(key, str | int) else f"{_stem(shard)}/{sample.key}"
        split = named or split
        prefix = self.name if split == "train" else f"{self.name} {split}"  # keys count from 0 in each download
        # the photo's own id first, so that leaks are found by id
        image_id = photo_of(meta.get("url")) or f"{prefix} {own}"
        return RawRow(sample.parts["image"], tuple(captions), one_line_id(image_id), split, origin)

    def _captions(self, sample: KeyedFiles, meta: dict[str, Any]) -> list[str] | tuple[str, str]:
        wanted = self.columns.get("caption")
        # the `.txt`, unless another key was requested and exists
        if "text" in sample.parts and (wanted is None or wanted not in meta):
            if len(sample.parts["text"]) > MAX_TEXT_BYTES:
                return "too large", f"a caption of {len(sample.parts['text']):,} bytes"
            text, problem = decoded(sample.parts["text"])
            return problem or [text]
        for name in [wanted] if wanted else ROLES["caption"]:
            if (captions := texts_in(meta.get(name))) is not None:
                return captions
        if self._kind == "parquet":
            names = listed_names([*meta])
            if wanted:
                return "no caption", f"no column {wanted!r} with a text (others: {names})"
            todo = "name it: --columns caption=NAME (make: ARGS=)"
            return "no caption", f"no column for the caption (available: {names}); {todo}"
        return "no caption", "neither a .txt nor a caption in a .json"

    def _compare(self, shard: Path, inside: str, split: str, images: int, cut: bool) -> Iterator[BadRow]:
        """Compare img2dataset's count with the images found; a truncated archive has already been reported."""
        file = shard.parent / f"{_stem(shard)}{STATS}"
        there = os.path.lexists(file) and Inside(shard.parent).holds(file)
        text, problem = read_text(file) if there else ("", ("absent", ""))
        try:
            stats = {} if problem else parse_json(text)
            # without a file of statistics nothing is compared
            urls, successes = (stats.get(key, images) for key in ("count", "successes"))
            if not all(type(number) is int and 0 <= number < 2**53 for number in (urls, successes)):
                raise TypeError("no numbers")
        except (ValueError, TypeError, AttributeError, RecursionError):
            yield BadRow("damaged statistics", one_line(file.name), "not what img2dataset writes", split)
            return
        if stats:
            self._urls, self._successes = self._urls + urls, self._successes + successes
        # a truncated shard has already been reported
        if stats and successes != images and not cut:
            what = f"{file.name} counts {successes:,} images, {images:,} are there"
            yield BadRow("other count than img2dataset's", one_line(inside), what, split)


def find_shards(
    root: Path, columns: dict[str, str], left_out: dict[str, list[str]] | None = None
) -> tuple[str, list[Path]]:
    """ "tar", "parquet" or "files", and the shards by name.

    Args:
        left_out: is filled with reason -> names of skipped shards (see `Walk`).

    Raises:
        UserError: there are none.
    """
    shards_by_kind: dict[str, list[Path]] = {"tar": [], "parquet": [], "files": []}
    walk = Walk(root)
    for place, names in walk if root.is_dir() else [(str(root.parent), [root.name])]:
        shards_by_kind["tar"] += [Path(place, name) for name in names if TAR.search(name)]
        shards_by_kind["parquet"] += [Path(place, name) for name in names if name.endswith(".parquet")]
        # a folder of images counts as one shard
        if any(name.endswith(".json") and not name.endswith(STATS) for name in names) and images_of(Path(place)):
            shards_by_kind["files"].append(Path(place))
    for reason, paths in walk.left_out.items():
        if left_out is not None:
            left_out[reason] = [path for path in paths if TAR.search(path) or path.endswith(".parquet")]
    # next to tars, img2dataset writes Parquet files of the addresses, without images
    if not shards_by_kind["tar"]:
        parquet = shards_by_kind["parquet"]
        shards_by_kind["parquet"] = [path for path in parquet if has_images(path, columns)]
        if parquet and not any(shards_by_kind.values()):
            raise without_images(parquet[0], columns)
    # the first kind found: tar, parquet, files
    for kind, shards in shards_by_kind.items():
        if shards:
            return kind, sorted(shards)
    raise UserError(root, "no shards in this folder", f"Looked for {FORMS}", ExitCode.MISSING_INPUT)


def _stem(shard: Path) -> str:
    return TAR.sub("", shard.name).removesuffix(".parquet")


def _meta(sample: KeyedFiles) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """The `.json` member as an object, empty if there is none, and what is wrong with it."""
    # from Parquet it is already an object
    content = sample.parts.get("json", {})
    if isinstance(content, dict):
        return content, None
    text, problem = decoded(content)
    try:
        meta = parse_json(text) if not problem else {}
    except (ValueError, RecursionError):
        meta, problem = {}, ("not JSON", "the .json member cannot be read")
    if wrong := flaw(meta):
        meta, problem = {}, ("not JSON", wrong)
    return (
        (meta, problem) if isinstance(meta, dict) else ({}, ("not an object", "the .json member is not a JSON object"))
    )


def open_webdataset(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """Any folder of shards."""
    return WebShards(Path(raw), name, columns)
