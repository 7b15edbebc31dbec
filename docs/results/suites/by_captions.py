"""A folder of classes out of Flickr8k's validation photos: `python by_captions.py FLICKR8K FOLDER`.

A photo is of a class if three of its five captions have one of the class's words, and none of them a word of another
class. So the labels are what people wrote, not what somebody looked for; photos of no class, or of two, are left out.
"""

import json
import shutil
import sys
from pathlib import Path

WORDS = {
    "dog": "dog dogs puppy puppies",
    "bicycle": "bicycle bicycles bike bikes bicyclist bicyclists biker bikers cyclist cyclists",
    "skateboard": "skateboard skateboards skateboarder skateboarders skateboarding",
    "snowboard": "snowboard snowboarder snowboarders snowboarding",
    "football_player": "football",
    "soccer_player": "soccer",
    "basketball_player": "basketball",
    "climber": "climber climbers climbing climbs",
    "swimming_pool": "pool pools",
    "beach": "beach shore",
    "horse": "horse horses",
    "surfer": "surfer surfers surfing surfboard",
}


def main(raw: Path, out: Path) -> None:
    """Copy the photos that are of one class."""
    for image in json.loads((raw / "dataset_flickr8k.json").read_text())["images"]:
        captions = [set(sentence["raw"].lower().split()) for sentence in image["sentences"]]
        counts = {name: sum(bool(each & {*words.split()}) for each in captions) for name, words in WORDS.items()}
        named = [name for name, count in counts.items() if count]
        if image["split"] == "val" and len(named) == 1 and counts[named[0]] >= 3:
            (out / named[0]).mkdir(parents=True, exist_ok=True)
            shutil.copy(raw / "images" / image["filename"], out / named[0])


main(Path(sys.argv[1]), Path(sys.argv[2]))
