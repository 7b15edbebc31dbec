"""Captions of the built-in world: true by their words alone, short, and each of one image."""

import random
import re
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from maskvlm.data.scenes.captions import describes
from maskvlm.data.scenes.source import Scene, ScenePairs, Scenes, Thing, vocabulary

# ---- a reader of captions that shares nothing with their writer --------------------------------------------
SHAPES = ["circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart"]
COLOURS = ["red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink"]
GROUNDS = ["white", "mint", "grey", "maroon", "navy", "black"]
CELLS = {
    "top left": (0, 0), "top": (0, 1), "top right": (0, 2),
    "left": (1, 0), "middle": (1, 1), "right": (1, 2),
    "bottom left": (2, 0), "bottom": (2, 1), "bottom right": (2, 2),
}  # fmt: skip
SIZES = {"large": "large", "big": "large", "small": "small", "little": "small"}
NOUN = (
    rf"(?:an? )?(?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<pattern>plain|striped|dotted) )?"
    rf"(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
)
PLACE = rf"(?:(?:at|in|on) the )?(?P<place>{'|'.join(sorted(CELLS, key=len, reverse=True))})"
RELATION = re.compile(r"\b(left of|right of|above|over|below|under)\b")
SIDES = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (-1, 0),
    "over": (-1, 0),
    "below": (1, 0),
    "under": (1, 0),
}


def is_so(noun: dict[str, str | None], thing: Thing) -> bool:
    """No word said of the thing is false."""
    place, size = noun.get("place"), noun["size"]
    return (
        noun["shape"] == thing.shape
        and noun["colour"] == thing.colour
        and (size is None or SIZES[size] == thing.size)
        and noun["pattern"] in (None, thing.pattern)
        and (place is None or CELLS[place] == divmod(thing.cell, 3))
    )


def is_related(first: Thing, relation: str, second: Thing) -> bool:
    down, right = SIDES[relation]
    rows, columns = first.cell // 3 - second.cell // 3, first.cell % 3 - second.cell % 3
    return rows * down > 0 or columns * right > 0


def read_nouns(text: str) -> list[dict[str, str | None]]:
    """Every thing that a caption mentions, with its place where one is named."""
    after, before = re.compile(rf"\b{NOUN}(?: {PLACE})?\b"), re.compile(rf"\b{PLACE} (?:is )?{NOUN}")
    pattern = before if before.match(text) else after
    return [match.groupdict() for match in pattern.finditer(text)]


def is_true(text: str, scene: Scene) -> bool:
    """Whether a caption is true of a scene, by its words alone."""
    grounds = [word for word in re.findall("[a-z]+", text) if word in GROUNDS]
    counts = re.findall(r"\b(two|three) (?:shapes|objects|things)", text)
    if any(ground != scene.background for ground in grounds):
        return False
    if any({"two": 2, "three": 3}[count] != len(scene.things) for count in counts):
        return False
    if re.search(r"\b(alone|only)\b", text) and len(scene.things) != 1:
        return False
    nouns, relations = read_nouns(text), RELATION.findall(text)
    if relations:
        nouns = [noun | {"place": None} for noun in nouns]
        assert len(relations) == len(nouns) - 1, text
    return any(
        all(is_so(noun, thing) for noun, thing in zip(nouns, things, strict=True))
        and all(is_related(things[0], *pair) for pair in zip(relations, things[1:], strict=bool(relations)))
        for things in permutations(scene.things, len(nouns))
    )


# ---- captions ----------------------------------------------------------------------------------------------
TOY = Scene(
    "navy",
    (Thing("circle", "red", "large", "plain", 0), Thing("star", "blue", "small", "dotted", 5, dx=2, dy=-1)),
)


