"""What a model of the built-in world has understood: captions it writes, texts it prefers, where it looks.

    .venv/bin/python docs/results/inference/measure.py checkpoints/RUN/best.ckpt [--scenes 500] [--out FILE.json]

Held-out scenes. Of each number the chance level is printed beside it.
"""

import argparse
import json
import random
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from maskvlm import MaskVLM
from maskvlm.data.scenes.captions import (
    NOTES,
    SENTENCES,
    Mention,
    Statement,
    describes,
    tell_all,
    tell_background_first,
    tell_relations,
)
from maskvlm.data.scenes.drawing import draw_scene
from maskvlm.data.scenes.source import ScenePairs, Scenes
from maskvlm.data.scenes.world import BACKGROUNDS, COLOURS, PATTERNS, PLACES, SHAPES, Scene

TURNED = {"left": "right", "right": "left", "above": "below", "below": "above", "over": "under", "under": "over"}
SIZES = (*SENTENCES.sizes.values(), *NOTES.sizes.values())
EXCHANGED = {"colours": COLOURS, "shapes": SHAPES, "sizes": SIZES, "patterns": PATTERNS, "places": PLACES}
TRAITS = {
    **{word: ("colour", word) for word in COLOURS},
    **{word: ("pattern", word) for word in PATTERNS},
    **{word: ("size", size) for style in (SENTENCES, NOTES) for size, word in style.sizes.items()},
}
"""Adjective -> attribute and its value."""
PLACE = "|".join(sorted(PLACES, key=len, reverse=True))  # "top left" is neither "top" nor "left"
OBJECT = re.compile(
    rf"(?:\b(?P<before>{PLACE})(?: is an?)? )?"
    rf"(?P<adjectives>(?:\b(?:{'|'.join(TRAITS)}) )*)(?P<shape>{'|'.join(SHAPES)})\b"
    rf"(?: (?:(?:at|on|in) the )?(?P<after>{PLACE})\b(?! of))?"
)
"""An object in a caption, with the place that stands before or after it; "left of" is a relation, not a place."""


def named(text: str) -> list[tuple[str, str]]:
    """(colour, shape) that stand side by side in a text."""
    return [(a, b) for a, b in pairwise(re.findall("[a-z]+", text)) if a in COLOURS and b in SHAPES]


def claims(text: str, places: bool = True) -> Statement:
    """What a caption says of objects that it calls by their shapes; with their places and the background, or without.
    Relations and numbers are not read."""
    mentions = []
    for found in OBJECT.finditer(text):
        traits = dict(TRAITS[word] for word in found["adjectives"].split())
        place = (found["after"] or found["before"]) if places else None
        mentions.append(Mention(shape=found["shape"], place=place, **traits))
    grounds = [word for word in re.findall("[a-z]+", text) if word in BACKGROUNDS]
    return Statement(tuple(mentions), background=grounds[0] if places and grounds else None)


def exchange(text: str, phrases: tuple[str, ...]) -> str | None:
    """The text with the first two of these phrases exchanged; None where there are no two, or they are the same."""
    longest_first = sorted(phrases, key=len, reverse=True)  # "top left" is neither "top" nor "left"
    at = list(re.finditer(rf"\b({'|'.join(longest_first)})\b", text))[:2]
    if len(at) < 2 or at[0][0] == at[1][0]:
        return None
    first, second = at
    return text[: first.start()] + second[0] + text[first.end() : second.start()] + first[0] + text[second.end() :]


def turn(text: str) -> str:
    """The text with its relation turned round: left of, right of."""
    return " ".join(TURNED.get(word, word) for word in text.split(" "))


def change_places(text: str) -> str:
    """The text with the two things around its relation exchanged: "a over b", "b over a"."""
    first, relation, second = re.split(r"( (?:is )?(?:to the )?(?:left of|right of|above|below|over|under) )", text)
    return second + relation + first


