"""True or false sentences about two scenes of the built-in world; no download needed.

As in NLVR2, each sentence comes with four pairs of images and is true of two of them, so that the sentence alone is
uninformative. So are the images alone: whatever the sentence, each image of a pair about objects shows one object that
is in both pictures and one of which the other picture has a near miss, and the words decide whether the pair is true
or false. False pairs are near misses: one attribute differs, or the number is a neighbouring one.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from maskvlm.data.examples import ExampleSource
from maskvlm.data.scenes.examples import (
    PlannedExample,
    SceneExamples,
    SceneSplits,
    Traits,
    View,
    a_noun,
    first_of_split,
    lots_of,
    names_by_lot,
    near_miss,
    scene_like,
    strangers,
    traits_by_lot,
)
from maskvlm.data.scenes.world import BACKGROUNDS, choose, shuffled

LABELS = ("False", "True")
PAIRS = 4  # per sentence, two true and two false

# Where the mentioned object may be when the sentence is true, and when it is false: the same in both pictures, in one
# with a near miss in the other, or nowhere, with the same near miss in both.
ROLES: dict[str, dict[bool, tuple[str, ...]]] = {
    "left": {True: ("same", "left"), False: ("right", "nowhere")},
    "right": {True: ("same", "right"), False: ("left", "nowhere")},
    "both": {True: ("same",), False: ("left", "right", "nowhere")},
    "one": {True: ("left", "right"), False: ("same", "nowhere")},
    "none": {True: ("nowhere",), False: ("same", "left", "right")},
}
PHRASES = {
    "left": "{} is in the left picture",
    "right": "{} is in the right picture",
    "both": "{} is in both pictures",
    "one": "{} is in only one picture",
    "none": "{} is in no picture",
}
# Two mentioned objects: one has the first role and the other the second. One role shows the same in both pictures.
SIDES: dict[bool, tuple[tuple[str, str], ...]] = {
    True: (("same", "right"), ("left", "same")),
    False: (("same", "left"), ("right", "same"), ("nowhere", "right"), ("left", "nowhere")),
}
GROUNDS = {
    "both": "both pictures are on {}",
    "one": "only one picture is on {}",
    "same": "both pictures are on the same background",
    "differ": "the pictures are not on the same background",
}
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
# Number -> what a false pair has instead. A ring, 2 3 5 4 2: each number is false as often as true.
BESIDE = {2: (3, 4), 3: (2, 5), 4: (2, 5), 5: (3, 4)}
KINDS = (*ROLES, "sides", "background", "count")
SHARES = {"left": 3, "right": 3, "both": 2}
"""Relative frequency of these kinds in training; all others have 1. Some kinds contradict each other ("left" and
"right", "both" and "none"): with all kinds equally frequent, a model was still guessing at the end of its 1,000
steps."""
LOTS = lots_of(KINDS, SHARES)


class Pair(NamedTuple):
    """What each image must show: the objects' traits (others are drawn at random), and its background or None."""

    left: list[Traits]
    right: list[Traits]
    grounds: tuple[str, str] | None = None


class Sentence(NamedTuple):
    """The words, and a function that makes pairs for which they are true or false."""

    text: str
    make: Callable[[random.Random, bool], Pair]


class Slot(NamedTuple):
    """What is in the left and in the right picture, and the colours and shapes that others must not have."""

    left: Traits
    right: Traits
    taken: frozenset[str]


def slot_of(rng: random.Random, role: str, thing: Traits, taken: frozenset[str] = frozenset()) -> Slot:
    """The mentioned object, or a near miss of it, in each image, according to the role (see ROLES)."""
    near = near_miss(rng, thing, taken)
    # Every picture shows the object or its near miss, so that an absence cannot give the role away.
    left = thing if role in ("same", "left") else near
    right = thing if role in ("same", "right") else near
    # Others must not look like either of the two.
    return Slot(left, right, taken | {traits[name] for traits in (thing, near) for name in ("colour", "shape")})


def say_thing(rng: random.Random, kind: str) -> Sentence:
    """One object, and which of the images it is in."""
    names = names_by_lot(rng)
    traits = traits_by_lot(rng, names)

    def make(rng: random.Random, truth: bool) -> Pair:
        role = choose(rng, ROLES[kind][truth])
        main = slot_of(rng, role, traits)
        # One of the two is the same in both pictures and the other is not, whatever the role.
        other_role = "same" if role in ("left", "right") else "left"
        other = slot_of(rng, other_role, strangers(rng, names, main.taken), main.taken)
        return filled(rng, main, other)

    return Sentence(PHRASES[kind].format(a_noun(traits)), make)


def say_sides(rng: random.Random, kind: str) -> Sentence:
    """One object in the left, another in the right picture."""
    names = ("colour", "shape")  # more would exceed the text encoder's length
    first = traits_by_lot(rng, names)
    second = strangers(rng, names, first.values())

    def make(rng: random.Random, truth: bool) -> Pair:
        roles = choose(rng, SIDES[truth])
        main = slot_of(rng, roles[0], first, frozenset(second.values()))
        return filled(rng, main, slot_of(rng, roles[1], second, main.taken))

    return Sentence(f"{a_noun(first)} in the left picture, {a_noun(second)} in the right", make)


