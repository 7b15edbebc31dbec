"""Where a thing is painted when every patch of its image is masked: held-out scenes of one thing, told with its place.

The painted thing is what differs from the painted image's median colour; its centre is the mean position of its
pixels, each weighed by how much it differs. Printed are how often that centre lies in the cell of the nine that the
caption names (chance 11 %), and, of things in the left and right column, how often it lies on the other side of the
image when left and right are exchanged in the caption.

.venv/bin/python docs/results/scenes/places.py checkpoints/RUN/last.ckpt [--scenes 500]
"""

import argparse
import re

import numpy as np
from PIL import Image

from maskvlm import MaskVLM
from maskvlm.data.scenes.source import ScenePairs, Scenes


def centre(image: Image.Image) -> tuple[float, float]:
    """Row and column of what is painted, as shares of the height and the width."""
    rgb_HW3 = np.asarray(image.convert("RGB"), float)
    differs_HW = np.abs(rgb_HW3 - np.median(rgb_HW3, axis=(0, 1))).sum(2)
    # What is nearly the ground everywhere would draw the centre to the middle.
    differs_HW *= differs_HW > differs_HW.max() / 2
    weight = max(differs_HW.sum(), 1e-9)
    row, column = np.indices(differs_HW.shape)
    height, width = differs_HW.shape
    return float((differs_HW * (row + 0.5)).sum() / weight / height), float(
        (differs_HW * (column + 0.5)).sum() / weight / width
    )


def exchanged(text: str) -> str:
    """With left and right in each other's place."""
    return re.sub(r"\b(left|right)\b", lambda word: {"left": "right", "right": "left"}[word[0]], text)


def placed_scenes(pairs: ScenePairs, count: int) -> list[tuple[int, int, str]]:
    """Scene, cell of its one thing, and its longest caption that names the place; at most so many."""
    rows = []
    for index in range(len(pairs)):
        (thing, *others) = pairs.scene(index).things
        captions = [each.text for each in pairs.captions(index) if each.statement.mentions[0].place == thing.place]
        if not others and captions and len(rows) < count:
            rows.append((index, thing.cell, max(captions, key=len)))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--scenes", type=int, default=500)
    options = parser.parse_args()
    model = MaskVLM.from_pretrained(options.checkpoint)
    pairs = Scenes(val=4 * options.scenes).split("val")
    scenes = placed_scenes(pairs, options.scenes)
    images = [pairs[index]["image"] for index, _, _ in scenes]
    every = np.ones(model.grid, bool)
    right, moved = [], []
    for image, (_, cell, text) in zip(images, scenes, strict=True):
        row, column = centre(model.reconstruct(image, every, text))
        right.append(min(int(3 * row), 2) * 3 + min(int(3 * column), 2) == cell)
        if cell % 3 != 1:
            _, other = centre(model.reconstruct(image, every, exchanged(text)))
            # the thing of the left column is now to lie in the right half
            moved.append((other > 0.5) == (cell % 3 == 0))
    print(f"in the right one of nine places: {100 * np.mean(right):.1f} % of {len(right)}")
    print(f"on the other side, left and right exchanged: {100 * np.mean(moved):.1f} % of {len(moved)}")


if __name__ == "__main__":
    main()
