"""Raw sets by name: each is read as distributed, into rows of images with captions.

`open_raw` is the entry point; `base` defines rows, and the `open_...` functions say which files a set may have.
"""

import difflib
import importlib
import os
from collections.abc import Callable
from pathlib import Path

from maskvlm.data.raw import annotated, coco_flickr, genome, web
from maskvlm.data.raw.annotated import open_daquar, open_nlvr2, open_nlvr_pairs, open_snli_ve, open_vqav2
from maskvlm.data.raw.base import BadRow, Facts, RawRow, RawSet
from maskvlm.data.raw.coco_flickr import open_coco, open_flickr8k, open_flickr30k
from maskvlm.data.raw.columns import ROLES
from maskvlm.data.raw.csv_jsonl_folder import CSV, JSON, open_csv, open_folder, open_jsonl
from maskvlm.data.raw.genome import open_genome
from maskvlm.data.raw.hub import open_hub
from maskvlm.data.raw.shards import open_webdataset
from maskvlm.data.raw.web import open_cc3m, open_cc12m, open_sbu
from maskvlm.data.safe_open import check_plain
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.paths import expand_user

__all__ = ["FACTS", "SETS", "BadRow", "Facts", "RawRow", "RawSet", "open_raw"]

Opener = Callable[[str, str, dict[str, str]], RawSet]

SETS: dict[str, Opener] = {
    "coco": open_coco,
    "flickr30k": open_flickr30k,
    "flickr8k": open_flickr8k,
    "vg": open_genome,
    "sbu": open_sbu,
    "cc3m": open_cc3m,
    "cc12m": open_cc12m,
    "vqav2": open_vqav2,
    "daquar": open_daquar,
    "nlvr2": open_nlvr2,
    "nlvr_pairs": open_nlvr_pairs,
    "snli_ve": open_snli_ve,
    "webdataset": open_webdataset,
    "csv": open_csv,
    "jsonl": open_jsonl,
    "folder": open_folder,
    "hf": open_hub,
}
"""Name -> function that opens the set, given RAW, the prefix of its ids, and the columns."""

FACTS: dict[str, Facts] = {
    "coco": coco_flickr.COCO,
    "flickr30k": coco_flickr.FLICKR30K,
    "flickr8k": coco_flickr.FLICKR8K,
    "vg": genome.FACTS,
    "sbu": web.SBU,
    "cc3m": web.CC3M,
    "cc12m": web.CC12M,
    "vqav2": annotated.VQAV2,
    "daquar": annotated.DAQUAR,
    "nlvr2": annotated.NLVR2,
    "nlvr_pairs": annotated.NLVR_PAIRS,
    "snli_ve": annotated.SNLI_VE,
}
"""Facts about the published sets in SETS; the other entries are formats for users' own data."""

WITH_IMAGES = {"csv": open_csv, "jsonl": open_jsonl}
"""The sets whose images may be in another folder than RAW."""

SUFFIXES = {"csv": CSV, "jsonl": JSON, "webdataset": (".tar", ".parquet")}
"""Suffixes of the files of users' own data, by set."""

WITH_COLUMNS = ("csv", "jsonl", "folder", "hf", "webdataset", "sbu", "cc3m", "cc12m")


def check_file_or_folder(path: Path) -> None:
    """Raise UserError for anything but a file or folder: a pipe, such as `<(...)`, a socket, a device."""
    if os.path.exists(path) and not os.path.isdir(path):
        check_plain(path, os.stat(path).st_mode)


