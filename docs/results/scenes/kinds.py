"""Which masked words are right, by what they tell: each word of the held-out captions hidden alone, with the image.

.venv/bin/python docs/results/scenes/kinds.py checkpoints/RUN/last.ckpt [--scenes 500]
"""

import argparse
import re
from collections import defaultdict

from maskvlm import MaskVLM
from maskvlm.data.inputs import MASK
from maskvlm.data.scenes.captions import NOTES, SENTENCES
from maskvlm.data.scenes.source import Scenes
from maskvlm.data.scenes.world import BACKGROUNDS, COLOURS, PATTERNS, SHAPES

KINDS = {"shape": SHAPES, "colour": COLOURS, "pattern": PATTERNS, "background": BACKGROUNDS}
KINDS |= {"size": (*SENTENCES.sizes.values(), *NOTES.sizes.values())}
KINDS |= {"relation": ("above", "below", "over", "under"), "place": ("top", "bottom", "left", "right", "middle")}


def kind_of(word: str, following: str) -> str:
    """What a word tells: "left" is a relation before "of", else a place."""
    if word in ("left", "right") and following.startswith(" of "):
        return "relation"
    return next((kind for kind, words in KINDS.items() if word in words), "other")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--scenes", type=int, default=500)
    options = parser.parse_args()
    model = MaskVLM.from_pretrained(options.checkpoint)
    pairs, right = Scenes().split("val"), defaultdict(list)
    for index in range(options.scenes):
        row = pairs[index]
        masked = [(text, each) for text in row["captions"] for each in re.finditer("[a-z]+", text)]
        texts = [f"{text[: each.start()]}{MASK}{text[each.end() :]}" for text, each in masked]
        guessed = model.fill_mask(row["image"], texts, 1)
        for (text, each), ((guess,),) in zip(masked, guessed, strict=True):
            right[kind_of(each[0], text[each.end() :])].append(guess.word == each[0])
    for kind, values in sorted(right.items(), key=lambda pair: -len(pair[1])):
        print(f"{kind:<12}{100 * sum(values) / len(values):6.1f} % of {len(values)}")


if __name__ == "__main__":
    main()