class Share(NamedTuple):
    """How often a method is right. chance: in %, None if no chance level is known."""

    method: str
    question: str
    right: int
    of: int
    chance: float | None


def share(method: str, question: str, verdicts: list[bool], chance: float | None) -> Share:
    return Share(method, question, sum(verdicts), len(verdicts), chance)


class Written(NamedTuple):
    """A caption, and whether it is right. one: it names an object with its colour and its shape. names: every colour
    with a shape is there. objects: every object is there, with what it says of colour, size and pattern. all: also
    places and background are right. Nothing is right of a text that names no object."""

    text: str
    one: bool
    names: bool
    objects: bool
    all: bool


def judged(text: str, scene: Scene) -> Written:
    """The caption, compared with the scene."""
    true = {(thing.colour, thing.shape) for thing in scene.things}
    names = [name in true for name in named(text)]
    objects, everything = (
        bool(claim.mentions) and describes(claim, scene) for claim in (claims(text, places=False), claims(text))
    )
    return Written(text, any(names), bool(names) and all(names), objects, everything)


def captions(model: MaskVLM, pairs: ScenePairs, count: int) -> list[Written]:
    """A caption of each scene, judged."""
    scenes = [pairs.scene(index) for index in range(count)]
    texts = model.caption([draw_scene(scene, pairs.size) for scene in scenes])
    return [judged(text, scene) for scene, text in zip(scenes, texts, strict=True)]


def preferred(model: MaskVLM, pairs: ScenePairs, count: int) -> dict[tuple[str, str], list[bool]]:
    """By method and kind of false text: whether `score`, `match` and the cosine prefer the true text over one with two
    things' attributes exchanged, with its relation reversed, or with the things around it exchanged. The built-in
    recipe trains with none of these false texts."""
    questions: dict[str, list[tuple[Any, str, str]]] = {f"its {kind} exchanged": [] for kind in EXCHANGED}
    questions |= {"its relation reversed": [], "the objects around its relation exchanged": []}
    for index in range(count):
        scene, rng = pairs.scene(index), random.Random(index)
        if len(scene.things) < 2:
            continue
        image, whole = draw_scene(scene, pairs.size), tell_all(scene, rng)
        for kind, phrases in EXCHANGED.items():
            other = exchange(whole.text, phrases)
            # Things that are the same but for their places: the text is true with these exchanged as well.
            same = len({replace(mention, place=None) for mention in whole.statement.mentions[:2]}) == 1
            if other is not None and not (kind == "places" and same):
                questions[f"its {kind} exchanged"].append((image, whole.text, other))
        related = tell_relations(scene, rng)
        if len(scene.things) == 2 and related.statement.relations:
            (relation,) = related.statement.relations
            back = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation.name]
            if not describes(Statement(related.statement.mentions, (relation._replace(name=back),)), scene):
                questions["its relation reversed"].append((image, related.text, turn(related.text)))
                false_text = change_places(related.text)  # says the same as the relation turned round
                questions["the objects around its relation exchanged"].append((image, related.text, false_text))
    answers = {}
    for kind, rows in questions.items():
        images, true, false = ([row[place] for row in rows] for place in range(3))
        image_BE = model.encode_image(images)

        def cosine(texts: list[str], image_BE: Tensor = image_BE) -> list[float]:
            return list((image_BE * model.encode_text(texts)).sum(1).tolist())

        ways = {
            "score": (model.score(images, true), model.score(images, false)),
            "match": (model.match(images, true), model.match(images, false)),
            "cosine": (cosine(true), cosine(false)),
        }
        for way, (of_true, of_false) in ways.items():
            answers[way, kind] = [a > b for a, b in zip(of_true, of_false, strict=True)]
    return answers


def mask_last(text: str, words: str) -> str:
    """The text with the last of these words masked, each by itself."""
    at = list(re.finditer(rf"\b{words}\b", text))[-1]
    return text[: at.start()] + " ".join("[MASK]" for _ in words.split()) + text[at.end() :]


