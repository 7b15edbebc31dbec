"""Can a model tell unusual images from those of its training data (`objectives.novelty`)? Run this on a checkpoint
before you trust its warnings:

    python bench/familiar.py scenes-tiny --asked RAW/flickr8k/images unseen-scenes
    python bench/familiar.py checkpoints/first/best.ckpt --known RAW/flickr8k/images --asked photos scenes drawings/

A place is a folder of images, `scenes` or `unseen-scenes` (validation and test split of the built-in world), or
`photos` (those of the demo page). Noise and plain colours are always included.

Without `--known`, images are compared with the range stored in the checkpoint, as in `far`. With it, half of those
images are the reference sample, at several thresholds, and the other half is tested: the share of far ones in it is the
rate of false alarms.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from maskvlm import MaskVLM
from maskvlm.data.files import IMAGE_SUFFIXES
from maskvlm.data.scenes.source import Scenes
from maskvlm.demo.samples import PHOTOS
from maskvlm.objectives.novelty import KnownRange, distance_to, fit_range, mean_patch, sample_of
from maskvlm.utils.errors import UserError

SHARES = (0.01, 0.02, 0.05, 0.1)
SCENES = {"scenes": "val", "unseen-scenes": "test"}
"""Places of drawn scenes -> their split. A checkpoint of the built-in world has its range from the first."""


def images(place: str, most: int) -> list[Any]:
    """A random choice of files, always the same, or drawn scenes."""
    if place in SCENES:
        split = Scenes().split(SCENES[place])
        return [split[row]["image"] for row in range(min(len(split), most))]
    folder = PHOTOS if place == "photos" else Path(place)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(place, "holds no image", "Name a folder of images, or scenes, or photos")
    # A fixed seed: the same files at every call.
    chosen = np.random.default_rng(0).permutation(len(files))[:most]
    return [files[number] for number in chosen]


def synthetic_images(kind: str, count: int, side: int) -> list[Image.Image]:
    """Images of noise, or of plain colours."""
    rng = np.random.default_rng(0)
    # Noise in every pixel; a plain colour is a single enlarged pixel.
    shape = (count, side, side, 3) if kind == "noise" else (count, 1, 1, 3)
    return [Image.fromarray(each).resize((side, side)) for each in rng.integers(0, 256, shape, dtype=np.uint8)]


@torch.no_grad()
def features(model: MaskVLM, pictures: list[Any]) -> torch.Tensor:
    """Features of the images by `mean_patch`, [N, D]."""
    parts = (pictures[start : start + 64] for start in range(0, len(pictures), 64))
    return torch.cat([mean_patch(model.backbone.image(model.pixels(part))) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--known", help="images like those it was trained on, not the very same")
    parser.add_argument("--asked", nargs="*", default=["photos", "scenes"])
    parser.add_argument("--most", type=int, default=1000, help="images of a place")
    options = parser.parse_args()
    model = MaskVLM.from_pretrained(options.checkpoint)
    features_by_place = {place: features(model, images(place, options.most)) for place in options.asked}
    features_by_place |= {
        kind: features(model, synthetic_images(kind, 100, model.image_size)) for kind in ("noise", "plain colours")
    }
    if options.known is None:
        if model.known is None:
            raise UserError(options.checkpoint, "does not tell what it knows", "Name images like its own with --known")
        print_shares("the checkpoint's own range", features_by_place, model.known)
        return
    known_ND = features(model, images(options.known, options.most))
    # Odd rows are tested, even rows are the sample: no image is compared with itself.
    features_by_place = {f"{options.known}, others": known_ND[1::2]} | features_by_place
    for share in SHARES:
        known = fit_range(sample_of(known_ND[::2]), share)
        if known is None:
            raise UserError("--known", f"{len(known_ND)} images are too few", "Name a folder with 100 or more")
        print_shares(f"{100 * share:g} % of the sample", features_by_place, known)


def print_shares(title: str, features_by_place: dict[str, torch.Tensor], known: KnownRange) -> None:
    """Print the share of far images for each place. features_by_place: [N, D] for each."""
    print(f"\n{title}: far is beyond {known.most:.3f}")
    for name, feature_ND in features_by_place.items():
        far = 100 * float((distance_to(feature_ND, known) > known.most).float().mean())
        median = float(distance_to(feature_ND, known).median())
        print(f"  {name[-40:]:40} {far:5.1f} % far of {len(feature_ND):4}, median {median:.3f}")


if __name__ == "__main__":
    main()
