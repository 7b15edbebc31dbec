"""Opens SBU, CC3M and CC12M: img2dataset's output if there is any, else the lists with images next to them."""

from functools import partial
from pathlib import Path

from maskvlm.data.raw.base import Facts, RawSet
from maskvlm.data.raw.coco_flickr import find_file, no_files
from maskvlm.data.raw.links import LinkList, Links, json_links, text_links, tsv_parts
from maskvlm.data.raw.shards import FORMS, WebShards, find_shards
from maskvlm.data.safe_open import check_below
from maskvlm.utils.errors import UserError

# The paper's mix is the "4 M" of ALBEF (Li et al. 2021, arXiv 2107.07651, appendix): 2.95 M images of CC3M and 860 K
# of SBU were still available then, of 3,334,173 (3,318,333 + 15,840) and 1,000,000. CC12M is not in it.
SBU = Facts(
    *("SBU Captions (Ordonez et al. 2011)", 860_000, 860_000),
    "captions and links for research; photos under the terms of their Flickr owners",
)
CC3M = Facts(
    *("Conceptual Captions (Sharma et al. 2018)", 2_950_000, 2_950_000),
    "text free for any purpose, with acknowledgement of Google; images belong to their owners",
)
CC12M = Facts(
    *("Conceptual 12M (Changpinyo et al. 2021)", 12_423_374, 12_423_374),
    "text free for any purpose, with acknowledgement of Google; images belong to their owners",
)
URLS, CAPTIONS = "SBU_captioned_photo_dataset_urls.txt", "SBU_captioned_photo_dataset_captions.txt"


def open_sbu(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """Shards, sbu-captions-all.json, a list in sbu.json, or the two text files."""
    root = Path(raw)
    if shards := _shards(root, name, columns, SBU):
        return shards
    folder = root if root.is_dir() else root.parent
    if file := find_file(root, "sbu-captions-all.json", "sbu.json", "sbu_train.json", "annot.json"):
        return Links(folder, name, SBU, [LinkList(file, "train", partial(json_links, file))])
    urls, captions = find_file(root, URLS), find_file(root, CAPTIONS)
    if urls and captions:
        return Links(folder, name, SBU, [LinkList(urls, "train", partial(text_links, urls, captions))])
    raise no_files(root, "sbu-captions-all.json", "sbu.json", f"{URLS} with {CAPTIONS}", FORMS)


def open_cc3m(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """Shards, or Train_GCC-training.tsv and Validation_GCC-1.1.0-Validation.tsv."""
    return _open_tsv(Path(raw), name, columns, CC3M, "Train_GCC-training.tsv, Validation_GCC-1.1.0-Validation.tsv")


def open_cc12m(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """Shards, or cc12m.tsv."""
    return _open_tsv(Path(raw), name, columns, CC12M, "cc12m.tsv")


def _open_tsv(root: Path, name: str, columns: dict[str, str], facts: Facts, listed: str) -> RawSet:
    if shards := _shards(root, name, columns, facts):
        return shards
    folder = root if root.is_dir() else root.parent
    # "report": logs written by downloaders
    files = [root] if root.is_file() else sorted(file for file in root.glob("*.tsv") if "report" not in file.name)
    if files:
        for file in files:
            check_below(file, folder)
        return Links(folder, name, facts, tsv_parts(files))
    raise no_files(root, f"{listed} (any *.tsv)", FORMS)


def _shards(root: Path, name: str, columns: dict[str, str], facts: Facts) -> RawSet | None:
    # a list was named, so shards next to it are ignored
    if root.is_file() and root.suffix in (".tsv", ".json", ".txt"):
        return None
    try:
        find_shards(root, columns)
    # no shards: try the lists
    except UserError:
        return None
    shards = WebShards(root, name, columns)
    shards.facts = facts
    return shards
