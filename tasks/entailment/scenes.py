"""Hypotheses about partly hidden scenes of the built-in world; no download needed.

If everything is visible, nothing is neutral, so a curtain covers a row or a column of each image. A hypothesis is
entailed if the visible part makes it true whatever is hidden, contradicted if nothing hidden could make it true, and
neutral otherwise. Anything may be hidden, one object per cell; a hypothesis never needs more than one hidden object to
be true, so the world's limit of three objects never matters.

Image and class are drawn first and independently, then a hypothesis of that class, so the image alone is
uninformative. The draws treat all colours, shapes and places alike, and objects that are mentioned together have the
same similarities in place and look in every class, so that each hypothesis is equally likely in each class: the text
alone is uninformative.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from maskvlm.data.examples import ExampleSource
from maskvlm.data.scenes.captions import SENTENCES
from maskvlm.data.scenes.examples import (
    TRIES,
    PlannedExample,
    SceneExamples,
    SceneSplits,
    Traits,
    View,
    a_noun,
    first_of_split,
    fits,
    lots_of,
    names_by_lot,
    near_miss,
    scene_of,
    thing_like,
    traits_of,
)
from maskvlm.data.scenes.world import BACKGROUNDS, LINES, PLACES, Scene, Thing, choose, shuffled

LABELS = ("entailment", "neutral", "contradiction")
EVERYWHERE = tuple(range(9))
ACROSS = {"row": ("above", "below"), "column": ("left of", "right of")}
"""Relations by what the curtain covers: along the curtain, two hidden objects could make any relation true."""
GHOST = Thing("circle", "red", "small", "plain", cell=0)  # a possible hidden object, before the claimed traits are set


class Hypothesis(NamedTuple):
    """The claim that objects with these `traits` exist, each in one of its `cells`, the first in `relation` to the
    second.

    `denied` negates it: there are none. `background` is claimed as well, unless it is None.
    """

    text: str
    traits: tuple[Traits, ...]
    cells: tuple[Sequence[int], ...]
    relation: str | None = None
    background: str | None = None
    denied: bool = False


def is_so(claim: Hypothesis, things: tuple[Thing, ...]) -> bool:
    """True if there are such objects; ignores `denied` and `background`."""
    fit = [
        [thing for thing in things if thing.cell in cells and fits(traits, thing)]
        for traits, cells in zip(claim.traits, claim.cells, strict=True)
    ]
    if claim.relation is None:
        return all(fit)  # two mentioned objects are never the same one: their cells differ
    return any(one.relates(claim.relation, other) for one, other in product(*fit))


def verdict(claim: Hypothesis, view: View) -> str:
    """One of LABELS: what the visible part of the image says about the claim."""
    assert view.curtain is not None
    visible, hidden = view.scene.things, LINES[view.curtain]
    if claim.background not in (None, view.scene.background):
        return "contradiction"
    # More objects never make a claim less true: if all claimed objects in every hidden cell do not help, nothing does.
    ghosts = [replace(GHOST, cell=cell, dx=0, dy=0, **traits) for cell in hidden for traits in claim.traits]
    certain, possible = is_so(claim, visible), is_so(claim, (*visible, *ghosts))
    if claim.denied:
        # "There is none": certain if one is impossible, possible if one is not certain.
        certain, possible = not possible, not certain
    return "entailment" if certain else "neutral" if possible else "contradiction"


def is_apart(kind: str, curtain: str, cells: Sequence[int]) -> bool:
    """True if objects in these cells allow every class.

    A relation needs one object on each side, or two beyond the curtain one behind the other. Of two places, a hidden
    and a visible one cannot share the curtain's line, but two visible ones can: they always differ in row and column,
    so that this reveals nothing.
    """
    rows, columns = {cell // 3 for cell in cells}, {cell % 3 for cell in cells}
    if kind == "two":
        return len(rows) == len(columns) == 2
    return len(rows if curtain.endswith("row") else columns) == 2


def unlike(one: Thing, other: Thing) -> bool:
    """True if neither colour nor shape is the same."""
    return one.colour != other.colour and one.shape != other.shape


def curtain_view(rng: random.Random, split: str, kind: str, names: tuple[str, ...]) -> View:
    """A curtain over a random line, and one or two objects beside it; an image in which every class is possible."""
    curtain = choose(rng, tuple(LINES))
    # All objects are beside the curtain; what it hides is left open.
    free = [cell for cell in EVERYWHERE if cell not in LINES[curtain]]

    def make_pair() -> Scene | None:
        cells = shuffled(rng, free)[:2]
        things = [thing_like(rng, cell, {}) for cell in cells]
        return scene_of(rng, things) if is_apart(kind, curtain, cells) and unlike(*things) else None

    def make() -> Scene:
        cells = shuffled(rng, free)[: choose(rng, (1, 2))]
        first = thing_like(rng, cells[0], {})
        # Half of the second objects are near misses of the first.
        like = near_miss(rng, traits_of(first, names)) if rng.random() < 0.5 else {}
        return scene_of(rng, [first, *(thing_like(rng, cell, like) for cell in cells[1:])])

    return View(first_of_split(split, make_pair if kind in ("relation", "two") else make), curtain)


# ---- random hypotheses of any class -----------------------------------------------------------------------
def near_traits(rng: random.Random, thing: Thing, names: tuple[str, ...], taken: Sequence[str] = ()) -> Traits:
    """The object's traits, or a near miss."""
    traits = traits_of(thing, names)
    return traits if rng.random() < 0.5 else near_miss(rng, traits, taken)


