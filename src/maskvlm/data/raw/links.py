"""Sets that are lists of addresses (Conceptual Captions, SBU), with images as saved by download scripts.

No address is ever fetched. The output of img2dataset is read by `shards`; here images are found by the names that other
downloaders give them (`photos.SCHEMES`), anywhere below the folder. The naming scheme is determined once per list, from
the first rows, as an image found under another scheme might belong to another row.

Shapes: N rows.
"""

import re
from array import array
from collections.abc import Callable, Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskvlm.data.caption_text import stable_id
from maskvlm.data.files import load_json
from maskvlm.data.raw.base import BadRow, Facts, RawRow, RawSet
from maskvlm.data.raw.captions import ImagesByName
from maskvlm.data.raw.columns import SPLITS, split_of_path
from maskvlm.data.raw.lines import json_items, one_line, one_line_id, text_lines
from maskvlm.data.raw.photos import SCHEMES, PhotoIndex, photo_of, stem_of
from maskvlm.data.safe_open import Inside, opened
from maskvlm.data.strict_json import flaw
from maskvlm.utils.errors import ExitCode, UserError

PROBE = 2000
BY_END = "the end of the address"


class Link(NamedTuple):
    """A row of a list. row: counted from 0; name: name of the image, if the list has one."""

    row: int
    url: str
    caption: str
    origin: str
    name: str = ""
    problem: tuple[str, str] | None = None


class LinkList(NamedTuple):
    """A list and its split; `read` starts from the beginning each time."""

    file: Path
    split: str
    read: Callable[[], Iterator[Link]]


class Links(RawSet):
    """Rows of one or several lists whose images are below `root`.

    If folders there are named after splits (`training/`, `images_val/`), a list's images are looked up in those of its
    split. Photos from Flickr, COCO or Visual Genome have their id there, others the set's name and the row.
    """

    def __init__(self, root: Path, name: str, facts: Facts, parts: list[LinkList]) -> None:
        self.root, self.name, self.facts, self.parts, self.notes = root, name, facts, parts, []

    def rows(self) -> Iterator[RawRow | BadRow]:
        """Rows in the order of the lists."""
        self.notes = []
        named = ImagesByName(self.root)
        for part in self.parts:
            # bare: some scripts save images without an extension
            index = PhotoIndex(*_folders(self.root, part.split), bare=True)
            scheme, twice = self._scheme(part, index)
            prefix = self.name if part.split == "train" else f"{self.name} {part.split}"
            for link in part.read():
                path, problem = "", link.problem
                if not problem and link.name:
                    # the list itself names the image
                    path, problem = named.find(link.name)
                # one file, several rows: it is unclear to which the image belongs
                elif not problem and scheme == BY_END and stable_id(stem_of(link.url)) in twice:
                    problem = ("ambiguous name", f"several addresses end in {one_line(stem_of(link.url))!r}")
                elif not problem:
                    path = (index.find(SCHEMES[scheme](link.url, link.row)) or "") if scheme else ""
                    what = f"no image for {one_line(link.url)} in {one_line(self.root)}; nothing is downloaded"
                    problem = None if path else ("missing image", what)
                if problem:
                    yield BadRow(problem[0], link.origin, problem[1], part.split)
                else:
                    # nine digits, so that ids sort by row
                    image_id = photo_of(link.url) or one_line_id(f"{prefix} {link.row:09d}")
                    yield RawRow(path, (link.caption,), image_id, part.split, link.origin)

    def _scheme(self, part: LinkList, index: PhotoIndex) -> tuple[str, set[int]]:
        """The scheme under which most of the first rows have an image, or ""; and address endings shared by rows."""
        links = (link for link in part.read() if not link.problem and not link.name)
        # a sample of rows, tried under every scheme
        first = [*islice(links, PROBE)]
        hits = {
            name: sum(index.find(of(link.url, link.row)) is not None for link in first) for name, of in SCHEMES.items()
        }
        # of equals, the first in SCHEMES
        best = max(hits, key=hits.__getitem__)
        if not hits[best]:
            return "", set()
        if best.startswith("the row"):
            best = self._start(best, part, index)
        self.notes.append(f"{one_line(part.file.name)}: images are named by {best}")
        return best, _twice(part) if best == BY_END else set()

    def _start(self, scheme: str, part: LinkList, index: PhotoIndex) -> str:
        """Whether rows count from 0 or 1, decided by the image that only one of the two can have."""
        from_0, from_1 = scheme.replace("from 1", "from 0"), scheme.replace("from 0", "from 1")
        # counted from 0 there is an image 0, from 1 an image `rows`
        rows = sum(1 for _ in part.read())
        if index.find(SCHEMES[from_0]("", 0)) is None and index.find(SCHEMES[from_1]("", rows - 1)) is not None:
            return from_1
        return from_0


