"""Rows of shards at any address that fsspec knows, read forward: tar archives in webdataset's layout, Parquet with
pictures, the Arrow shards of prepared sets. The readers are those that prepare such sets: ids and captions are theirs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow as pa

from maskvlm.data.manifest import MANIFEST
from maskvlm.data.raw.base import BadRow, RawRow
from maskvlm.data.raw.columnar import parquet_samples
from maskvlm.data.raw.lines import plain
from maskvlm.data.raw.samples import tar_samples
from maskvlm.data.raw.shards import Shards
from maskvlm.errors import ExitCode, UserError

ENDINGS = (".tar", ".tar.gz", ".tgz", ".parquet", ".arrow")


def find_shards(root: str | list[str]) -> dict[str, int]:
    """Address and size of each shard, in the order of their names.

    Raises:
        UserError: there is none, or the file system cannot be asked.
    """
    import fsspec

    found: dict[str, int] = {}
    for place in [root] if isinstance(root, str) else root:
        try:
            files, path = fsspec.core.url_to_fs(place)
            if not path.endswith(ENDINGS):
                path = f"{path.rstrip('/')}/train/*.arrow" if files.isfile(f"{path}/{MANIFEST}") else f"{path}/*"
            for name, facts in files.glob(path, detail=True).items():
                if name.endswith(ENDINGS) and facts["type"] == "file":
                    found[files.unstrip_protocol(name)] = facts["size"] or 0
        except ImportError as error:
            raise UserError(place, f"needs another package ({error})", "Install it", ExitCode.UNAVAILABLE) from error
        except Exception as error:  # file systems raise what their libraries do
            what = f"cannot be listed ({type(error).__name__}: {plain(error)})"
            raise UserError(place, what, "Check the address and the network", ExitCode.IO_ERROR) from error
    if not found:
        what = "no shard here (.tar, .parquet or .arrow)"
        raise UserError(root, what, "Correct data.source.root", ExitCode.MISSING_INPUT)
    return dict(sorted(found.items()))


class Streamed(Shards):
    """The rows of one shard at an address, as `Shards` has them of one in a folder."""

    def __init__(self, address: str, name: str) -> None:
        self.address, self.name, self.columns = address, name, dict[str, str]()

    def rows(self) -> Iterator[RawRow | BadRow]:
        """In their order; what cannot be read is one bad row, and the rest of the shard is left out."""
        import fsspec

        inside = Path(self.address.rsplit("/", 1)[-1])
        try:
            with fsspec.open(self.address, "rb") as stream:
                if inside.suffix == ".arrow":
                    yield from arrow_rows(stream, inside.name)
                    return
                # Both readers want nothing of a path but to open it.
                opened = cast(Path, stream if inside.suffix == ".parquet" else Opened(stream))
                read = parquet_samples if inside.suffix == ".parquet" else tar_samples
                for sample in read(opened, self.columns):
                    origin = plain(f"{inside}!{sample.origin}" if sample.origin else inside)
                    yield self._row(sample, inside, origin, "train")
        except Exception as error:  # file systems raise what their libraries do
            yield BadRow("unreadable shard", plain(inside), f"{type(error).__name__}: {plain(error)}", "train")


class Opened(NamedTuple):
    """What a reader of files can open, and is open already."""

    stream: Any

    def open(self, mode: str) -> Any:
        """The stream itself."""
        return self.stream


def arrow_rows(stream: Any, shard: str) -> Iterator[RawRow]:
    """The rows of a prepared set's shard."""
    with pa.ipc.open_stream(stream) as batches:
        for batch in batches:
            for row in batch.select(["image", "captions", "image_id", "origin"]).to_pylist():
                origin = f"{shard} ({row['origin']})"
                yield RawRow(row["image"], tuple(row["captions"]), row["image_id"], "train", origin)


def read_shards(shards: list[str], name: str) -> Iterator[dict[str, Any]]:
    """Rows of shards one after the other, as plain dictionaries, for `datasets.IterableDataset`."""
    for shard in shards:
        for row in Streamed(shard, name).rows():
            if isinstance(row, BadRow):
                yield {"origin": row.origin, "problem": (row.reason, f"{row.origin}: {row.message}")}
            elif row.split == "train":
                yield {"origin": row.origin, "problem": None, "row": row}
