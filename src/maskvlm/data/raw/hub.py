"""Any image-caption set that Hugging Face `datasets` can load: from the hub by name, or from a local folder."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from maskvlm.config.safe_yaml import read_yaml
from maskvlm.data.raw.base import BadRow, Facts, RawRow, RawSet
from maskvlm.data.raw.columns import Folder, find_columns, split_named
from maskvlm.data.raw.csv_jsonl_folder import texts_in
from maskvlm.data.raw.lines import one_line, one_line_id, short_value
from maskvlm.data.safe_open import Walk, check_plain, content_of
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.paths import expand_user

if TYPE_CHECKING:
    from datasets import Dataset  # takes a second to import, so only where it is used

BATCH = 32
CARDS = ("README.md", ".huggingface.yaml")
"""Files of a local set from which the library reads settings."""
MOST_CARD = 1_000_000


class HubSet(RawSet):
    """A set on the hub (`owner/name`, or `owner/name:configuration`), or a local one for `load_dataset` or written by
    `save_to_disk`.

    The image column contains images, bytes or paths, the caption column texts or lists of texts. Consecutive rows with
    the same id are one image. A column `split` takes precedence over the name of the split.
    """

    def __init__(self, raw: str, name: str, columns: dict[str, str] | None = None) -> None:
        self.raw, self.name, self.columns, self.notes = raw, name, columns or {}, []
        self.facts = Facts(name, None, None, "see the set's card on the Hugging Face hub")
        self._sets: dict[str, Dataset] | None = None

    def rows(self) -> Iterator[RawRow | BadRow]:
        """Rows of one split after the other, in the order of the set."""
        if self._sets is None:
            self._sets = _load(self.raw)
        self.notes = []
        for part, data in self._sets.items():
            split = split_named(part)
            if split is None:
                self.notes.append(f"split {part!r} is taken for train")
            yield from _merged(self._rows_of(part, data, split or "train"))

    def _rows_of(self, part: str, data: "Dataset", default: str) -> Iterator[RawRow | BadRow]:
        where = f"{self.raw} ({part})"
        columns = find_columns(data.column_names, self.columns, where)
        image = columns["image"]
        # Other columns may be large, and are not read. These are read as stored: whatever types the set declares, the
        # library decodes and fetches nothing; only `safe_open` opens images.
        data = data.select_columns(sorted(set(columns.values()))).with_format("arrow")
        folder = Folder(Path(self.raw) if Path(self.raw).is_dir() else Path())
        # one batch of encoded images in memory
        for start in range(0, len(data), BATCH):
            batch = data[start : start + BATCH].to_pydict()
            for offset in range(len(batch[image])):
                values = {role: batch[column][offset] for role, column in columns.items()}
                yield self._row(values, start + offset, part, default, folder)

    def _row(self, values: dict[str, Any], number: int, part: str, default: str, folder: Folder) -> RawRow | BadRow:
        origin = one_line(f"{self.raw} {part} row {number}")
        content, problem = _content(values["image"], folder)
        captions = texts_in(values["caption"])
        split = split_named(values["split"]) if values.get("split") is not None else default
        if problem is None and captions is None:
            problem = ("no caption", f"the caption is {short_value(values['caption'])}")
        if problem is None and split is None:
            problem = ("unknown split", f"{short_value(values['split'])} is not train, val or test")
        if problem:
            return BadRow(problem[0], origin, problem[1], split or default)
        own = values.get("id")
        # an empty text is not an id
        identity = own if isinstance(own, int | str) and own != "" else f"{part} {number}"
        # ids may start from 0 in each part of the set, as in the files of a table
        if identity is own and default not in ("", "train"):
            identity = f"{default} {own}"
        return RawRow(content, tuple(captions or ()), one_line_id(f"{self.name} {identity}"), split or default, origin)


def _content(value: Any, folder: Folder) -> tuple[str | bytes, tuple[str, str] | None]:
    """Bytes or a path, and (reason, message)."""
    if isinstance(value, dict):
        path = value.get("path")
        value = value.get("bytes") if value.get("bytes") is not None else path
        # the library may have unpacked the image to its cache, outside the folder
        if isinstance(value, str) and _is_fetched(value):
            return value, None
    if isinstance(value, bytes):
        return value, None
    if isinstance(value, str) and value.strip():
        return folder.place(value)
    return "", ("no image", f"the image is {short_value(value)}")


def _is_fetched(path: str) -> bool:
    """Whether the library put a file there; other absolute paths come from the set, and may be anything."""
    import datasets

    own = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE)
    return any(os.path.realpath(path).startswith(f"{os.path.realpath(str(cache))}/") for cache in own)


def _merged(rows: Iterator[RawRow | BadRow]) -> Iterator[RawRow | BadRow]:
    """Merge consecutive rows of the same image into the first of them. Another image with the same id is passed on, and
    detected where all rows are seen."""
    held: RawRow | None = None
    for row in rows:
        # the held row may still get captions, so it is yielded when the next image comes
        if isinstance(row, RawRow) and held and row[:1] + row[2:4] == held[:1] + held[2:4]:
            held = held._replace(captions=held.captions + row.captions)
            continue
        if isinstance(row, BadRow):
            yield row
            continue
        if held:
            yield held
        held = row
    if held:
        yield held


def _load(raw: str) -> "dict[str, Dataset]":
    import datasets

    local = expand_user(raw)
    check_local(local)
    # a path may contain a colon
    name, _, configuration = (raw, "", "") if local.exists() else raw.partition(":")
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            # written by `save_to_disk`
            dataset = datasets.load_from_disk(str(local))
        else:
            dataset = datasets.load_dataset(str(local) if local.exists() else name, configuration or None)
    except Exception as error:  # the library raises a dozen types, some its own, some from the network
        what = f"Hugging Face datasets cannot load it ({type(error).__name__}: {one_line(error, 160)})"
        todo = "Check the name; sets with several configurations are named owner/name:configuration"
        raise UserError(raw, what, todo, ExitCode.MISSING_INPUT) from error
    parts = dict(dataset) if isinstance(dataset, dict) else {"train": dataset}
    for part, data in parts.items():
        check_columns(data, f"{raw} ({part})")
    return parts


def check_columns(data: "Dataset", where: str) -> None:
    """Reject a set with damaged files: the library maps them into memory, where a wrong offset kills the process.

    Raises:
        UserError: an offset leads out of its column, or a text is not UTF-8.
    """
    try:
        data.data.table.validate(full=True)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(where, f"damaged ({one_line(error, 100)})", "Fetch it again", ExitCode.BAD_DATA) from error


def check_local(folder: Path) -> None:
    """Reject a folder with a pipe, a device or a link that leads out of it, which the library would open.

    Raises:
        UserError: there is one; names the first.
    """
    walk = Walk(folder)
    for place, names in walk if folder.is_dir() else ():
        for name in names:
            check_plain(Path(place, name), os.stat(os.path.join(place, name)).st_mode)
    for name in CARDS:
        if folder.is_dir() and (folder / name).is_file():
            check_card(folder / name)
    # complete only now that the walk is over
    for paths in walk.left_out.values():
        what = f"{one_line(paths[0])!r} leads out of this folder, or is not text"
        raise UserError(folder, what, "Copy there what it leads to", ExitCode.REFUSED)


def check_card(file: Path) -> None:
    """Check the card of a local set, which may name data files within the set but not elsewhere.

    Raises:
        UserError: it names an address or a file outside the folder, or cannot be read and mentions files (77).
    """
    text = content_of(file, MOST_CARD).decode("utf-8", "replace")
    # the YAML at the top of a README.md; the other kind of card is entirely YAML
    head = re.match(r"\ufeff?---\s*\n(.*?)\n---", text, re.DOTALL)
    yaml_text = head[1] if head else "" if file.suffix == ".md" else text
    what, todo = "its settings cannot be read, and mention files", "Remove them from the file, or use only the data"
    try:
        settings = read_yaml(yaml_text, str(file))
    except UserError:
        if "data_files" in yaml_text or "data_dir" in yaml_text or "configs" in yaml_text:
            raise UserError(file, what, todo, ExitCode.REFUSED) from None
        return
    if file.suffix == ".md":
        # in a README, only `configs` names files; addresses elsewhere in it are text
        settings = settings.get("configs") if isinstance(settings, dict) else None
    # "::" chains file systems in fsspec: zip://a::https://b
    for one in _strings([settings]):
        if "::" in one or "://" in one or one.startswith(("/", "~")) or ".." in one.split("/"):
            what = f"names {short_value(one)}, which is not in this folder"
            raise UserError(file, what, "Use only the data, without this file", ExitCode.REFUSED)


def _strings(value: Any) -> Iterator[str]:
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
        if isinstance(part, dict | list):
            yield from _strings(part)
        elif isinstance(part, str):
            yield part.replace("\\", "/")


def open_hub(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """Open a set; nothing is loaded until its rows are read."""
    return HubSet(raw, name, columns)
