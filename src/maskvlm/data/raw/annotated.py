"""Sets whose examples the tasks read from their own files: reads only their images, and finds their annotation files.

Images are identified by the same rules as in `tasks/*/data.py`, so that an id or a name means the same there.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from maskvlm.data.files import (
    family_of,
    get,
    get_name,
    image_folder,
    image_names,
    images_by_number,
    json_lines,
    load_json,
    opened,
)
from maskvlm.data.raw.base import BadRow, Facts, RawRow, RawSet
from maskvlm.data.raw.coco_flickr import no_files
from maskvlm.data.raw.columns import not_looked_at
from maskvlm.data.raw.genome import IMAGE_DATA, check_image_data, genome_files, genome_photo_id, read_coco_ids
from maskvlm.data.raw.lines import json_items, one_line
from maskvlm.data.safe_open import check_below

SPLIT = "pictures"

# VQA v2 (Goyal et al. 2017) is on COCO's 82,783 + 40,504 + 81,434 images; SNLI-VE (Xie et al. 2019) has 29,783 +
# 1,000 + 1,000 of Flickr30k's; DAQUAR (Malinowski and Fritz 2014) has NYU-Depth v2's 1,449. NLVR2 (Suhr et al. 2019)
# publishes the number of examples (107,292), not of photos.
VQAV2 = Facts(
    *("VQA v2 (Goyal et al. 2017)", 204_721, None),
    "questions and answers CC BY 4.0; photos under the licences of their Flickr owners",
)
DAQUAR = Facts("DAQUAR (Malinowski and Fritz 2014)", 1_449, None, "research only")
NLVR2 = Facts(
    *("NLVR2 (Suhr et al. 2019)", None, None),
    "sentences CC BY 4.0; photos belong to their owners, for research only",
)
NLVR_PAIRS = Facts("NLVR in NLVR2's layout (Suhr et al. 2017)", None, None, "CC BY 4.0")
SNLI_VE = Facts(
    *("SNLI-VE (Xie et al. 2019)", 31_783, None),
    "sentences CC BY-SA 4.0; photos under Flickr's terms of use, non-commercial research and education only",
)


class Wanted(NamedTuple):
    """Ids of the images used by the examples of a file, and the image file for each id."""

    file: Path
    ids: list[str]
    images: dict[str, str]


class Annotated(RawSet):
    """The images referred to by the annotation files, each once, with the names under which tasks look for them.

    `name` is relative to `images/` in the raw folder, or to the raw folder if there is no `images/`.

    Args:
        annotations: the set's annotation files.
        wanted: returns the files that refer to images, given the names of all images.
    """

    def __init__(
        self, root: Path, facts: Facts, annotations: list[Path], wanted: Callable[[list[str]], Iterator[Wanted]]
    ) -> None:
        self.root, self.facts, self.annotations, self.notes = root, facts, annotations, []
        self._wanted = wanted

    def rows(self) -> Iterator[RawRow | BadRow]:
        """Rows of one file after the other; a missing image is a bad row.

        Raises:
            UserError: an annotation file is damaged, or there is no image at all.
        """
        # the user gave RAW, so the error names it
        folder = image_folder(None, self.root, "RAW")
        left_out: dict[str, list[str]] = {}
        names, seen_ids, stored_ids, named = image_names(folder, left_out), set[str](), set[str](), set[str]()
        yield from not_looked_at(left_out, folder, SPLIT)
        for file, ids, images in self._wanted(names):
            # each once, in the order of the file
            for image_id in dict.fromkeys(ids):
                name, origin = images.get(image_id), f"{file.name} ({image_id})"
                if name is None and image_id not in seen_ids:
                    yield BadRow("missing image", origin, f"no image {image_id!r} in {one_line(folder)}", SPLIT)
                # Two ids may refer to the same file, which then keeps its first id; a COCO photo may also be there as
                # a Visual Genome photo.
                elif name is not None and name not in named and image_id not in stored_ids:
                    named.add(name)
                    stored_ids.add(image_id)
                    yield RawRow(str(folder / name), (), image_id, SPLIT, one_line(name), name)
                seen_ids.add(image_id)
        self.notes = [f"{len(names) - len(named):,} images in {folder.name}/ are in no example and left out"]


# ------------------------------------------------------------------ VQA


def open_vqav2(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """v2_OpenEnded_*_questions.json with v2_*_annotations.json; optionally Visual Genome's question_answers.json with
    image_data.json."""
    return _open_vqa(Path(raw), VQAV2)


def open_daquar(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """DAQUAR in VQA v2's layout."""
    return _open_vqa(Path(raw), DAQUAR)


