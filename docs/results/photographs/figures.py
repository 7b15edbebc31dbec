"""Draws what a model of photographs does with five that may be shared (`src/maskvlm/demo/photos`).

Patches filled in from a true and from another caption, words filled in with the photo and without, where it looks.

.venv/bin/python docs/results/photographs/figures.py checkpoints/RUN/best.ckpt docs/results/photographs/verbs.jpg
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import maskvlm.demo
from maskvlm import MaskVLM

PHOTOS = Path(maskvlm.demo.__file__).parent / "photos"
MASKED = {"coffee": "cup", "chelsea": "cat", "astronaut": "woman", "camera": "man", "rocket": "rocket"}
"""Photo -> the word of its first caption that is masked, and looked for."""
SIDE = 224  # pixels


def boxed(grid: tuple[int, int], box: list[float]) -> Any:
    """The patches, [rows, columns], whose middle lies in a box of shares: left, top, right, bottom."""
    rows, columns = ((np.arange(count) + 0.5) / count for count in grid)
    left, top, right, bottom = box
    return ((rows > top) & (rows < bottom))[:, None] & ((columns > left) & (columns < right))[None]


def covered(photo: Image.Image, mask_RC: Any) -> Image.Image:
    """The photo with its masked patches grey."""
    grey = Image.fromarray(mask_RC).resize(photo.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", photo.size, (128, 128, 128)), photo, grey.convert("L"))


def words(model: Any, photo: Image.Image | None, text: str) -> str:
    """The three likeliest words, with their probabilities."""
    photo = photo or Image.new("RGB", (SIDE, SIDE), tuple(round(255 * mean) for mean in model.backbone.image.mean))
    guesses: Any = model.fill_mask(photo, text, 3)[0]
    return ",  ".join(f"{guess.word} {guess.probability:.2f}" for guess in guesses)


def main(checkpoint: str, out: str) -> None:
    """Draw the page."""
    model: Any = MaskVLM.from_pretrained(checkpoint)
    facts: dict[str, Any] = yaml.safe_load((PHOTOS / "photos.yaml").read_text())
    titles = ("photo", "covered", "filled in from the caption", "from another caption", "where it looks")
    figure, axes = plt.subplots(len(facts), len(titles), figsize=(14, 3.3 * len(facts)), layout="constrained")
    for number, (name, entry) in enumerate(facts.items()):
        photo = Image.open(PHOTOS / name).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        text, word = entry["captions"][0], MASKED[Path(name).stem]
        masked, mask = text.replace(word, "[MASK]", 1), boxed(model.grid, entry["box"])
        pictures = (
            photo,
            covered(photo, mask),
            model.inpaint(photo, mask, text),
            model.inpaint(photo, mask, entry["other"]),
            model.explain(photo, text, word).image,
        )
        with_photo, without = words(model, photo, masked), words(model, None, masked)
        under = (f"{masked}\n{with_photo}\nwithout photo: {without}", "", text, entry["other"], f"for '{word}'")
        for axis, title, image, line in zip(axes[number], titles, pictures, under, strict=True):
            axis.imshow(image)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(line, fontsize=7, wrap=True)
            if number == 0:
                axis.set_title(title, fontsize=10)
    figure.savefig(out, dpi=64)


if __name__ == "__main__":
    main(*sys.argv[1:])