def reader_of(path: str) -> type[RawSet]:
    """The third-party reader of a set, by the import path of its class, `acme.birds.Birds`. Only for paths typed by the
    user, never for values from a file.

    Raises:
        UserError: it cannot be imported, or is not a `RawSet` (66); it lacks a part (2).
    """
    module, _, name = path.rpartition(".")
    try:
        reader = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        todo = "Install the package that it is in, or correct the name; names of known sets have no dot"
        raise UserError("SET", f"{path} cannot be imported ({error})", todo, ExitCode.MISSING_INPUT) from error
    if not (isinstance(reader, type) and issubclass(reader, RawSet)):
        todo = "Name a class of maskvlm.data.raw.base.RawSet"
        raise UserError("SET", f"{path} does not read a set", todo, ExitCode.MISSING_INPUT)
    if missing := sorted(reader.__abstractmethods__):
        todo = "Define it in the class, see docs/extending.md"
        raise UserError("SET", f"{path} has no {' and no '.join(missing)}", todo)
    return reader


def check_not_raw(name: str) -> None:
    """Raise UserError, with the right order of words, if the name of a set is that of a file or folder."""
    path = expand_user(name)
    if not os.path.exists(path):
        return
    if os.path.isdir(path):
        what, kinds = "a folder", ["folder"]
    else:
        what, kinds = "a file", [kind for kind, suffixes in SUFFIXES.items() if path.suffix.lower() in suffixes]
    todo = f"Name its kind before it: {kinds[0]} {name}" if kinds else "Name its kind before it"
    raise UserError("SET", f"{name!r} is {what}, not a kind of set", todo)


def open_raw(
    name: str,
    raw: str,
    columns: dict[str, str] | None = None,
    as_name: str | None = None,
    images: str | None = None,
) -> RawSet:
    """Open a raw set, without reading it yet.

    Args:
        name: one of SETS, or the import path of a class, see `reader_of`.
        raw: its folder or file; for `hf` also a name on the hub.
        columns: role ("image", "caption", "id", "split") -> name of a column, if the table does not use the usual
            names.
        as_name: prefix of the ids instead of `name`; sets whose photos are known elsewhere (COCO, Flickr) keep theirs.
        images: for `csv` and `jsonl`: the folder of the images that the table names, if they are not next to it.

    Raises:
        UserError: there is no such set or role, RAW or `images` does not exist, or RAW contains none of the set's
            files.
    """
    # with a dot it is the path of a class; none of our sets has one
    kind = reader_of(name) if "." in name and not os.path.exists(expand_user(name)) else None
    if kind is None and name not in SETS:
        check_not_raw(name)
        near = difflib.get_close_matches(name, SETS, 1)
        todo = f"Did you mean {near[0]}? " if near else ""
        raise UserError("data", f"there is no set {name!r}", f"{todo}Use one of {', '.join(SETS)}")
    # names are checked before the files
    if columns and (wrong := [role for role in columns if role not in ROLES]):
        raise UserError("columns", f"there is no role {wrong[0]!r}", f"Available roles: {', '.join(ROLES)}")
    if columns and name not in WITH_COLUMNS:
        raise UserError("columns", f"set {name!r} has its own layout", "Leave the columns out, or use csv")
    if images is not None and name not in WITH_IMAGES:
        raise UserError("images", f"set {name!r} has its own layout", "Leave it out, or use csv")
    path = expand_user(raw)
    check_file_or_folder(path)
    # for hf it may be a name on the hub
    if not raw.strip() or (name != "hf" and not os.path.exists(path)):
        todo = "Name the folder or file of the set as it was downloaded"
        raise UserError(raw or "data", "there is no such file or folder", todo, ExitCode.MISSING_INPUT)
    if kind is not None:
        reader = kind(str(path), as_name or name)
        if not hasattr(reader, "facts"):
            raise UserError("SET", f"{name} has no facts", "Define them in the class, see docs/extending.md")
        return reader
    if images is not None:
        if not os.path.isdir(folder := expand_user(images)):
            raise UserError(images, "there is no such folder", "Name the folder of the images", ExitCode.MISSING_INPUT)
        return WITH_IMAGES[name](str(path), as_name or name, columns or {}, folder)
    return SETS[name](raw if name == "hf" else str(path), as_name or name, columns or {})
