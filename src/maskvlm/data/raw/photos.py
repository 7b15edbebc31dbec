"""Images as saved by downloaders: which photo an address shows, and its file name on disk.

Shapes: N files.
"""

import os
import re
import zlib
from array import array
from collections.abc import Callable
from hashlib import md5
from itertools import chain
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from maskvlm.data.caption_text import stable_id
from maskvlm.data.images import IMAGE_SUFFIXES
from maskvlm.data.safe_open import Walk

_PHOTOS = {  # the same photo has the same id in every set, so that leaks are found by id
    "coco": re.compile(r"cocodataset\.org/.*?0*(\d+)\.jpg", re.I),
    "flickr": re.compile(r"(?:static\.?flickr\.com|staticflickr\.com)/.*?/(\d+)_[0-9a-f]+", re.I),
    "vg": re.compile(r"VG_100K(?:_2)?/(\d+)\.jpg", re.I),
}


def photo_of(url: object) -> str | None:
    """ "coco 391895", "flickr 4385058960" or "vg 2343" for an address at COCO, Flickr or Visual Genome."""
    if not isinstance(url, str):
        return None
    for name, pattern in _PHOTOS.items():
        if match := pattern.search(url):
            return f"{name} {match[1] if name == 'flickr' else int(match[1])}"
    return None


def stem_of(url: str) -> str:
    """The name at the end of an address, without extension."""
    name = re.split(r"[?#]", url, maxsplit=1)[0].rpartition("/")[2]
    return os.path.splitext(unquote(name))[0]


def _by_row(start: int, width: int) -> Callable[[str, int], str]:
    return lambda _, row: f"{row + start:0{width}d}"


SCHEMES: dict[str, Callable[[str, int], str]] = {
    "the CRC-32 of the address": lambda url, _: str(zlib.crc32(url.encode("utf-8", "replace"))),
    "row and CRC-32 of the address": lambda url, row: f"{row}_{zlib.crc32(url.encode('utf-8', 'replace'))}",
    "the MD5 of the address": lambda url, _: md5(url.encode("utf-8", "replace"), usedforsecurity=False).hexdigest(),
    "the end of the address": lambda url, _: stem_of(url),
    **{
        f"the row, from {start}" + (f", in {width} digits" if width else ""): _by_row(start, width)
        for start in (0, 1)
        for width in (0, 4, 5, 6, 7, 8, 9, 12)
    },
}
"""Description of a naming scheme -> image name for an address and row (from 0), as in the scripts of ViLBERT, LAVIS,
SBU's readers, and ViLT."""


class PhotoIndex:
    """Files of folders and their subfolders, by name without extension; some 20 bytes per file.

    Args:
        roots: the folders; of files with the same name the first is used.
        bare: include files without an extension.
    """

    def __init__(self, *roots: Path, bare: bool = False) -> None:
        self._folders: list[str] = []
        self._suffixes: list[str] = []
        # numbers, as millions of names as Python strings would take gigabytes
        hashes, folders, suffixes = array("q"), array("l"), array("l")
        kinds = IMAGE_SUFFIXES | ({""} if bare else set())
        for place, files in chain.from_iterable(map(Walk, roots)):
            self._folders.append(place)
            for name in files:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in kinds:
                    # a handful: .jpg, .JPG, .png ...
                    if suffix not in self._suffixes:
                        self._suffixes.append(suffix)
                    # the name itself is not kept, as the caller of `find` knows it
                    hashes.append(stable_id(stem))
                    folders.append(len(self._folders) - 1)
                    suffixes.append(self._suffixes.index(suffix))
        self._hash_N = np.array(hashes, np.int64)
        order_N = np.argsort(self._hash_N, kind="stable")  # stable, so that the first of equal names stays first
        self._hash_N = self._hash_N[order_N]
        self._folder_N = np.array(folders, np.int32)[order_N]
        self._suffix_N = np.array(suffixes, np.int16)[order_N]

    def __len__(self) -> int:
        return len(self._hash_N)

    def find(self, stem: str) -> str | None:
        """The path of the first file with this name."""
        # 63 bits: collisions are very unlikely among a few million names
        wanted = stable_id(stem)
        number = int(np.searchsorted(self._hash_N, wanted))
        if number == len(self) or self._hash_N[number] != wanted:
            return None
        return os.path.join(self._folders[self._folder_N[number]], stem + self._suffixes[self._suffix_N[number]])
