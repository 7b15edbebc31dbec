"""Visual Genome (Krishna et al. 2017, visualgenome.org): phrases about regions of an image as its captions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskvlm.data.files import get
from maskvlm.data.raw.base import BadRow, Facts, RawRow, RawSet
from maskvlm.data.raw.coco_flickr import find_file, no_files
from maskvlm.data.raw.lines import json_items, one_line
from maskvlm.data.raw.photos import PhotoIndex
from maskvlm.utils.errors import ExitCode, UserError

LAYOUT = "Visual Genome"
# The whole set; the paper's 4-M mix is ALBEF's (Li et al. 2021, table of the appendix), with 100 K images and 769 K
# phrases of it.
FACTS = Facts("Visual Genome (Krishna et al. 2017)", 108_077, 5_408_689, "CC BY 4.0; photos are of COCO and YFCC100M")


class Genome(RawSet):
    """region_descriptions.json with image_data.json; images are `<image_id>.jpg` in VG_100K, VG_100K_2 or elsewhere.

    An image that is COCO's, too, has its id there, so that a leak is seen by id. All are for training: the set has
    no splits.
    """

    facts = FACTS

    def __init__(self, root: Path, regions: Path, images: Path) -> None:
        self.root, self.regions, self.images, self.notes = root, regions, images, []

    def rows(self) -> Iterator[RawRow | BadRow]:
        """Rows in the order of region_descriptions.json."""
        coco = self._coco_ids()
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
            # by the number alone: the images lie in two folders
            path, origin = index.find(str(number)), f"{where} ({number}.jpg)"
            if path is None:
                yield BadRow("missing image", origin, f"{number}.jpg is nowhere in {one_line(self.root)}", "train")
            elif not phrases:
                yield BadRow("no caption", origin, "no region of this image is described", "train")
            else:
                # COCO's id, so that its test images are found among these
                image_id = f"coco {coco[number]}" if number in coco else f"vg {number}"
                yield RawRow(path, phrases, image_id, "train", origin)

    def _coco_ids(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for position, record in enumerate(json_items(self.images)):
            where = f"{self.images} [{position}]"
            number, coco = get(record, "image_id", int, where, LAYOUT), _number(record.get("coco_id"))
            if coco is not None:
                found[number] = coco
        shared = f"{len(found):,} of its images are COCO's, too, and have their ids there"
        self.notes = [shared]
        return found


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def open_genome(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """Both files are needed: without image_data.json nobody could tell which images are COCO's."""
    root = Path(raw)
    regions, images = find_file(root, "region_descriptions.json"), find_file(root, "image_data.json")
    if regions is None:
        raise no_files(root, "region_descriptions.json")
    if images is None:
        what = "image_data.json is missing: which images are also COCO's stands there alone"
        todo = "Fetch it from visualgenome.org and put it here"
        raise UserError(root, what, todo, ExitCode.MISSING_INPUT)
    return Genome(root, regions, images)
