"""Five truthful captions per scene, of different completeness, generated from structured statements.

A `Statement` is what a caption claims; `describes` tells whether it is true of a scene. The words are chosen at random
from a few templates; each caption uses one style, sentences or notes.
"""

import random
import re
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from maskvlm.data.scenes import world as world
from maskvlm.data.scenes.world import Scene, Thing, choose, shuffled

COUNT_WORDS = {2: "two", 3: "three"}
OBJECT_WORDS = ("shapes", "objects", "things")


@dataclass(frozen=True)
class Style:
    """A writing style. The size words depend on the style, so that a masked word can be inferred from the image and its
    neighbours. Words that the image does not determine are few, as they would cost compute and teach little."""

    full: bool  # sentences with articles and prepositions, or notes
    sizes: dict[str, str]
    relations: dict[str, str]
    grounds: tuple[str, ...]
    grounds_first: tuple[str, ...]

    def noun(self, traits: "Mention") -> str:
        """ "a small striped red circle", with the attributes that are mentioned."""
        size = self.sizes[traits.size] if traits.size else None
        # in the order of English adjectives
        words = [word for word in (size, traits.pattern, traits.colour, traits.shape or "thing") if word]
        # depends on the first word: "an orange circle", "a small orange circle"
        article = ("an" if words[0][0] in "aeiou" else "a",) if self.full else ()
        return " ".join((*article, *words))

    def place(self, name: str) -> str:
        """ "at the top left", or only "top left"."""
        preposition = {"middle": "in", "left": "on", "right": "on"}.get(name, "at")
        return f"{preposition} the {name}" if self.full else name

    def listed(self, parts: list[str]) -> str:
        """ "a, b and c", or "a, b, c"."""
        if not self.full or len(parts) == 1:
            return ", ".join(parts)
        return " and ".join((", ".join(parts[:-1]), parts[-1]))

    def ground(self, rng: random.Random, background: str) -> str:
        """ " on a navy background", to be appended to the rest."""
        return choose(rng, self.grounds).format(background)


SENTENCES = Style(
    full=True,
    sizes={"large": "large", "small": "small"},
    relations={"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"},
    grounds=(" on {}", " against {}", " on a {} background"),
    grounds_first=("on {},", "on a {} background,", "the background is {} with"),
)
NOTES = Style(
    full=False,
    sizes={"large": "big", "small": "little"},
    relations={"left of": "left of", "right of": "right of", "above": "over", "below": "under"},
    grounds=(" on {}", ", {} background", ", {}"),
    grounds_first=("on {},", "{} background,", "{},"),
)


def style_of(scene: Scene, rng: random.Random) -> Style:
    """A random style; notes if there are more than two objects, since length costs compute."""
    # always drawn, but ignored if there are three objects
    drawn = choose(rng, (SENTENCES, NOTES))
    return NOTES if len(scene.things) > 2 else drawn


