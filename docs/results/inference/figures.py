"""Draws what a model of the built-in world does: words filled in, patches filled in from two captions, where it looks.

.venv/bin/python docs/results/inference/figures.py scenes-tiny docs/results/inference/verbs.png
"""

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from maskvlm import MaskVLM
from maskvlm.data.scenes.captions import SENTENCES, mention
from maskvlm.data.scenes.drawing import draw_scene
from maskvlm.data.scenes.source import Scenes
from maskvlm.data.scenes.world import COLOURS, Scene, Thing, choose

LARGE = 240  # pixels, as shown


def sentence(things: list[Thing], background: str) -> str:
    """All of the things in one sentence."""
    mentions = [mention(thing, "place") for thing in things]
    style = SENTENCES
    return style.listed([f"{style.noun(m)} {style.place(str(m.place))}" for m in mentions]) + f" on {background}"


def recoloured(scene: Scene, rng: random.Random) -> Scene:
    """The first thing in another colour."""
    first, *rest = scene.things
    others = [colour for colour in COLOURS if colour != first.colour]
    return Scene(scene.background, (replace(first, colour=choose(rng, others)), *rest))


def covered(image: Image.Image, mask_RC: Any) -> Image.Image:
    """The image with its masked patches grey."""
    array = np.asarray(image).copy()
    side = array.shape[0] // mask_RC.shape[0]
    array[np.kron(mask_RC, np.ones((side, side), bool))] = 128
    return Image.fromarray(array)


def main(checkpoint: str, out: str) -> None:
    """Draw the page."""
    model = MaskVLM.from_pretrained(checkpoint)
    pairs = Scenes(val=500).split("val")
    rows = [index for index in range(500) if len(pairs.scene(index).things) == 2][:3]
    titles = ("image", "covered", "filled in from the caption", "the same, another colour said", "where it looks")
    figure, axes = plt.subplots(len(rows), len(titles), figsize=(13, 3.2 * len(rows)), layout="constrained")
    for number, index in enumerate(rows):
        scene, rng = pairs.scene(index), random.Random(index)
        image = draw_scene(scene, pairs.size)
        first = scene.things[0]
        text = sentence(list(scene.things), scene.background)
        other = recoloured(scene, rng)
        mask = np.zeros(model.grid, bool)
        mask[first.row, first.column] = True
        masked = text.replace(first.colour, "[MASK]", 1)
        guesses: Any = model.fill_mask(image, masked, 3)[0]
        looked = model.explain(image.resize((LARGE, LARGE), Image.Resampling.NEAREST), text, first.shape)
        pictures = (
            image,
            covered(image, mask),
            model.reconstruct(image, mask, text),
            model.reconstruct(image, mask, sentence(list(other.things), other.background)),
            looked.image,
        )
        under = (
            f"{masked}\n" + ",  ".join(f"{guess.word} {guess.probability:.2f}" for guess in guesses),
            "",
            text,
            sentence(list(other.things), other.background),
            f"for '{first.shape}'",
        )
        for axis, image, below, title in zip(axes[number], pictures, under, titles, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(wrapped(below), fontsize=8)
            if number == 0:
                axis.set_title(title, fontsize=10)
    figure.savefig(out, dpi=90, bbox_inches="tight")  # titles would be cut at the edge


def wrapped(text: str, width: int = 38) -> str:
    """Lines of at most `width` characters."""
    lines = [""]
    for part in text.split("\n"):
        lines.append("")
        for word in part.split(" "):
            if len(lines[-1]) + len(word) >= width:
                lines.append("")
            lines[-1] += f" {word}"
    return "\n".join(line.strip() for line in lines if line.strip())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    main(sys.argv[1], str(Path(sys.argv[2])))
