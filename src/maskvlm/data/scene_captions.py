"""Five truthful captions a scene, each at its own completeness, from a structured statement.

A `Statement` is what a caption claims, `describes` says of which scenes it is true. The words are chosen by
lot among a few frames and synonyms; a caption keeps to one set of synonyms throughout, so that a masked word
can be told from the picture and its neighbours.
"""

import random
import re
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from maskvlm.data import scene_world as world
from maskvlm.data.scene_world import Scene, Thing, choose, shuffled

SIZE_WORDS = ({"large": "large", "small": "small"}, {"large": "big", "small": "little"})
RELATION_WORDS = (
    {"left of": "left of", "right of": "right of", "above": "above", "below": "below"},
    {"left of": "to the left of", "right of": "to the right of", "above": "over", "below": "under"},
)
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
OBJECT_WORDS = ("shapes", "objects", "things")
GROUNDS = ("on {}", "against {}", "on a {} background", "with a {} background")
GROUNDS_FIRST = ("on {},", "on a {} background,", "the background is {} with", "a {} background with")


@dataclass(frozen=True)
class Mention:
    """What a caption says of one thing; None where it keeps silent."""

    shape: str
    colour: str
    size: str | None = None
    pattern: str | None = None
    place: str | None = None

    def fits(self, thing: Thing) -> bool:
        """True where nothing said is false of the thing."""
        return (
            self.shape == thing.shape
            and self.colour == thing.colour
            and self.size in (None, thing.size)
            and self.pattern in (None, thing.pattern)
            and self.place in (None, thing.place)
        )


class Relation(NamedTuple):
    """Mention number `first` is `name` (one of RELATIONS) mention number `second`."""

    first: int
    name: str
    second: int


@dataclass(frozen=True)
class Statement:
    """What a caption claims: different mentions are different things."""

    mentions: tuple[Mention, ...]
    relations: tuple[Relation, ...] = ()
    background: str | None = None
    count: int | None = None


class Caption(NamedTuple):
    """A caption and what it claims."""

    text: str
    statement: Statement


def describes(statement: Statement, scene: Scene) -> bool:
    """True where some choice of different things makes every claim of the statement true."""
    if statement.background not in (None, scene.background):
        return False
    if statement.count not in (None, len(scene.things)):
        return False
    return any(
        all(mention.fits(thing) for mention, thing in zip(statement.mentions, things, strict=True))
        and all(things[first].relates(name, things[second]) for first, name, second in statement.relations)
        for things in permutations(scene.things, len(statement.mentions))
    )


def mention(thing: Thing, *attributes: str) -> Mention:
    """The thing with its shape, its colour and the named attributes (size, pattern, place)."""
    return Mention(thing.shape, thing.colour, **{name: getattr(thing, name) for name in attributes})


class Wording:
    """The synonyms that one caption keeps to."""

    def __init__(self, rng: random.Random, brief: bool = False) -> None:
        self.sizes = choose(rng, SIZE_WORDS)
        self.relations = choose(rng, RELATION_WORDS)
        self.middle = choose(rng, ("middle", "centre"))
        self.prepositions = choose(rng, (True, False)) and not brief

    def noun(self, said: Mention) -> str:
        """ "a small striped red circle", as far as the mention goes."""
        size = self.sizes[said.size] if said.size else None
        words = [word for word in (size, said.pattern, said.colour, said.shape) if word]
        return " ".join(("an" if words[0][0] in "aeiou" else "a", *words))

    def place(self, name: str) -> str:
        """ "at the top left", or "top left" alone."""
        words = self.middle if name == "middle" else name
        if not self.prepositions:
            return words
        preposition = {"middle": "in", "left": "on", "right": "on"}.get(name, "at")
        return f"{preposition} the {words}"


def listed(parts: list[str]) -> str:
    """ "a, b and c"."""
    return " and ".join((", ".join(parts[:-1]), parts[-1])) if len(parts) > 1 else parts[0]


def tell_all(scene: Scene, rng: random.Random) -> Caption:
    """Every thing with every attribute and its place, and the background."""
    words = Wording(rng, brief=len(scene.things) > 3)
    said = [mention(thing, "size", "pattern", "place") for thing in shuffled(rng, scene.things)]
    things = listed([f"{words.noun(m)} {words.place(str(m.place))}" for m in said])
    text = f"{things} {choose(rng, GROUNDS).format(scene.background)}"
    return Caption(text, Statement(tuple(said), background=scene.background))