def filled(model: MaskVLM, pairs: ScenePairs, count: int) -> dict[str, list[bool]]:
    """Whether colour and place of the last thing that is told are filled in rightly, both masked; scenes of two things
    of different shapes."""
    verdicts: dict[str, list[bool]] = {"colour": [], "place": []}
    for index in range(count):
        scene, rng = pairs.scene(index), random.Random(index)
        if len(scene.things) != 2 or scene.things[0].shape == scene.things[1].shape:
            continue
        caption = tell_background_first(scene, rng)
        last = caption.statement.mentions[-1]
        colour, place = str(last.colour), str(last.place)
        # The place stands behind the colour in this kind of caption.
        masked = mask_last(mask_last(caption.text, place), colour)
        guesses = [one[0].word for one in model.fill_mask(draw_scene(scene, pairs.size), masked, top_k=1)]
        verdicts["colour"].append(guesses[0] == colour)
        verdicts["place"].append(guesses[1:] == place.split())
    return verdicts


def looks(model: MaskVLM, pairs: ScenePairs, count: int) -> dict[str, list[bool]]:
    """Whether the peak of the map for a thing's shape is on the thing: 3 x 3 patches are the world's 3 x 3 cells."""
    verdicts: dict[str, list[bool]] = {"attention": [], "Grad-CAM": []}
    for index in range(count):
        scene, rng = pairs.scene(index), random.Random(index)
        text, image = tell_all(scene, rng).text, draw_scene(scene, pairs.size)
        for thing in scene.things:
            if text.count(thing.shape) != 1:
                continue
            explained = model.explain(image, text, thing.shape)
            for name, map_RC in (("attention", explained.attention), ("Grad-CAM", explained.gradcam)):
                verdicts[name].append(int(map_RC.argmax()) == thing.cell)
    return verdicts


def measured(model: MaskVLM, pairs: ScenePairs, scenes: int, only: list[str]) -> list[Share]:
    """Every share of the methods in `only`; prints the first captions on the way."""
    shares: list[Share] = []
    if "caption" in only:
        written = captions(model, pairs, scenes)
        for each in written[:12]:
            print(f"  {'right' if each.all else 'wrong'}  {each.text}")
        for question, verdicts in {
            "names an object with its colour and its shape": [each.one for each in written],
            "every colour with a shape that it names is there": [each.names for each in written],
            "every object that it names is there, with its colour, size and pattern": [
                each.objects for each in written
            ],
            "the same, and places and background are right (relations not read)": [each.all for each in written],
        }.items():
            shares.append(share("caption", question, verdicts, None))
    if "fill" in only:
        chances = {"colour": 100 / len(COLOURS), "place": 100 / len(PLACES)}
        for name, values in filled(model, pairs, scenes).items():
            question = f"the {name} of one of two objects, with its colour and its place masked"
            shares.append(share("fill", question, values, chances[name]))
    if "score" in only:
        for (method, kind), values in preferred(model, pairs, scenes).items():
            shares.append(share(method, f"the true text before the one with {kind}", values, 50.0))
    if "explain" in only:
        for name, values in looks(model, pairs, scenes).items():
            question = f"the {name} of a masked shape word peaks on the object"
            shares.append(share("explain", question, values, 100 / len(PLACES)))
    return shares


def main() -> None:
    """Measure, print, and write the shares as JSON where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--only", nargs="+", default=["caption", "fill", "score", "explain"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = MaskVLM.from_pretrained(options.checkpoint)
    shares = measured(model, Scenes().split("val"), options.scenes, options.only)
    for one in shares:
        chance = "" if one.chance is None else f" (chance {one.chance:.1f} %)"
        print(f"{one.method}: {one.question}: {100 * one.right / one.of:.1f} % of {one.of}{chance}")
    if options.out:
        found = {"model": options.checkpoint, "step": model.config.step, "scenes": options.scenes}
        options.out.write_text(json.dumps(found | {"shares": [one._asdict() for one in shares]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
