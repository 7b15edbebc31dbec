"""Questions about scenes of the built-in world, each with one true answer; no download needed.

Kind and answer are drawn first, each uniformly, then the words, then a scene for which the answer is true: within a
kind, no word reveals anything about the answer, and a model that ignores the image is at chance level. A question
refers to exactly one object, and the other objects in the scene are often near misses.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from maskvlm.data.examples import ExampleSource
from maskvlm.data.scenes.captions import SENTENCES
from maskvlm.data.scenes.examples import (
    PlannedExample,
    SceneExamples,
    SceneSplits,
    Traits,
    View,
    a_noun,
    first_of_split,
    fits,
    names_by_lot,
    near_miss,
    noun,
    scene_like,
    scene_of,
    strangers,
    thing_like,
    traits_by_lot,
)
from maskvlm.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    choose,
    shuffled,
)

NUMBERS = ("none", "one", "two", "three")  # words: a tokenizer trained on captions lacks digits, and the z of "zero"
YES_NO = ("yes", "no")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
ANSWERS: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "pattern": PATTERNS,
    "size": SIZES,
    "place": PLACES,
    "background": BACKGROUNDS,
    "count": NUMBERS,
    "existence": YES_NO,
    "relation": YES_NO,
}
"""Kind of question -> its answers, all equally likely."""


class Query(NamedTuple):
    """A question in words, and a function that makes a scene in which the answer is true (of any split; None: try
    again)."""

    text: str
    make: Callable[[], Scene | None]


def only(traits: Traits, scene: Scene) -> bool:
    """True if exactly one object fits the traits."""
    return sum(fits(traits, thing) for thing in scene.things) == 1


def company(rng: random.Random, traits: Traits, most: int = 2) -> list[Traits]:
    """Up to `most` more objects, each random or a near miss of the named traits."""
    number = choose(rng, range(most + 1))
    return [near_miss(rng, traits) if rng.random() < 0.5 else {} for _ in range(number)]


def ask_attribute(rng: random.Random, kind: str, answer: str) -> Query:
    """What colour, shape, pattern or size the one object with the named traits has."""
    # The attribute in question is never named.
    basis = {"colour": ("shape",), "shape": ("colour",)}.get(kind, ("colour", "shape"))
    more = () if rng.random() < 0.5 else (choose(rng, [name for name in ("size", "pattern") if name != kind]),)
    # One in four names a place instead of an object.
    if kind in ("colour", "shape") and rng.random() < 0.25:
        return ask_at_place(rng, kind, answer)
    traits = traits_by_lot(rng, (*more, *basis))
    text = {
        "colour": "what colour is the {}",
        "shape": "what shape is the {}",
        "pattern": "what pattern has the {}",
        "size": "how large is the {}",
    }[kind].format(noun(traits))

    def make() -> Scene | None:
        scene = scene_like(rng, [traits | {kind: answer}, *company(rng, traits)])
        # None if another object also fits the words: a question must be unambiguous.
        return scene if only(traits, scene) else None

    return Query(text, make)


def ask_at_place(rng: random.Random, kind: str, answer: str) -> Query:
    """What colour or shape the object at a place has."""
    place = choose(rng, range(9))
    text = f"what {kind} is the thing {SENTENCES.place(PLACES[place])}"

    def make() -> Scene:
        rest = [cell for cell in shuffled(rng, range(9)) if cell != place][: choose(rng, range(3))]
        things = [thing_like(rng, place, {kind: answer}), *(thing_like(rng, cell, {}) for cell in rest)]
        return scene_of(rng, things)

    return Query(text, make)


def ask_place(rng: random.Random, kind: str, answer: str) -> Query:
    """Where the one object with the named traits is."""
    traits = traits_by_lot(rng, names_by_lot(rng))

    def make() -> Scene | None:
        scene = scene_like(rng, [traits, *company(rng, traits)])
        matches = [thing for thing in scene.things if fits(traits, thing)]
        # The place is drawn with the scene, so most tries fail: first_of_split keeps trying.
        return scene if len(matches) == 1 and matches[0].place == answer else None

    return Query(f"where is the {noun(traits)}", make)


def ask_background(rng: random.Random, kind: str, answer: str) -> Query:
    """What the background is."""
    text = choose(rng, ("what is the background", "what colour is the background"))
    return Query(text, lambda: scene_like(rng, [{}] * choose(rng, (1, 2, 3)), answer))


def ask_count(rng: random.Random, kind: str, answer: str) -> Query:
    """How many of three objects have a colour, a shape or a pattern."""
    name = choose(rng, ("colour", "shape", "pattern"))
    traits = traits_by_lot(rng, (name,))
    text = f"how many {noun(traits)}{'es' if traits.get('shape') == 'cross' else 's'} are there"
    number = NUMBERS.index(answer)

    def make() -> Scene | None:
        # Always three objects, so that their total reveals nothing about the answer.
        things = [traits] * number + [near_miss(rng, traits) for _ in range(3 - number)]
        return scene_like(rng, things)

    return Query(text, make)


def ask_existence(rng: random.Random, kind: str, answer: str) -> Query:
    """Whether there is such an object; if not, one that differs in one attribute takes its place."""
    traits = traits_by_lot(rng, names_by_lot(rng))

    def make() -> Scene | None:
        # The other objects resemble the first one, whatever the answer.
        first = traits if answer == "yes" else near_miss(rng, traits)
        scene = scene_like(rng, [first, *company(rng, first)])
        return scene if any(fits(traits, thing) for thing in scene.things) == (answer == "yes") else None

    return Query(f"is there {a_noun(traits)}", make)


def ask_relation(rng: random.Random, kind: str, answer: str) -> Query:
    """Whether one object is left of, right of, above or below another; both always exist.

    If the answer is "no", the opposite relation holds: if aligned objects were a "no", the image alone would hint it.
    """
    first = traits_by_lot(rng, ("colour", "shape"))
    second = strangers(rng, ("colour", "shape"), first.values())
    relation = choose(rng, RELATIONS)
    true = relation if answer == "yes" else OPPOSITE[relation]

    def make() -> Scene | None:
        scene = scene_like(rng, [first, second, *company(rng, first, most=1)])
        if not (only(first, scene) and only(second, scene)):
            return None
        # Each is the only one that fits, so take the first.
        one, other = (next(thing for thing in scene.things if fits(traits, thing)) for traits in (first, second))
        return scene if one.relates(true, other) else None

    return Query(f"is the {noun(first)} {relation} the {noun(second)}", make)


ASK: dict[str, Callable[[random.Random, str, str], Query]] = {
    **dict.fromkeys(("colour", "shape", "pattern", "size"), ask_attribute),
    "place": ask_place,
    "background": ask_background,
    "count": ask_count,
    "existence": ask_existence,
    "relation": ask_relation,
}


def tell_question(key: str, split: str, index: int) -> PlannedExample:
    """Question `index`; see `Tell`."""
    # A generator per example, so that every worker makes the same one; Python seeds from text identically everywhere.
    rng = random.Random(f"{key}-{index}")
    kind = choose(rng, tuple(ANSWERS))
    answer = choose(rng, ANSWERS[kind])
    query = ASK[kind](rng, kind, answer)
    scene = first_of_split(split, query.make)
    return PlannedExample((View(scene),), query.text, answer, kind, id=f"{split}-{index}")


class SceneQuestions(ExampleSource):
    """Questions about the built-in world (an `ExampleSource`), nine kinds, 42 answers.

    Args:
        train: number of training questions.
        val: number of validation questions.
        test: number of test questions.
        size: width and height of the images in pixels, at least 12.
        seed: selects other questions and scenes; splits share no scene under any pair of seeds.
    """

    def __init__(self, train: int = 100_000, val: int = 2000, test: int = 2000, size: int = 48, seed: int = 0) -> None:
        counts = {"train": train, "val": val, "test": test}
        self.splits = SceneSplits("SceneQuestions", tell_question, counts, size, seed)

    @property
    def labels(self) -> tuple[str, ...]:
        """All answers of all kinds, sorted."""
        return tuple(sorted({answer for answers in ANSWERS.values() for answer in answers}))

    def split(self, name: str) -> SceneExamples:
        """The questions of `train`, `val` or `test`; another name is a UserError."""
        return self.splits.split(name)
