"""Visual Genome (Krishna et al. 2017, visualgenome.org): region descriptions of an image as its captions."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from maskvlm.data.files import get
from maskvlm.data.raw.base import BadRow, Facts, RawRow, RawSet
from maskvlm.data.raw.coco_flickr import find_file, no_files
from maskvlm.data.raw.lines import json_items, one_line
from maskvlm.data.raw.photos import PhotoIndex
from maskvlm.utils.errors import ExitCode, UserError

LAYOUT = "Visual Genome"
IMAGE_DATA = "image_data.json"
# The whole set; the paper's 4-M mix is ALBEF's (Li et al. 2021, table in the appendix), with 100 K images and 769 K
# phrases of it.
FACTS = Facts("Visual Genome (Krishna et al. 2017)", 108_077, 5_408_689, "CC BY 4.0; photos are of COCO and YFCC100M")


class Genome(RawSet):
    """region_descriptions.json with image_data.json; images are `<image_id>.jpg` in VG_100K, VG_100K_2 or elsewhere.

    An image that is also in COCO has its COCO id, so that leaks are found by id. All images are for training, as the
    set has no splits.
    """

    facts = FACTS

    def __init__(self, root: Path, regions: Path, images: Path) -> None:
        self.root, self.regions, self.images, self.notes = root, regions, images, []

    def rows(self) -> Iterator[RawRow | BadRow]:
        """Rows in the order of region_descriptions.json."""
        coco_ids = read_coco_ids(self.images)
        self.notes = [f"{len(coco_ids):,} of its images are COCO's, too, and have their ids there"]
        index = PhotoIndex(self.root)
        for position, entry in enumerate(json_items(self.regions)):
            where = f"{self.regions.name} [{position}]"
            try:
                number = get(entry, "id", int, where, LAYOUT)
                regions = get(entry, "regions", list, where, LAYOUT)
                phrases = tuple(get(region, "phrase", str, where, LAYOUT) for region in regions)
            except UserError as error:
                yield BadRow("malformed row", where, error.what, "train")
                continue
            # by number only, as the images are in two folders
            path, origin = index.find(str(number)), f"{where} ({number}.jpg)"
            if path is None:
                yield BadRow("missing image", origin, f"{number}.jpg was not found in {one_line(self.root)}", "train")
            elif not phrases:
                yield BadRow("no caption", origin, "no region of this image is described", "train")
            else:
                yield RawRow(path, phrases, genome_photo_id(number, coco_ids), "train", origin)


def check_image_data(file: Path) -> None:
    """Raise UserError if `image_data.json` is missing: without it, images used to evaluate COCO's tasks could not be
    recognised."""
    if not file.is_file():
        what = f"{file.name} is missing: only this file says which images are also COCO's"
        raise UserError(file.parent, what, "Fetch it from visualgenome.org and put it here", ExitCode.MISSING_INPUT)


def read_coco_ids(file: Path) -> dict[int, int]:
    """Number of an image -> its number in COCO, for images that are also in COCO.

    Args:
        file: `image_data.json`.

    Raises:
        UserError: as `check_image_data`, or the file is damaged.
    """
    check_image_data(file)
    coco_ids: dict[int, int] = {}
    for position, record in enumerate(json_items(file)):
        where = f"{file} [{position}]"
        number, coco = get(record, "image_id", int, where, LAYOUT), _number(record.get("coco_id"))
        if coco is not None:
            coco_ids[number] = coco
    return coco_ids


def genome_photo_id(number: int, coco_ids: Mapping[int, int]) -> str:
    """The id of an image in all sets: its COCO id if it has one, so that images used for evaluation are found."""
    return f"coco {coco_ids[number]}" if number in coco_ids else f"vg {number}"


def genome_files(names: Iterable[str], coco_ids: Mapping[int, int]) -> dict[str, str]:
    """Id -> name of `<image_id>.jpg` among these names; of two files of one image the first is kept."""
    files: dict[str, str] = {}
    for name in names:
        stem = PurePosixPath(name).stem
        if stem.isdecimal() and not stem.startswith("0"):  # COCO's own names are padded with zeros
            files.setdefault(genome_photo_id(int(stem), coco_ids), name)
    return files


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def open_genome(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """Both files are required: without image_data.json, COCO's images could not be recognised."""
    root = Path(raw)
    regions, images = find_file(root, "region_descriptions.json"), find_file(root, IMAGE_DATA) or root / IMAGE_DATA
    if regions is None:
        raise no_files(root, "region_descriptions.json")
    check_image_data(images)
    return Genome(root, regions, images)