@dataclass(frozen=True)
class Mention:
    """What a caption says about one object; None for attributes not mentioned."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    pattern: str | None = None
    place: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether everything mentioned is true of the object."""
        return (
            self.shape in (None, thing.shape)
            and self.colour in (None, thing.colour)
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
    """What a caption claims: different mentions are different objects."""

    mentions: tuple[Mention, ...]
    relations: tuple[Relation, ...] = ()
    background: str | None = None
    count: int | None = None


class Caption(NamedTuple):
    """A caption and what it claims."""

    text: str
    statement: Statement


def describes(statement: Statement, scene: Scene) -> bool:
    """Whether some assignment of different objects to the mentions makes every claim of the statement true."""
    if statement.background not in (None, scene.background):
        return False
    if statement.count not in (None, len(scene.things)):
        return False
    return any(
        all(mention.fits(thing) for mention, thing in zip(statement.mentions, things, strict=True))
        and all(things[first].relates(name, things[second]) for first, name, second in statement.relations)
        # all assignments of different objects to the mentions, at most 3! = 6
        for things in permutations(scene.things, len(statement.mentions))
    )


def mention(thing: Thing, *attributes: str) -> Mention:
    """A mention of an object with its shape, its colour and the named attributes (size, pattern, place)."""
    return Mention(thing.shape, thing.colour, **{name: getattr(thing, name) for name in attributes})


def tell_all(scene: Scene, rng: random.Random) -> Caption:
    """Every object with all its attributes and its place, and the background."""
    style = style_of(scene, rng)
    # in random order, as the order must not reveal the places
    mentions = [mention(thing, "size", "pattern", "place") for thing in shuffled(rng, scene.things)]
    things = style.listed([f"{style.noun(m)} {style.place(str(m.place))}" for m in mentions])
    text = f"{things}{style.ground(rng, scene.background)}"
    return Caption(text, Statement(tuple(mentions), background=scene.background))


def tell_relations(scene: Scene, rng: random.Random) -> Caption:
    """One object in relation to each other one; all attributes of two objects, one attribute less of more. A single
    object is said to be alone."""
    style = style_of(scene, rng)
    things = shuffled(rng, scene.things)
    if len(things) == 1:
        mentions = [mention(things[0], "size", "pattern")]
        text = f"{style.noun(mentions[0])} alone{style.ground(rng, scene.background)}"
        return Caption(text, Statement(tuple(mentions), background=scene.background, count=1))
    # keeps the text short
    attributes = ("size", "pattern") if len(things) == 2 else (choose(rng, ("size", "pattern")),)
    mentions = [mention(thing, *attributes) for thing in things]
    relations = []
    for number, thing in enumerate(things[1:], start=1):
        # never empty: two objects differ in row or column; on a diagonal, two relations are true
        true = [name for name in world.RELATIONS if things[0].relates(name, thing)]
        relations.append(Relation(0, choose(rng, true), number))
    others = style.listed([f"{style.relations[r.name]} {style.noun(mentions[r.second])}" for r in relations])
    text = f"{style.noun(mentions[0])} {'is ' if style.full else ''}{others}"
    return Caption(text, Statement(tuple(mentions), tuple(relations)))


def tell_background_first(scene: Scene, rng: random.Random) -> Caption:
    """The background, then each object's colour, shape and place; for a single object also its size or pattern."""
    style = style_of(scene, rng)
    # without it, a single object would fit too many images
    more = () if len(scene.things) > 1 else (choose(rng, ("size", "pattern")),)
    mentions = [mention(thing, "place", *more) for thing in shuffled(rng, scene.things)]
    things = style.listed([f"{style.noun(m)} {style.place(str(m.place))}" for m in mentions])
    text = f"{choose(rng, style.grounds_first).format(scene.background)} {things}"
    return Caption(text, Statement(tuple(mentions), background=scene.background))


def tell_places_first(scene: Scene, rng: random.Random) -> Caption:
    """Each place, then the object there, without size or without pattern; a single object with its background."""
    style = style_of(scene, rng)
    attribute = choose(rng, ("size", "pattern"))
    mentions = [mention(thing, "place", attribute) for thing in shuffled(rng, scene.things)]
    verb = " is" if style.full else ""
    text = style.listed([f"{style.place(str(m.place))}{verb} {style.noun(m)}" for m in mentions])
    if len(mentions) > 1:
        return Caption(text, Statement(tuple(mentions)))
    ground = style.ground(rng, scene.background)  # a single object would fit too many images
    return Caption(f"{text}{ground}", Statement(tuple(mentions), background=scene.background))


def tell_part(scene: Scene, rng: random.Random) -> Caption:
    """At most two objects in full, or that there is only one; or the count, with the colours and shapes of all."""
    style = style_of(scene, rng)
    things = shuffled(rng, scene.things)
    # One or two objects in full, else the count and all names.
    if len(things) <= 2 or rng.random() < 0.5:
        mentions = [mention(thing, "size", "pattern", "place") for thing in things[:2]]
        text = style.listed([f"{style.noun(m)} {style.place(str(m.place))}" for m in mentions])
        if len(things) == 1:
            return Caption(f"only {text}", Statement(tuple(mentions), count=1))
        return Caption(text, Statement(tuple(mentions)))
    mentions = [mention(thing) for thing in things]
    head = f"{COUNT_WORDS[len(things)]} {choose(rng, OBJECT_WORDS)}{style.ground(rng, scene.background)}"
    statement = Statement(tuple(mentions), background=scene.background, count=len(things))
    return Caption(f"{head}: {style.listed([style.noun(m) for m in mentions])}", statement)


def tell_names(scene: Scene, rng: random.Random) -> Caption:
    """The objects by name: colour and shape, and possibly size, pattern or both for all of them.

    With long captions, colours, places and backgrounds distinguish a batch's images without looking at shapes; with
    these they do not.
    """
    style = style_of(scene, rng)
    attributes = choose(rng, ((), ("size",), ("pattern",), ("size", "pattern")))
    mentions = [mention(thing, *attributes) for thing in shuffled(rng, scene.things)]
    return Caption(style.listed([style.noun(m) for m in mentions]), Statement(tuple(mentions)))


def tell_spots(scene: Scene, rng: random.Random) -> Caption:
    """Each place, and one attribute of the object there, the same attribute for all objects.

    In long captions the object of a masked word can be found by its other attributes; here only by its place.
    """
    style = style_of(scene, rng)
    attribute = choose(rng, ("shape", "colour", "size", "pattern"))
    mentions = [
        Mention(place=thing.place, **{attribute: getattr(thing, attribute)}) for thing in shuffled(rng, scene.things)
    ]
    return Caption(
        style.listed([f"{style.noun(m)} {style.place(str(m.place))}" for m in mentions]), Statement(tuple(mentions))
    )


def tell_short(scene: Scene, rng: random.Random, relations: int = 0) -> Caption:
    """Names, or for several objects places and one attribute, which for a single object would fit too many images.

    Args:
        relations: weight of `tell_relations` in the random choice if there are several objects; the others have 1.
    """
    # one entry per unit of weight
    several = (tell_names, tell_spots, *[tell_relations] * relations)
    return choose(rng, several if len(scene.things) > 1 else (tell_names,))(scene, rng)


PHRASINGS = (tell_all, tell_relations, tell_background_first, tell_places_first, tell_part)


def captions_of(scene: Scene, rng: random.Random) -> list[Caption]:
    """The five captions of a scene, in the order of PHRASINGS."""
    return [phrase(scene, rng) for phrase in PHRASINGS]


def vocabulary() -> list[str]:
    """Every word that a caption can use, sorted."""
    styles = (SENTENCES, NOTES)
    # the words in the templates of the functions above
    frames = [*OBJECT_WORDS, "thing a alone an and is at in on only the"]
    frames += [frame for style in styles for frame in (*style.grounds, *style.grounds_first)]
    counts = [COUNT_WORDS[count] for count in set(world.COUNTS) if count > 2]  # see tell_part
    synonyms = [word for style in styles for word in (*style.sizes.values(), *style.relations.values())]
    content = [*world.SHAPES, *world.COLOURS, *world.PATTERNS, *world.BACKGROUNDS, *world.PLACES]
    return sorted(set(re.findall("[a-z]+", " ".join((*frames, *counts, *synonyms, *content)))))
