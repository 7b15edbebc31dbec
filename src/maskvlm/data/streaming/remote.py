"""Rows of shards at any address supported by fsspec, read sequentially: tar archives in webdataset's layout, Parquet
files with images, Arrow shards of prepared sets. They use the same readers as preparation, so ids and captions agree.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from maskvlm.data.prepared.manifest import MANIFEST
from maskvlm.data.prepared.manifest_schema import MOST_BYTES, checked_manifest
from maskvlm.data.prepared.shards import Shard, ShardSource, damaged
from maskvlm.data.raw.base import BadRow, RawRow
from maskvlm.data.raw.columnar import parquet_samples
from maskvlm.data.raw.columns import split_of_path
from maskvlm.data.raw.lines import one_line
from maskvlm.data.raw.samples import tar_samples
from maskvlm.data.raw.shards import WebShards
from maskvlm.data.safe_open import check_below
from maskvlm.utils.distributed import rank
from maskvlm.utils.errors import ExitCode, UserError

ENDINGS = (".tar", ".tar.gz", ".tgz", ".parquet", ".arrow")


def list_shards(root: str | list[str]) -> dict[str, int]:
    """Address and size of each training shard, sorted by name. In a folder, shards named after another split
    (`val-000.tar`) are left out with a message; a shard or a pattern that is named explicitly is always used.

    Raises:
        UserError: there is none (66), a package for the address is missing (69), it cannot be listed (74), or a shard
            is a link out of its folder (77).
    """
    import fsspec

    sizes: dict[str, int] = {}
    others = 0
    for place in [root] if isinstance(root, str) else root:
        try:
            # path: the address without its protocol
            files, path = fsspec.core.url_to_fs(place)
            named = path.endswith(ENDINGS)
            if not named:
                # a folder: the train split of a prepared set, else all shards in it
                path = f"{path.rstrip('/')}/train/*.arrow" if files.isfile(f"{path}/{MANIFEST}") else f"{path}/*"
            for name, facts in files.glob(path, detail=True).items():
                if name.endswith(ENDINGS) and facts["type"] == "file":
                    if facts.get("islink") and path != name:  # a link that the user did not name
                        check_below(Path(name), Path(path.partition("*")[0]).parent)
                    if not named and split_of_path(name.rpartition("/")[2]) != "train":
                        others += 1
                        continue
                    # some servers do not report sizes
                    sizes[files.unstrip_protocol(name)] = facts["size"] or 0
        except UserError:
            raise
        except ImportError as error:
            raise UserError(place, f"needs another package ({error})", "Install it", ExitCode.UNAVAILABLE) from error
        except Exception as error:  # file systems raise errors of their libraries
            what = f"cannot be listed ({type(error).__name__}: {one_line(error)})"
            raise UserError(place, what, "Check the address and the network", ExitCode.IO_ERROR) from error
    if others and rank() == 0:
        print(f"{root}: shards of splits other than train are left out: {others}", flush=True)
    if not sizes:
        what = "no training shards here" if others else "no shards here (.tar, .parquet or .arrow)"
        raise UserError(root, what, "Correct data.source.root", ExitCode.MISSING_INPUT)
    # every process must get the same list
    return dict(sorted(sizes.items()))


@lru_cache(64)
def sums_in(folder: str) -> dict[str, str]:
    """Name -> sha256 of the shards in a folder, if it is a split of a prepared set; else {}.

    Raises:
        UserError: the set's manifest is damaged.
    """
    import fsspec

    root, _, split = folder.rpartition("/")
    files, path = fsspec.core.url_to_fs(f"{root}/{MANIFEST}")
    if not files.isfile(path):
        return {}
    # before it is read into memory
    if (files.size(path) or 0) > MOST_BYTES:
        raise UserError(path, f"more than {MOST_BYTES:,} bytes", "Fetch it again", ExitCode.BAD_DATA)
    with files.open(path, "rb") as stream:
        manifest = checked_manifest(stream.read(), Path(path))
    shards = manifest["splits"].get(split, {"shards": []})["shards"]
    return {each["file"].rpartition("/")[2]: each["sha256"] for each in shards}


def folders_of(addresses: list[str]) -> dict[str, str]:
    """Address -> its folder, from where the folders begin to differ; "" if all are in one. Sets that were downloaded
    alike have the same names of shards and the same keys in them, so only the folders tell them apart."""
    folders = [address.rpartition("/")[0].split("/") for address in addresses]
    # Equal parts at the beginning of all folders.
    common = sum(1 for _ in takewhile(lambda parts: len({*parts}) == 1, zip(*folders, strict=False)))
    return {address: "/".join(folder[common:]) for address, folder in zip(addresses, folders, strict=True)}


class Streamed(WebShards):
    """The rows of one shard at an address, like those of `WebShards` for a shard in a folder.

    Args:
        name: name of the set; prefix of the ids.
        folder: from `folders_of`; part of origins, and of ids unless the shard has its own.
    """

    def __init__(self, address: str, name: str, folder: str = "") -> None:
        self.address, self.folder, self.columns = address, folder, dict[str, str]()
        self.name = f"{name} {folder}" if folder else name

    def rows(self) -> Iterator[RawRow | BadRow]:
        """Rows in order; if a row cannot be read, a single bad row stands for it and the rest of the shard."""
        import fsspec

        inside = Path(self.folder, self.address.rsplit("/", 1)[-1])
        try:
            with fsspec.open(self.address, "rb") as stream:
                if inside.suffix == ".arrow":
                    sums = sums_in(self.address.rpartition("/")[0])
                    # read whole, as a prepared shard is small and its checksum covers all bytes
                    yield from arrow_rows(stream.read(), str(inside), sums.get(inside.name))
                    return
                read = parquet_samples if inside.suffix == ".parquet" else tar_samples
                for sample in read(stream, self.columns):
                    origin = one_line(f"{inside}!{sample.origin}" if sample.origin else inside)
                    # the shard's name was checked in `list_shards`
                    yield self._row(sample, inside, origin, "train")
        except UserError as error:
            # a bad row, not an error, as one lost shard of thousands must not end a run of days
            yield BadRow("unreadable shard", one_line(inside), error.what, "train")
        except Exception as error:  # file systems raise errors of their libraries
            yield BadRow("unreadable shard", one_line(inside), f"{type(error).__name__}: {one_line(error)}", "train")


def arrow_rows(content: bytes, name: str, sha256: str | None) -> Iterator[RawRow]:
    """The rows of a prepared set's shard. Raises UserError if it is damaged, or not as the manifest says."""
    check_sum(content, name, sha256)
    for row in Shard(ShardSource(Path(name), content)).rows():
        origin = f"{name} ({row['origin']})"
        yield RawRow(row["image"], tuple(row["captions"]), row["image_id"], "train", origin)


def check_sum(content: bytes, name: str, sha256: str | None) -> None:
    """Raise UserError if a shard's checksum differs from the manifest's; takes 0.6 s for a gigabyte."""
    if sha256 is not None and (there := hashlib.sha256(content).hexdigest()) != sha256:
        raise damaged(Path(name), f"sha256 is {there[:16]}..., the manifest says {sha256[:16]}...")


def read_shards(shards: list[str], name: str, folders: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of one shard after the other, as plain dictionaries, for `datasets.IterableDataset`.

    Args:
        shards: addresses.
        name: name of the set.
        folders: from `folders_of`, for all shards of the set.
    """
    for shard in shards:
        for row in Streamed(shard, name, (folders or {}).get(shard, "")).rows():
            if isinstance(row, BadRow):
                yield {"origin": row.origin, "problem": (row.reason, f"{row.origin}: {row.message}")}
            # rows of other splits in the shards are not used for training
            elif row.split == "train":
                yield {"origin": row.origin, "problem": None, "row": row}