def tell_relations(scene: Scene, rng: random.Random) -> Caption:
    """One thing related to each other one; every attribute of two things, one attribute less of more. A thing
    that has none to be related to is said to be alone."""
    words = Wording(rng)
    things = shuffled(rng, scene.things)
    if len(things) == 1:
        said = [mention(things[0], "size", "pattern")]
        text = f"{words.noun(said[0])} alone {choose(rng, GROUNDS).format(scene.background)}"
        return Caption(text, Statement(tuple(said), background=scene.background, count=1))
    attributes = ("size", "pattern") if len(things) == 2 else (choose(rng, ("size", "pattern")),)
    said = [mention(thing, *attributes) for thing in things]
    relations = []
    for number, thing in enumerate(things[1:], start=1):
        true = [name for name in world.RELATIONS if things[0].relates(name, thing)]
        relations.append(Relation(0, choose(rng, true), number))
    others = listed([f"{words.relations[r.name]} {words.noun(said[r.second])}" for r in relations])
    return Caption(f"{words.noun(said[0])} is {others}", Statement(tuple(said), tuple(relations)))


def tell_background_first(scene: Scene, rng: random.Random) -> Caption:
    """The background, then each thing's colour, shape and place."""
    words = Wording(rng)
    said = [mention(thing, "place") for thing in shuffled(rng, scene.things)]
    things = listed([f"{words.noun(m)} {words.place(str(m.place))}" for m in said])
    text = f"{choose(rng, GROUNDS_FIRST).format(scene.background)} {things}"
    return Caption(text, Statement(tuple(said), background=scene.background))


def tell_places_first(scene: Scene, rng: random.Random) -> Caption:
    """Each place, then what is there, without size or without pattern; one thing alone with its background."""
    words = Wording(rng)
    attribute = choose(rng, ("size", "pattern"))
    said = [mention(thing, "place", attribute) for thing in shuffled(rng, scene.things)]
    verb = choose(rng, ("", "is ")) if len(said) < 4 else ""  # text length costs compute
    text = listed([f"{words.place(str(m.place))} {verb}{words.noun(m)}" for m in said])
    if len(said) > 1:
        return Caption(text, Statement(tuple(said)))
    ground = choose(rng, GROUNDS).format(scene.background)  # one thing would fit too many pictures
    return Caption(f"{text} {ground}", Statement(tuple(said), background=scene.background))


def tell_part(scene: Scene, rng: random.Random) -> Caption:
    """At most two things in full, or how many there are, and their colours and shapes."""
    words = Wording(rng)
    things = shuffled(rng, scene.things)
    if len(things) <= 2 or rng.random() < 0.5:
        said = [mention(thing, "size", "pattern", "place") for thing in things[:2]]
        text = listed([f"{words.noun(m)} {words.place(str(m.place))}" for m in said])
        return Caption(text, Statement(tuple(said)))
    said = [mention(thing) for thing in things]
    ground = choose(rng, GROUNDS).format(scene.background)
    head = f"{COUNT_WORDS[len(things)]} {choose(rng, OBJECT_WORDS)} {ground}"
    statement = Statement(tuple(said), background=scene.background, count=len(things))
    return Caption(f"{head}: {listed([words.noun(m) for m in said])}", statement)


PHRASINGS = (tell_all, tell_relations, tell_background_first, tell_places_first, tell_part)


def captions_of(scene: Scene, rng: random.Random) -> list[Caption]:
    """The five captions of a scene, in the order of PHRASINGS."""
    return [phrase(scene, rng) for phrase in PHRASINGS]


def vocabulary() -> list[str]:
    """Every word that a caption can use, sorted."""
    frames = [*GROUNDS, *GROUNDS_FIRST, *OBJECT_WORDS, "a alone an and is at in on the centre"]
    counts = [COUNT_WORDS[count] for count in set(world.COUNTS) if count > 2]  # see tell_part
    synonyms = [word for table in (*SIZE_WORDS, *RELATION_WORDS) for word in table.values()]
    content = [*world.SHAPES, *world.COLOURS, *world.PATTERNS, *world.BACKGROUNDS, *world.PLACES]
    return sorted(set(re.findall("[a-z]+", " ".join((*frames, *counts, *synonyms, *content)))))