def _open_vqa(root: Path, facts: Facts) -> RawSet:
    questions = _files(root, "*questions.json")
    answers = _files(root, "*annotations.json")
    genome = _files(root, "question_answers.json")
    if not questions:
        raise no_files(root, "v2_OpenEnded_*_questions.json", "v2_*_annotations.json")

    def wanted(names: list[str]) -> Iterator[Wanted]:
        for file in questions:
            with opened(file) as stream:
                document = load_json(stream.read(), file)
            # each file of questions belongs to a split, which determines the folder of its images
            records = get(document, "questions", list, str(file), "VQA v2")
            # v2_OpenEnded_mscoco_train2014_questions.json -> mscoco_train2014
            part = re.sub(r"^v2_OpenEnded_|_?questions\.json$", "", file.name) or str(document.get("data_type"))
            # prefix of the ids
            family = family_of(part)
            places = ((f"{file} questions[{place}]", each) for place, each in enumerate(records))
            # the same ids as in `tasks/vqa/data.py`
            ids = [f"{family} {get(each, 'image_id', int, where, 'VQA v2')}" for where, each in places]
            yield Wanted(file, ids, images_by_number(names, part))
        for file in genome:
            # Visual Genome's questions: a list too large to be read at once
            coco_ids = read_coco_ids(file.with_name(IMAGE_DATA))
            numbers = (get(each, "id", int, str(file), "Visual Genome") for each in json_items(file))
            ids = [genome_photo_id(number, coco_ids) for number in numbers]
            yield Wanted(file, ids, genome_files(names, coco_ids))

    image_data = [file.with_name(IMAGE_DATA) for file in genome]
    for file in image_data:
        check_image_data(file)
    return Annotated(root, facts, [*questions, *answers, *genome, *image_data], wanted)


# ------------------------------------------------------------------ NLVR2, SNLI-VE


def open_nlvr2(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """train.json, dev.json, test1.json ...: lines with an identifier."""
    return _open_nlvr(Path(raw), NLVR2)


def open_nlvr_pairs(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """NLVR's three boxes as pairs, in NLVR2's layout."""
    return _open_nlvr(Path(raw), NLVR_PAIRS)


def _open_nlvr(root: Path, facts: Facts) -> RawSet:
    files = _with_key(root, "identifier")
    if not files:
        raise no_files(root, "train.json", "dev.json", "test1.json")

    def wanted(names: list[str]) -> Iterator[Wanted]:
        images = {f"nlvr2 {PurePosixPath(name).stem}": name for name in reversed(names)}
        for file in files:
            ids = []
            for where, _, record in json_lines(file):
                # dev-850-0-0 -> dev-850-0: the last number identifies the sentence
                stem = get_name(record, "identifier", where, "NLVR2").rpartition("-")[0]
                # left and right photo
                ids += [f"nlvr2 {stem}-img{side}" for side in (0, 1)]
            yield Wanted(file, ids, images)

    return Annotated(root, facts, files, wanted)


def open_snli_ve(raw: str, name: str, columns: dict[str, str]) -> RawSet:
    """snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl: lines with Flickr30K_ID; any csv is copied too."""
    root = Path(raw)
    files = _with_key(root, "Flickr30K_ID")
    if not files:
        raise no_files(root, "snli_ve_train.jsonl", "snli_ve_dev.jsonl", "snli_ve_test.jsonl")

    def wanted(names: list[str]) -> Iterator[Wanted]:
        images: dict[str, str] = {}
        # plain numbers first: Flickr30k's own names
        for name in sorted(names, key=lambda name: (not PurePosixPath(name).stem.isdigit(), name)):
            if number := re.match(r"\d+", PurePosixPath(name).name):
                images.setdefault(f"flickr {number[0]}", name)
        for file in files:
            lines = json_lines(file)
            ids = [f"flickr {get_name(each.record, 'Flickr30K_ID', each.where, 'SNLI-VE')}" for each in lines]
            yield Wanted(file, ids, images)

    return Annotated(root, SNLI_VE, [*files, *_files(root, "*.csv")], wanted)


def _files(root: Path, *kinds: str) -> list[Path]:
    """Files of a folder by name pattern. Raises UserError if one is a link that leads out of it."""
    files = sorted(file for kind in kinds for file in root.glob(kind) if file.is_file())
    for file in files:
        check_below(file, root)
    return files


def _with_key(root: Path, key: str) -> list[Path]:
    """The JSON lines files in a folder whose first line contains the key."""
    files = _files(root, "*.json", "*.jsonl")
    matches = []
    for file in files:
        with opened(file) as stream:
            # without parsing, which the task's reader does
            if f'"{key}"'.encode() in stream.readline(100_000):
                matches.append(file)
    return matches
