"""The built-in world in the layouts that suites read: `python world.py FOLDER` writes held-out scenes as

FOLDER/captions/captions.jsonl, images   for `maskvlm suite aro_order --set jsonl`
FOLDER/classes/COLOUR_SHAPE/*.png        scenes of one thing, for `zeroshot`
FOLDER/entities/Sentences, Annotations   captions with the boxes of the things they name, for `pointing`
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

from maskvlm.data.scenes.drawing import corner_of, draw_scene, stamp_of
from maskvlm.data.scenes.source import Scenes
from maskvlm.data.scenes.world import Scene, Thing

SIZE = 48


def box_of(thing: Thing) -> tuple[int, int, int, int]:
    """Left, top, right and bottom pixel, counted from 1."""
    stamp = stamp_of(thing.shape, thing.size, thing.pattern, SIZE).shape
    left, top = corner_of(thing, stamp.width, SIZE)
    row_Y, column_X = np.nonzero(np.asarray(stamp) >= 128)
    x, y = column_X + left, row_Y + top
    return tuple(int(np.clip(each + 1, 1, SIZE)) for each in (x.min(), y.min(), x.max(), y.max()))


def marked(caption: str, scene: Scene) -> str:
    """A caption with `COLOUR SHAPE` of each thing marked where one thing alone has the two."""
    for chain, thing in enumerate(scene.things, 1):
        words = f"{thing.colour} {thing.shape}"
        if sum((one.colour, one.shape) == (thing.colour, thing.shape) for one in scene.things) == 1:
            caption = re.sub(rf"\b{words}\b", f"[/EN#{chain}/thing {words}]", caption)
    return caption


def annotation(name: str, scene: Scene) -> str:
    """As Flickr30k Entities has it."""
    things = "".join(
        f"<object><name>{chain}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>"
        f"<ymax>{box[3]}</ymax></bndbox></object>"
        for chain, box in enumerate(map(box_of, scene.things), 1)
    )
    size = f"<size><width>{SIZE}</width><height>{SIZE}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}.jpg</filename>{size}{things}</annotation>"


def main(root: Path) -> None:
    """Write all three."""
    folders = [root / each for each in ("captions", "entities/images", "entities/Sentences", "entities/Annotations")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    pairs, lines = Scenes(size=SIZE).split("val"), []
    for number in range(len(pairs)):
        row, scene, name = pairs[number], pairs.scene(number), f"{number:04d}"
        row["image"].save(root / "captions" / f"{name}.png")
        row["image"].save(root / "entities" / "images" / f"{name}.png")
        lines += [json.dumps({"image": f"{name}.png", "caption": each, "split": "val"}) for each in row["captions"]]
        sentences = "".join(marked(each, scene) + "\n" for each in row["captions"])
        (root / "entities" / "Sentences" / f"{name}.txt").write_text(sentences)
        (root / "entities" / "Annotations" / f"{name}.xml").write_text(annotation(name, scene))
    (root / "captions" / "captions.jsonl").write_text("\n".join(lines) + "\n")
    many = Scenes(val=3000, size=SIZE).split("val")
    for number in range(len(many)):
        scene = many.scene(number)
        if len(scene.things) == 1:
            folder = root / "classes" / f"{scene.things[0].colour}_{scene.things[0].shape}"
            folder.mkdir(parents=True, exist_ok=True)
            draw_scene(scene, SIZE).save(folder / f"{number:04d}.png")


main(Path(sys.argv[1]))
