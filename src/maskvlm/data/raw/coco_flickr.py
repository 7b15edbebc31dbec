"""Opens COCO, Flickr30k and Flickr8k: the files that are present decide how they are read."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from maskvlm.data.raw import captions
from maskvlm.data.raw.base import BadRow, Facts, RawSet
from maskvlm.data.raw.captions import CaptionRow, CaptionSet
from maskvlm.data.safe_open import check_below
from maskvlm.utils.errors import ExitCode, UserError

# Karpathy's files have 123,287, 31,014 and 8,000 images with (except for a few) five captions each. The original
# publication of Flickr30k (Young et al. 2014) has 31,783 photos.
COCO = Facts(
    *("COCO Captions (Chen et al. 2015)", 123_287, 616_767),
    "captions CC BY 4.0; photos under the licences of their Flickr owners (cocodataset.org/#termsofuse)",
)
FLICKR_TERMS = "non-commercial research and education only; photos under Flickr's terms of use"
FLICKR30K = Facts("Flickr30k (Young et al. 2014)", 31_783, 158_915, FLICKR_TERMS)
FLICKR30K_SPLIT = Facts("Flickr30k (Young et al. 2014), Karpathy's split", 31_014, 155_070, FLICKR_TERMS)
FLICKR8K = Facts("Flickr8k (Hodosh et al. 2013)", 8_000, 40_000, FLICKR_TERMS)


def find_file(root: Path, *names: str) -> Path | None:
    """The first file with one of these names in the folder, `annotations/` or `karpathy/`; `root` may also be the file.

    Raises:
        UserError: it is a link that leads out of the folder.
    """
    if root.is_file():
        return root if root.name in names else None
    places = ("", "annotations", "karpathy")
    file = next((root / place / name for name in names for place in places if (root / place / name).is_file()), None)
    if file:
        check_below(file, root)
    return file


def no_files(root: Path, *forms: str) -> UserError:
    """The error for missing files, which lists the files looked for."""
    what = "none of this set's files is here"
    return UserError(root, what, f"Looked for {', '.join(forms)}", ExitCode.MISSING_INPUT)


def open_coco(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """dataset_coco.json, else annotations/captions_{train,val}20{14,17}.json."""
    root = Path(raw)
    folder = root if root.is_dir() else root.parent
    if file := find_file(root, "dataset_coco.json"):
        return CaptionSet(folder, COCO, lambda: captions.karpathy(file, "coco"))
    for year in ("2014", "2017"):
        files = [find_file(root, f"captions_{part}{year}.json") for part in ("train", "val")]
        # one of the two parts is enough
        if there := [file for file in files if file]:
            return CaptionSet(folder, COCO, lambda: captions.official(there))
    raise no_files(root, "dataset_coco.json", "annotations/captions_{train,val}{2014,2017}.json")


def open_flickr30k(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """Karpathy's JSON, the hub's csv, the token file, Kaggle's results.csv, or the sentences of Flickr30k Entities."""
    forms: Forms = {
        "dataset_flickr30k.json": (FLICKR30K_SPLIT, _karpathy),
        "flickr_annotations_30k.csv": (FLICKR30K_SPLIT, captions.hub_csv),
        "results_20130124.token": (FLICKR30K, captions.token),
        "results.csv": (FLICKR30K, captions.hub_csv),
        "sentences": (FLICKR30K, captions.entities),
    }
    return _open_flickr(Path(raw), forms)


def open_flickr8k(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """Karpathy's JSON, or Flickr8k.token.txt."""
    forms: Forms = {"dataset_flickr8k.json": (FLICKR8K, _karpathy), "Flickr8k.token.txt": (FLICKR8K, captions.token)}
    return _open_flickr(Path(raw), forms)


Reader = Callable[[Path, Callable[[str], str]], Iterator[CaptionRow | BadRow]]
Forms = dict[str, tuple[Facts, Reader]]


def _karpathy(file: Path, _: Callable[[str], str]) -> Iterator[CaptionRow | BadRow]:
    return captions.karpathy(file, "flickr")


def _open_flickr(root: Path, forms: Forms) -> RawSet:
    folder = root if root.is_dir() else root.parent
    # the first form present, Karpathy's before all others
    for name, (facts, read) in forms.items():
        # `sentences` is a folder, `Sentences` in the authors' archive; all others are files
        directory = next((root / each for each in (name, name.capitalize()) if (root / each).is_dir()), None)
        file = directory or find_file(root, name)
        if file:
            check_below(file, folder)
            return CaptionSet(folder, facts, partial(_read, read, file, folder))
    raise no_files(root, *forms)


def _read(read: Reader, file: Path, folder: Path) -> Iterator[CaptionRow | BadRow]:
    return read(file, captions.split_lists(folder))
