"""The images that the examples of a task may name: files in a folder, or those of a prepared set."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from maskvlm.data.files import ImagesByKey, image_folder, image_names
from maskvlm.data.prepared.manifest import MANIFEST, read_manifest
from maskvlm.data.prepared.shards import PreparedShards


class PreparedImages(ImagesByKey):
    """Images of a prepared set by key, over all its splits; returned as bytes instead of paths.

    Args:
        root: the set's folder.
        name_of: key -> the image's name in the set.
        row_of: name -> row number of the image.
    """

    def __init__(self, root: Path, name_of: dict[str, str], row_of: dict[str, int]) -> None:
        super().__init__(root, name_of)
        # (keys,): the key's number -> row of the set
        self._row_N = np.array([row_of[name] for name in name_of.values()], np.int64)
        self._shards, self._root = all_shards(root), root

    def image(self, number: int) -> bytes:
        """An image, encoded."""
        return bytes(self._shards.value("image", int(self._row_N[number])))

    def identity(self, numbers: Iterable[int]) -> str:
        """A hash of all images of the set, from the checksums of its shards."""
        splits = read_manifest(self._root)["splits"]
        sums = [shard["sha256"] for name in sorted(splits) for shard in splits[name]["shards"]]
        return hashlib.sha256(" ".join(sums).encode()).hexdigest()[:16]


def all_shards(root: Path) -> PreparedShards:
    """Shards of all splits, concatenated."""
    return PreparedShards(
        root, [shard for split in read_manifest(root)["splits"].values() for shard in split["shards"]]
    )


class Album:
    """The images that the examples of a task may name: a folder of files, or a prepared set.

    Attributes:
        names: names of all its images, relative to the folder; of a prepared set as in `prepared_names`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.prepared = folder, (folder / MANIFEST).is_file()
        self._row_of: dict[str, int] = {}
        if self.prepared:
            # reversed, so that the first of several rows with the same name is kept
            self._row_of = {name: row for row, name in reversed([*enumerate(prepared_names(folder))])}
        self.names = sorted(self._row_of) if self.prepared else image_names(folder)

    def images(self, name_of: dict[str, str]) -> ImagesByKey:
        """The images with the given names, by key."""
        if self.prepared:
            return PreparedImages(self.folder, name_of, self._row_of)
        return ImagesByKey(self.folder, name_of)


def open_album(images: str | Path | None, root: Path) -> Album:
    """The given folder, else the root if it is a prepared set, else `images/` in the root or the root itself.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if images is None and (root / MANIFEST).is_file():
        return Album(root)
    return Album(image_folder(images, root))


def prepared_names(root: Path) -> list[str]:
    """Names of all images; if a set of pairs has no names, they are made from the ids ("flickr 12" -> flickr/12)."""
    shards = all_shards(root)
    name_N = shards.column("name")
    # as a path, so that both kinds of names can be looked up in the same way
    slashed_N = pc.replace_substring(shards.column("image_id"), " ", "/", max_replacements=1)
    return list(pc.if_else(pc.equal(name_N, ""), slashed_N, name_N).to_pylist())
