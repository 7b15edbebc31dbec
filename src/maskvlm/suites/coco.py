"""Shared code for suites on COCO images: an image's id, and COCO's captions by their ids."""

import re
from typing import NamedTuple

from maskvlm.data.files import get, get_name
from maskvlm.suites.suite import ItemRows, plain_text

LAYOUT = "COCO captions"
CAPTIONS = ("captions_val2014.json", "annotations/captions_val2014.json")


class CocoTexts(NamedTuple):
    """text: caption id -> caption. image: caption id -> image id. name: image id -> file name."""

    text: dict[int, str]
    image: dict[int, int]
    name: dict[int, str]


def coco_id(name: str) -> str:
    """Id of a COCO image from its file name: 000000397133.jpg or COCO_val2014_000000397133.jpg -> coco 397133."""
    digits = re.findall(r"\d+", name)
    return f"coco {int(digits[-1])}" if digits else f"coco {name}"


def read_coco_texts(rows: ItemRows) -> CocoTexts:
    """Read COCO's `captions_val2014.json`, beside the suite's files; bad rows are left out and counted.

    Raises:
        UserError: it is missing or has another format.
    """
    file, content = rows.json_file(*CAPTIONS)
    texts = CocoTexts({}, {}, {})
    for place, record in enumerate(get(content, "images", list, str(file), LAYOUT)):
        where = f"{file} images[{place}]"
        with rows.row():
            texts.name[get(record, "id", int, where, LAYOUT)] = get_name(record, "file_name", where, LAYOUT)
    for place, record in enumerate(get(content, "annotations", list, str(file), LAYOUT)):
        where = f"{file} annotations[{place}]"
        with rows.row():
            number = get(record, "id", int, where, LAYOUT)
            texts.image[number] = get(record, "image_id", int, where, LAYOUT)
            texts.text[number] = plain_text(get(record, "caption", str, where, LAYOUT), "caption", where)
    return texts