def filled(rng: random.Random, main: Slot, other: Slot) -> Pair:
    """A pair from two slots; half of the images get a third object, unlike any that is or might be mentioned."""

    def more() -> list[Traits]:
        return [strangers(rng, ("colour", "shape"), other.taken)] if rng.random() < 0.5 else []

    return Pair([main.left, other.left, *more()], [main.right, other.right, *more()])


def say_background(rng: random.Random, kind: str) -> Sentence:
    """The background of both images or of only one, or whether both have the same.

    Over the four forms, pairs with equal and with different backgrounds are true as often as false.
    """
    form, background = choose(rng, tuple(GROUNDS)), choose(rng, BACKGROUNDS)

    def make(rng: random.Random, truth: bool) -> Pair:
        # Two backgrounds: `first` is the one that the sentence names, if any.
        named = form in ("both", "one")
        first, second = shuffled(rng, BACKGROUNDS)[:2]
        if named:
            first, second = background, choose(rng, [name for name in BACKGROUNDS if name != background])
        # "both" and "same" are true of equal backgrounds, "one" and "differ" of different ones.
        equal = (form in ("both", "same")) == truth
        if equal:
            # "only one" is false in two ways: both pictures are on it, or neither.
            all_wrong = named and not truth and rng.random() < 0.5
            grounds = (second, second) if all_wrong else (first, first)
        else:
            grounds = (first, second) if rng.random() < 0.5 else (second, first)
        return Pair([{}] * choose(rng, (1, 2, 3)), [{}] * choose(rng, (1, 2, 3)), grounds)

    return Sentence(GROUNDS[form].format(background), make)


def say_count(rng: random.Random, kind: str) -> Sentence:
    """How many objects there are in the two images together."""
    number = choose(rng, tuple(NUMBERS))

    def make(rng: random.Random, truth: bool) -> Pair:
        total = number if truth else choose(rng, BESIDE[number])
        # So that each picture has 1 to 3 objects.
        left = choose(rng, range(max(1, total - 3), min(3, total - 1) + 1))
        return Pair([{}] * left, [{}] * (total - left))

    return Sentence(f"there are {NUMBERS[number]} things in all", make)


SAY: dict[str, Callable[[random.Random, str], Sentence]] = {
    **dict.fromkeys(ROLES, say_thing),
    "sides": say_sides,
    "background": say_background,
    "count": say_count,
}


def scene_view(rng: random.Random, split: str, things: list[Traits], ground: str | None) -> View:
    """A scene of the split with these objects."""
    return View(first_of_split(split, lambda: scene_like(rng, things, ground)))


def tell_comparison(key: str, split: str, index: int) -> PlannedExample:
    """Pair `index % 4` of sentence `index // 4`; see `Tell`. Ids as in NLVR2, split-set-pair-sentence."""
    number, place = divmod(index, PAIRS)
    # Seeded by the number alone: each of the four pairs recreates the same sentence.
    rng = random.Random(f"{key}-{number}")
    kind = choose(rng, LOTS[split])
    sentence = SAY[kind](rng, kind)
    truth = shuffled(rng, (True, True, False, False))[place]
    # The pair's own generator: independent of the sentence and of the other three pairs.
    rng = random.Random(f"{key}-{number}-{place}")
    pair = sentence.make(rng, truth)
    grounds = pair.grounds or (None, None)
    views = (scene_view(rng, split, pair.left, grounds[0]), scene_view(rng, split, pair.right, grounds[1]))
    identifier, group = f"{split}-{number}-{place}-0", f"{split}-{number}-0"
    return PlannedExample(views, sentence.text, LABELS[truth], kind, identifier, group)


class SceneComparisons(ExampleSource):
    """Sentences about pairs of scenes (an `ExampleSource`), eight kinds; four examples in a row share a sentence.

    Args:
        train: number of training examples, a multiple of 4, like the next two.
        val: number of validation examples.
        test: number of test examples.
        size: width and height of the images in pixels, at least 12.
        seed: selects other sentences and scenes; splits share no scene under any pair of seeds.
    """

    def __init__(self, train: int = 100_000, val: int = 2000, test: int = 2000, size: int = 48, seed: int = 0) -> None:
        counts = {"train": train, "val": val, "test": test}
        self.splits = SceneSplits("SceneComparisons", tell_comparison, counts, size, seed, multiple=PAIRS)

    @property
    def labels(self) -> tuple[str, ...]:
        """`False` and `True`, as in NLVR2."""
        return LABELS

    def split(self, name: str) -> SceneExamples:
        """The examples of `train`, `val` or `test`; another name is a UserError."""
        return self.splits.split(name)