def _twice(part: LinkList) -> set[int]:
    """Hashes of address endings shared by several rows."""
    # hashes: 8 bytes per row
    ends = array("q", (stable_id(stem_of(link.url)) for link in part.read() if not link.problem))
    value_N, count_N = np.unique(np.array(ends, np.int64), return_counts=True)
    return set(value_N[count_N > 1].tolist())


def _folders(root: Path, split: str) -> list[Path]:
    """Folders in the root or in `images/` that are named after this split; else the root."""
    places = [path for folder in (root, root / "images") if folder.is_dir() for path in sorted(folder.iterdir())]
    words = {path: [word for word in re.split(r"[^a-z]+", path.name.lower()) if word] for path in places}
    inside = Inside(root)
    # links to folders outside are not followed
    own = (path for path in places if path.is_dir() and inside.holds(path))
    named = [path for path in own if any(SPLITS.get(word) == split for word in words[path])]
    return named or [root]


# ------------------------------------------------------------------ lists


def tsv_links(file: Path) -> Iterator[Link]:
    """Caption, tab, address (CC3M) or address, tab, caption (CC12M), as in the first row that has an address."""
    first: int | None = None
    row = -1
    for line in text_lines(file):
        # a blank line is not a row, as images may be named by the row
        if not line.text and not line.problem:
            continue
        row, origin, fields = row + 1, f"{file.name}:{line.number}", line.text.split("\t")
        problem = line.problem
        if not problem and len(fields) != 2:
            reason = "missing column" if len(fields) < 2 else "too many columns"
            problem = (reason, f"{len(fields)} fields instead of a caption and an address")
        if problem:
            yield Link(row, "", "", origin, problem=problem)
            continue
        # until a row has an address, all are bad, as the columns cannot be told apart
        if first is None:
            first = next((n for n in (0, 1) if "://" in fields[n][:12]), None)
        if first is None or "://" not in fields[first]:
            yield Link(
                row, "", "", origin, problem=("no address", f"{one_line(fields[first or 0], 60)!r} is not an address")
            )
        else:
            yield Link(row, fields[first].strip(), fields[1 - first], origin)


def text_links(urls: Path, captions: Path) -> Iterator[Link]:
    """SBU_captioned_photo_dataset_urls.txt and _captions.txt, line by line."""
    # zip_longest, so that lists of different lengths are reported, not cut
    for row, (url, caption) in enumerate(zip_longest(text_lines(urls), text_lines(captions))):
        origin, line = f"{urls.name}:{row + 1}", url if caption is None or (url and url.problem) else caption
        problem = line.problem if line else None
        if url is None or caption is None:
            problem = ("missing column", f"{urls.name} and {captions.name} have different numbers of lines")
        yield Link(row, url.text.strip() if url else "", caption.text if caption else "", origin, problem=problem)


def json_links(file: Path) -> Iterator[Link]:
    """A list of objects with `caption`, and `image` or `url`; or SBU's object of lists `image_urls` and `captions`."""
    with opened(file) as stream:
        # an object of two lists, or a list of objects: the first character decides
        lists = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
        stream.seek(0)
        document = load_json(stream.read(), file) if lists else None
    records: Iterator[Any] = json_items(file)
    if document is not None:
        if doubled := flaw(document):
            raise UserError(file, doubled, "Use sbu-captions-all.json as distributed", ExitCode.BAD_DATA)
        urls, captions = document.get("image_urls"), document.get("captions")
        if not isinstance(urls, list) or not isinstance(captions, list) or len(urls) != len(captions):
            what = "'image_urls' and 'captions' are not lists of the same length"
            raise UserError(file, what, "Use sbu-captions-all.json as distributed", ExitCode.BAD_DATA)
        records = ({"url": url, "caption": caption} for url, caption in zip(urls, captions, strict=True))
    for row, record in enumerate(records):
        values = record if isinstance(record, dict) else {}
        url, name, caption = (values.get(key, "") for key in ("url", "image", "caption"))
        # an address or a name is enough to find the image
        whole = all(isinstance(value, str) for value in (url, name, caption)) and (url or name)
        wrong = flaw(record) or "an object with 'caption' and 'image' or 'url' belongs here"
        problem = None if whole and not flaw(record) else ("malformed row", wrong)
        if problem:
            url = name = caption = ""
        yield Link(row, url, caption, f"{file.name} [{row}]", name, problem)


def tsv_parts(files: list[Path]) -> list[LinkList]:
    """One per file, with its split by name: Train_GCC-training.tsv, Validation_GCC-1.1.0-Validation.tsv, cc12m.tsv."""
    return [LinkList(file, split_of_path(file.stem), lambda file=file: tsv_links(file)) for file in files]  # type: ignore[misc]
