"""Whether the painter knows which colour belongs to which place: held-out scenes of two things of different colours,
told in full, the cells of both things masked.

One colour word of the caption is replaced by another colour. Printed is how much the paint changes in the cell of the
thing whose word it is, and in the cell of the other thing, where nothing should change (root mean square over the
pixels of the cells, of 255), beside the change of the images themselves.

.venv/bin/python docs/results/scenes/colours.py checkpoints/RUN/last.ckpt [--scenes 300]
"""

import argparse
import random
import re
from dataclasses import replace

import numpy as np
from PIL import Image

from maskvlm import MaskVLM
from maskvlm.data.scenes.captions import Mention, tell_all
from maskvlm.data.scenes.drawing import draw_scene
from maskvlm.data.scenes.source import Scenes
from maskvlm.data.scenes.world import COLOURS, Scene, Thing


def thing_of(mention: Mention, scene: Scene) -> Thing:
    """The thing that is meant: `tell_all` names its place."""
    return next(thing for thing in scene.things if mention.fits(thing))


def cell_of(image: Image.Image, cell: int, size: int) -> np.ndarray:
    """The pixels of one of the nine cells, of an image resized to `size`."""
    side, (row, column) = size // 3, divmod(cell, 3)
    rgb_HW3 = np.asarray(image.convert("RGB").resize((size, size)), float)
    return rgb_HW3[row * side : (row + 1) * side, column * side : (column + 1) * side]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--scenes", type=int, default=300)
    options = parser.parse_args()
    model = MaskVLM.from_pretrained(options.checkpoint)
    pairs = Scenes(val=10 * options.scenes).split("val")
    squares: dict[str, list[float]] = {"own": [], "other": [], "true": []}
    count = 0
    for index in range(len(pairs)):
        scene, rng = pairs.scene(index), random.Random(index)
        if len({thing.colour for thing in scene.things}) != 2 or len(scene.things) != 2 or count == options.scenes:
            continue
        count += 1
        whole = tell_all(scene, rng)
        first, second = (thing_of(mention, scene) for mention in whole.statement.mentions)
        # The first colour word is that of the first thing that is told.
        colour = rng.choice([each for each in COLOURS if each not in (first.colour, second.colour)])
        other_text = re.sub(rf"\b{first.colour}\b", colour, whole.text, count=1)
        mask_RC = np.zeros((3, 3), bool)
        mask_RC.flat[[first.cell, second.cell]] = True
        image = draw_scene(scene, pairs.size)
        recoloured = draw_scene(replace(scene, things=(replace(first, colour=colour), second)), pairs.size)
        before, after = (model.reconstruct(image, mask_RC, text) for text in (whole.text, other_text))
        for name, cell, pair in (
            ("own", first.cell, (before, after)),
            ("other", second.cell, (before, after)),
            ("true", first.cell, (image, recoloured)),
        ):
            one, two = (cell_of(each, cell, pairs.size) for each in pair)
            squares[name].append(float(((two - one) ** 2).mean()))
    own, other, true = (np.mean(squares[name]) ** 0.5 for name in ("own", "other", "true"))
    print(
        f"{count} scenes: {own:.1f} where the colour changed, {other:.1f} at the other thing; at best {true:.1f} and 0"
    )


if __name__ == "__main__":
    main()