def cell_of(rng: random.Random, thing: Thing) -> int:
    """The object's own cell, or any."""
    return thing.cell if rng.random() < 0.5 else choose(rng, EVERYWHERE)


def two_of(rng: random.Random, view: View, names: tuple[str, ...]) -> tuple[list[Thing], tuple[Traits, Traits]]:
    """The two objects of a scene in any order, and their claimed traits, which also differ from each other."""
    one, other = shuffled(rng, view.scene.things)
    # The traits claimed of one never fit the other by accident: colours and shapes are kept apart.
    first = near_traits(rng, one, names, (other.colour, other.shape))
    return [one, other], (first, near_traits(rng, other, names, (first["colour"], first["shape"])))


def say_place(rng: random.Random, view: View, names: tuple[str, ...]) -> Hypothesis:
    """An object is at a place."""
    thing = choose(rng, view.scene.things)
    traits, cell = near_traits(rng, thing, names), cell_of(rng, thing)
    return Hypothesis(f"{a_noun(traits)} is {SENTENCES.place(PLACES[cell])}", (traits,), ((cell,),))


def say_region(rng: random.Random, view: View, names: tuple[str, ...]) -> Hypothesis:
    """An object is in a row or column."""
    traits, line = near_traits(rng, choose(rng, view.scene.things), names), choose(rng, tuple(LINES))
    return Hypothesis(f"{a_noun(traits)} is in the {line}", (traits,), (LINES[line],))


def say_relation(rng: random.Random, view: View, names: tuple[str, ...]) -> Hypothesis:
    """An object is left of, right of, above or below another."""
    assert view.curtain is not None
    _, both_traits = two_of(rng, view, names)
    relation = choose(rng, ACROSS[view.curtain.split()[1]])
    text = f"{a_noun(both_traits[0])} is {relation} {a_noun(both_traits[1])}"
    return Hypothesis(text, both_traits, (EVERYWHERE, EVERYWHERE), relation=relation)


def say_ground(rng: random.Random, view: View, names: tuple[str, ...]) -> Hypothesis:
    """There is an object, and the background is the one named."""
    traits = near_traits(rng, choose(rng, view.scene.things), names)
    background = view.scene.background if rng.random() < 0.5 else choose(rng, BACKGROUNDS)
    return Hypothesis(f"{a_noun(traits)} is on {background}", (traits,), (EVERYWHERE,), background=background)


def say_two(rng: random.Random, view: View, names: tuple[str, ...]) -> Hypothesis | None:
    """Two objects are at two places."""
    assert view.curtain is not None
    things, both_traits = two_of(rng, view, names)
    cells = [cell_of(rng, thing) for thing in things]
    if not is_apart("two", view.curtain, cells):
        return None
    first, second = (
        f"{a_noun(traits)} {{}}{SENTENCES.place(PLACES[c])}" for traits, c in zip(both_traits, cells, strict=True)
    )
    return Hypothesis(f"{first.format('is ')} and {second.format('')}", both_traits, ((cells[0],), (cells[1],)))


def say_empty(rng: random.Random, view: View, names: tuple[str, ...]) -> Hypothesis:
    """Nothing is at a place."""
    cell = cell_of(rng, choose(rng, view.scene.things))
    return Hypothesis(f"no thing is {SENTENCES.place(PLACES[cell])}", ({},), ((cell,),), denied=True)


SAY: dict[str, Callable[[random.Random, View, tuple[str, ...]], Hypothesis | None]] = {
    "place": say_place,
    "region": say_region,
    "relation": say_relation,
    "ground": say_ground,
    "two": say_two,
    "empty": say_empty,
}
"""Kind -> a hypothesis of that kind, of any class; None if the draw is unsuitable."""
KINDS = tuple(SAY)
SHARES = {"place": 8, "region": 2}
"""Relative frequency of these kinds in training; all others have 1. They teach which words name which places and what
is behind the curtain, which the other kinds need. With fewer of them, that was learned late or not at all
(docs/results/downstream)."""
LOTS = lots_of(KINDS, SHARES)


def tell_hypothesis(key: str, split: str, index: int) -> PlannedExample:
    """Example `index`; see `Tell`."""
    rng = random.Random(f"{key}-{index}")
    kind, label = choose(rng, LOTS[split]), choose(rng, LABELS)
    names = names_by_lot(rng)  # once: drawing them again for each hypothesis would be biased towards one class
    view = curtain_view(rng, split, kind, names)
    for _ in range(TRIES):
        claim = SAY[kind](rng, view, names)
        if claim is not None and verdict(claim, view) == label:
            return PlannedExample((view,), claim.text, label, kind, id=f"{split}-{index}")
    raise AssertionError(f"no {label} of kind {kind} for {view}")


class SceneHypotheses(ExampleSource):
    """Hypotheses about half-hidden scenes of the built-in world (an `ExampleSource`), six kinds.

    Args:
        train: number of training examples.
        val: number of validation examples.
        test: number of test examples.
        size: width and height of the images in pixels, at least 12.
        seed: selects other hypotheses and scenes; splits share no scene under any pair of seeds.
    """

    def __init__(self, train: int = 100_000, val: int = 2000, test: int = 2000, size: int = 48, seed: int = 0) -> None:
        counts = {"train": train, "val": val, "test": test}
        self.splits = SceneSplits("SceneHypotheses", tell_hypothesis, counts, size, seed)

    @property
    def labels(self) -> tuple[str, ...]:
        """`entailment`, `neutral`, `contradiction`, as in SNLI-VE."""
        return LABELS

    def split(self, name: str) -> SceneExamples:
        """The examples of `train`, `val` or `test`; another name is a UserError."""
        return self.splits.split(name)