@pytest.fixture(scope="module")
def world() -> ScenePairs:
    return Scenes(train=1000).split("train")


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("a large plain red circle top left and a small dotted blue star on the right on navy", True),
        ("a large plain red circle top left and a small dotted blue star on the right on black", False),
        ("a big red circle is to the left of a little blue star", True),
        ("a big red circle is above a little blue star", True),
        ("a little blue star is above a big red circle", False),
        ("a red circle is left of a red circle", False),
        ("top left is a red circle and right is a blue star", True),
        ("right is a red circle and top left is a blue star", False),
        ("three shapes on navy: a red circle and a blue star", False),
        ("a red circle alone on navy", False),
        ("only a red circle at the top left", False),
        ("big plain red circle over little blue star", True),
        ("navy, red circle top left, blue star right", True),
        ("navy, red circle right, blue star top left", False),
    ],
)
def test_the_reader_of_captions_can_tell_true_from_false(text: str, truth: bool) -> None:
    assert is_true(text, TOY) is truth


def test_every_caption_is_true_of_its_image(world: ScenePairs) -> None:
    for index in range(len(world)):
        scene, row = world.scene(index), world[index]
        assert len(set(row["captions"])) == 5
        for caption, (text, statement) in zip(row["captions"], world.captions(index), strict=True):
            assert caption == text
            assert len(read_nouns(text)) == len(statement.mentions) >= min(2, len(scene.things)), text
            assert is_true(text, scene), (text, scene)


def near_miss(scene: Scene, donor: Scene, rng: random.Random) -> Scene:
    """The scene with one thing less or more, or an attribute, a place or the background of another scene."""
    change = rng.choice(["fewer", "more", "background", "colour", "shape", "pattern", "size", "cell"])
    if change == "fewer":
        return Scene(scene.background, scene.things[1:])
    if change == "more":
        free = min(set(range(9)) - {thing.cell for thing in scene.things})
        return Scene(scene.background, (*scene.things, replace(donor.things[0], cell=free)))
    if change == "background":
        return Scene(donor.background, scene.things)
    number, value = rng.randrange(len(scene.things)), getattr(rng.choice(donor.things), change)
    changed = replace(scene.things[number], **{change: value})
    return Scene(scene.background, (*scene.things[:number], changed, *scene.things[number + 1 :]))


def test_describes_agrees_with_the_words_of_the_caption_on_near_misses(world: ScenePairs) -> None:
    """A small change to the scene makes most captions false, and the statement must say so like the words."""
    rng, false = random.Random(0), 0
    for index in range(400):
        scene = world.scene(index)
        near = near_miss(scene, world.scene(index + 400), rng)
        for text, statement in world.captions(index):
            assert describes(statement, scene)
            assert describes(statement, near) is is_true(text, near), (text, near)
            false += not describes(statement, near)
    assert 800 < false < 1600


def test_nearly_every_caption_fits_one_image_only(world: ScenePairs) -> None:
    scenes = [world.scene(index) for index in range(150)]
    fits = [
        sum(describes(caption.statement, scene) for scene in scenes)
        for index in range(150)
        for caption in world.captions(index)
    ]
    assert min(fits) == 1
    assert sum(fit == 1 for fit in fits) / len(fits) > 0.98


def test_captions_are_short_and_stay_within_the_vocabulary(world: ScenePairs) -> None:
    """24 words keep a caption within 26 tokens, commas, start and end included: length costs compute."""
    texts = [text for index in range(len(world)) for text in world[index]["captions"]]
    lengths = [len(re.findall("[a-z]+", text)) for text in texts]
    assert 9 < np.mean(lengths) < 12
    assert max(lengths) <= 24
    assert max(len(re.findall("[a-z]+|[,:]", text)) for text in texts) <= 24
    more = Scenes(train=300, short=2).split("train")
    short = [text for index in range(len(more)) for text in more[index]["captions"][5:]]
    assert sorted({word for text in texts + short for word in re.findall("[a-z]+", text)}) == vocabulary()
    assert all(re.fullmatch("[a-z ,:]+", text) for text in texts)


def test_the_order_of_a_caption_gives_nothing_away(world: ScenePairs) -> None:
    """Of two things, the first one named is the first of the scene half of the time."""
    pairs = [(world.scene(index), world.captions(index)[0].statement) for index in range(len(world))]
    pairs = [(scene, statement) for scene, statement in pairs if len(scene.things) == 2]
    first = sum(statement.mentions[0].place == scene.things[0].place for scene, statement in pairs)
    assert first / len(pairs) == pytest.approx(1 / 2, abs=0.08)
