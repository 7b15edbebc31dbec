"""What a baseline that sees by construction finds in NLVR's drawings: counted shapes, in kernel ridge regression.

    DATA_ROOT=/data PYTHONPATH=. .venv/bin/python docs/results/downstream/counts.py checkpoints/RUN/best.ckpt

The checkpoint reads the sentences alone. Of each of the three boxes the yellow, blue and black shapes are found as
connected pixels: how many, how many squares, circles and triangles, how many at the wall, their area, the largest, the
highest; and of all boxes sum, largest, smallest, and in how many it is more than 0. The regression is that of
`probe.py`, its choices by folds of the sentences.

Shapes: C colours, H and W pixels, N examples, F numbers of an example.
"""

import sys
from typing import Any

import numpy as np
import torch
from probe import SOURCES, Rows, choose, grams, right
from rich.progress import track
from scipy import ndimage
from torch import Tensor

from maskvlm import MaskVLM
from maskvlm.data.images import safe_open
from maskvlm.inference.embeddings import text_features

COLOURS = torch.tensor([[255, 255, 0], [0, 153, 255], [0, 0, 0]])  # yellow, blue, black
NEAR = 150  # sum of the differences in red, green and blue
SIDE = 100  # a box in pixels
LEFT_EDGES = ((0, 0), (0, 150), (1, 0))  # image and left edge of each box
LEAST = 15  # pixels of a shape; fewer are the blur at its edge
# Share of its bounding box that it fills at least: 1 and 0.79. A triangle fills half of it, a small one up to 0.69.
SQUARE, CIRCLE = 0.9, 0.7


def counted(box_HW3: Tensor) -> Tensor:
    """Of each colour in a box: shapes, squares, circles, triangles, shapes at the wall, area, largest area, height of
    the highest, [C, 8]."""
    there_CHW = ((box_HW3 - COLOURS[:, None, None]).abs().sum(-1) < NEAR).numpy()
    last = there_CHW.shape[-1] - 1
    number_C8 = torch.zeros(len(COLOURS), 8)
    for number_8, there_HW in zip(number_C8, there_CHW, strict=True):
        number_HW = ndimage.label(there_HW)[0]  # connected pixels are one shape
        for number, (rows, columns) in enumerate(ndimage.find_objects(number_HW), 1):
            area = int((number_HW[rows, columns] == number).sum())
            if area < LEAST:
                continue
            high, wide = rows.stop - rows.start, columns.stop - columns.start
            filled = area / (high * wide)
            number_8[0] += 1
            if filled >= SQUARE:
                number_8[1] += max(1, round(max(high, wide) / min(high, wide)))  # a tower of one colour is one shape
            else:
                number_8[2 if filled >= CIRCLE else 3] += 1
            number_8[4] += 0 in (rows.start, columns.start) or last in (rows.stop - 1, columns.stop - 1)
            number_8[5] += area / 1000
            number_8[6] = max(float(number_8[6]), area / 1000)
            number_8[7] = max(float(number_8[7]), 1 - rows.start / last)
    return number_C8


def numbers(images: list[Any]) -> Tensor:
    """All that is told of the boxes of an example, [F]."""
    pixels = [torch.from_numpy(np.array(safe_open(image, "a drawing"))).long() for image in images]
    boxes = [pixels[place][:SIDE, left : left + SIDE] for place, left in LEFT_EDGES]
    of_colour = torch.stack([counted(box) for box in boxes])  # [boxes, C, 8]
    each = torch.cat([of_colour, of_colour.sum(1, keepdim=True)], 1)
    among = [each.sum(0), each.amax(0), each.amin(0), (each > 0).float().sum(0)]
    return torch.cat([each.flatten(), *(part.flatten() for part in among)])


def read(model: Any, split: Any, name: str) -> Rows:
    """The sentences' vectors as `probe.py` has them, and the counts in the place of the photo's."""
    examples = [split[number] for number in range(len(split))]
    by_image: dict[str, Tensor] = {}
    for each in track(examples, description=name):
        if each["image_ids"][0] not in by_image:
            by_image[each["image_ids"][0]] = numbers(each["images"])
    text_NTD = text_features(model, [each["text"] for each in examples])
    text_NF = torch.stack([torch.cat([text_TD[0], text_TD.mean(0)]) for text_TD in text_NTD])
    place = {group: number for number, group in enumerate(dict.fromkeys(each["group"] for each in examples))}
    return Rows(
        text_NF,
        torch.stack([by_image[each["image_ids"][0]] for each in examples]),
        torch.zeros(len(examples), 0),
        [each["answers"][0] for each in examples],
        np.array([place[each["group"]] for each in examples]),
    )


@torch.no_grad()
def main(checkpoint: str) -> None:
    """Print both accuracies and their difference."""
    model: Any = MaskVLM.from_pretrained(checkpoint)
    source = SOURCES["nlvr_pairs"]()
    train, val = (read(model, source.split(name), name) for name in ("train", "val"))
    scores = []
    for way in ("text", "text and photo"):
        grams_KK, grams_NK = grams(way, train, train), grams(way, val, train)
        width, penalty = choose(grams_KK, train)
        scores.append(100.0 * right(grams_NK[width], grams_KK[width], penalty, val.answers, train.answers))
        print(f"{way.replace('photo', 'counts')}: {scores[-1].mean():.1f}", flush=True)
    difference = scores[1] - scores[0]
    half = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
    print(f"{difference.mean():+.1f} ({difference.mean() - half:+.1f} to {difference.mean() + half:+.1f})")


if __name__ == "__main__":
    main(sys.argv[1])
