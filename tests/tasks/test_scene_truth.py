"""Questions, sentences and hypotheses about scenes: each answer is what its words and the scene make it.

The readers of the words share nothing with their writers in `tasks/*/scenes.py`.
"""

import re
from collections import Counter
from functools import cache
from itertools import product

import pytest

from maskvlm.data.scenes.examples import PlannedExample, View
from tasks.entailment.scenes import LABELS, SAY, SceneHypotheses
from tasks.nlvr.scenes import KINDS, SceneComparisons
from tasks.vqa.scenes import ANSWERS, SceneQuestions

SHAPES = ["circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart"]
COLOURS = ["red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink"]
CELLS = {
    "top left": (0, 0), "top": (0, 1), "top right": (0, 2),
    "left": (1, 0), "middle": (1, 1), "right": (1, 2),
    "bottom left": (2, 0), "bottom": (2, 1), "bottom right": (2, 2),
}  # fmt: skip
NOUN = (
    rf"(?:an? )?(?:(large|small) )?(?:(plain|striped|dotted) )?(?:({'|'.join(COLOURS)}) )?"
    rf"({'|'.join(SHAPES)}|thing)(?:s|es)?"
)
PLACE = rf"(?:at|in|on) the ({'|'.join(sorted(CELLS, key=len, reverse=True))})"

GROUP_FREE_NOUN = re.sub(r"\((?!\?)", "(?:", NOUN)
A = f"({GROUP_FREE_NOUN})"
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
NUMBERS = ["none", "one", "two", "three", "four", "five"]
ORDER = {"top": 0, "left": 0, "middle": 1, "bottom": 2, "right": 2}


Thing = dict[str, object]
"""A thing of a scene in plain types, with row and column."""


def things_of(view: View) -> list[Thing]:
    """The things in plain types: the readers of texts below share nothing with their writers."""
    return [thing | {"at": divmod(thing["cell"], 3)} for thing in view.scene.to_dict()["things"]]


def is_noun(text: str, thing: Thing) -> bool:
    """Whether the words of a noun are all true of a thing."""
    match = re.fullmatch(NOUN, text)
    assert match, text
    traits = dict(zip(("size", "pattern", "colour", "shape"), match.groups(), strict=True))
    return all(word in (None, "thing", thing[name]) for name, word in traits.items())


@cache
def plans(source: type, split: str, count: int) -> list[PlannedExample]:
    """The first examples of a split."""
    examples = source(**{split: count}).split(split)
    return [examples.plan(index) for index in range(count)]


# ---- questions ---------------------------------------------------------------------------------------------
def the(noun: str, things: list[Thing]) -> Thing:
    """The one thing of that noun."""
    matches = [thing for thing in things if is_noun(noun, thing)]
    assert len(matches) == 1, (noun, things)
    return matches[0]


def answer_of(example: PlannedExample) -> str:
    """The answer, by the question's words and the scene alone."""
    text, things, noun = example.text, things_of(example.views[0]), f"({GROUP_FREE_NOUN})"
    if text in ("what is the background", "what colour is the background"):
        return example.views[0].scene.background
    if match := re.fullmatch(rf"what (colour|shape) is the thing {PLACE}", text):
        (thing_there,) = (thing for thing in things if thing["at"] == CELLS[match[2]])
        return str(thing_there[match[1]])
    if match := re.fullmatch(rf"(?:what|how) (colour|shape|pattern|large) (?:is|has) the {noun}", text):
        return str(the(match[2], things)[match[1] if match[1] != "large" else "size"])
    if match := re.fullmatch(rf"where is the {noun}", text):
        return {cell: place for place, cell in CELLS.items()}[the(match[1], things)["at"]]  # type: ignore[index]
    if match := re.fullmatch(rf"how many {noun} are there", text):
        return NUMBERS[sum(is_noun(match[1], thing) for thing in things)]
    if match := re.fullmatch(rf"is there {noun}", text):
        return "yes" if any(is_noun(match[1], thing) for thing in things) else "no"
    match = re.fullmatch(rf"is the {noun} (left of|right of|above|below) the {noun}", text)
    assert match, text
    one, other = the(match[1], things)["at"], the(match[3], things)["at"]
    (down, right), (rows, columns) = SIDES[match[2]], (one[i] - other[i] for i in (0, 1))  # type: ignore[index]
    return "yes" if rows * down > 0 or columns * right > 0 else "no"


def test_each_answer_is_the_one_that_the_words_ask_for() -> None:
    train, val = plans(SceneQuestions, "train", 4500), plans(SceneQuestions, "val", 500)
    assert [example for example in train + val if answer_of(example) != example.answer] == []
    assert all(len(example.views[0].scene.things) == 3 for example in train if example.kind == "count")
    for kind, answers in ANSWERS.items():  # each kind and each answer of it is as likely
        counts = Counter(example.answer for example in train if example.kind == kind)
        assert counts.total() == pytest.approx(len(train) / len(ANSWERS), rel=0.2)
        assert set(counts) == set(answers)
        for count in counts.values():
            expected = counts.total() / len(answers)
            assert abs(count - expected) < 4.5 * expected**0.5, (kind, counts)


# ---- sentences about two scenes ----------------------------------------------------------------------------
def comparison_is_true(example: PlannedExample) -> bool:
    """Whether the sentence is true, by its words and the scenes alone."""
    text, (left, right) = example.text, (things_of(view) for view in example.views)
    grounds = [view.scene.background for view in example.views]
    if match := re.fullmatch(rf"{A} in the left picture, {A} in the right", text):
        return any(is_noun(match[1], t) for t in left) and any(is_noun(match[2], t) for t in right)
    if match := re.fullmatch(
        rf"{A} is in (the left picture|the right picture|both pictures|only one picture|no picture)", text
    ):
        here, there = (any(is_noun(match[1], t) for t in side) for side in (left, right))
        return {
            "the left picture": here,
            "the right picture": there,
            "both pictures": here and there,
            "only one picture": here != there,
            "no picture": not here and not there,
        }[match[2]]
    if match := re.fullmatch(r"there are (\w+) things in all", text):
        return len(left) + len(right) == NUMBERS.index(match[1])
    if text == "both pictures are on the same background":
        return grounds[0] == grounds[1]
    if text == "the pictures are not on the same background":
        return grounds[0] != grounds[1]
    match = re.fullmatch(r"(both pictures are|only one picture is) on (\w+)", text)
    assert match, text
    return grounds.count(match[2]) == (2 if match[1] == "both pictures are" else 1)


def test_each_label_is_what_the_words_say() -> None:
    """And each sentence comes with four pairs, two of them true, so that the sentence alone says nothing."""
    train, val = plans(SceneComparisons, "train", 4800), plans(SceneComparisons, "val", 800)
    assert [example for example in train + val if str(comparison_is_true(example)) != example.answer] == []
    orders: Counter[str] = Counter()
    for start in range(0, len(train), 4):
        four = train[start : start + 4]
        assert len({example.text for example in four}) == len({example.group for example in four}) == 1
        orders["".join(example.answer[0] for example in four)] += 1
        assert len({example.views for example in four}) == 4
    assert set(orders) == {"FFTT", "FTFT", "FTTF", "TFFT", "TFTF", "TTFF"}  # by lot
    assert min(orders.values()) > 0.7 * len(train) / 24
    # split-set-pair-sentence as in NLVR2; the group leaves out the pair
    assert [example.id for example in train[4:8]] == [f"train-1-{pair}-0" for pair in range(4)]
    assert {example.group for example in train[4:8]} == {"train-1-0"}
    assert len({example.id for example in train}) == len(train)
    often = {"left": 3 / 13, "right": 3 / 13, "both": 2 / 13}
    for split, shares in ((train, often), (val, dict.fromkeys(KINDS, 1 / 8))):
        counts = Counter(example.kind for example in split[::4])
        assert set(counts) == set(KINDS)
        for kind, count in counts.items():
            expected = shares.get(kind, 1 / 13) * len(split) / 4
            assert abs(count - expected) < 4.5 * expected**0.5, counts


# ---- hypotheses --------------------------------------------------------------------------------------------
def cells_of(line: str) -> list[tuple[int, int]]:
    """The cells of "top row" and the like, as (row, column)."""
    word, kind = line.split()
    return [(ORDER[word], i) if kind == "row" else (i, ORDER[word]) for i in range(3)]


def hypothesis_is_true(text: str, things: list[Thing], background: str) -> bool:
    """Whether a hypothesis is true of an image in which all can be seen, by its words alone."""
    if match := re.fullmatch(rf"no thing is {PLACE}", text):
        return all(thing["at"] != CELLS[match[1]] for thing in things)
    if match := re.fullmatch(rf"{A} is {PLACE} and {A} {PLACE}", text):
        claims = ((match[1], match[2]), (match[3], match[4]))
        return all(any(is_noun(n, t) and t["at"] == CELLS[p] for t in things) for n, p in claims)
    if match := re.fullmatch(rf"{A} is in the (\w+ (?:row|column))", text):
        return any(is_noun(match[1], thing) and thing["at"] in cells_of(match[2]) for thing in things)
    if match := re.fullmatch(rf"{A} is {PLACE}", text):
        return any(is_noun(match[1], thing) and thing["at"] == CELLS[match[2]] for thing in things)
    if match := re.fullmatch(rf"{A} is on (\w+)", text):
        return match[2] == background and any(is_noun(match[1], thing) for thing in things)
    match = re.fullmatch(rf"{A} is (left of|right of|above|below) {A}", text)
    assert match, text
    down, right = SIDES[match[2]]
    pairs = [(a["at"], b["at"]) for a in things for b in things if is_noun(match[1], a) and is_noun(match[3], b)]
    return any((a[0] - b[0]) * down > 0 or (a[1] - b[1]) * right > 0 for a, b in pairs)  # type: ignore[index]


def thing_of(noun: str) -> Thing:
    """A thing that the noun fits."""
    match = re.fullmatch(NOUN, noun)
    assert match
    words = zip(match.groups(), ("large", "plain", "red", "star"), strict=True)
    size, pattern, colour, shape = (default if word in (None, "thing") else word for word, default in words)
    return {"size": size, "pattern": pattern, "colour": colour, "shape": shape}


def by_brute_force(text: str, view: View, most: int = 3) -> str:
    """The class, from every way to fill the hidden cells with up to `most` of what the hypothesis speaks of."""
    visible, background = things_of(view), view.scene.background
    nouns = [match[0] for match in re.finditer(NOUN, text)]
    kinds = [None, *map(thing_of, nouns)]
    truths = set()
    for behind in product(kinds, repeat=3):
        if sum(kind is not None for kind in behind) > most:
            continue
        hidden = [kind | {"at": at} for kind, at in zip(behind, cells_of(str(view.curtain)), strict=True) if kind]
        truths.add(hypothesis_is_true(text, visible + hidden, background))
    return "neutral" if len(truths) == 2 else "entailment" if truths == {True} else "contradiction"


def test_each_class_is_what_could_stand_behind_the_curtain() -> None:
    """One thing behind is enough to settle it: whether a scene may hold three things or more makes no difference."""
    train, val = plans(SceneHypotheses, "train", 3000), plans(SceneHypotheses, "val", 900)
    for most, some in ((1, train[:1000]), (3, train[:500] + val[:200])):
        assert [t for t in some if by_brute_force(t.text, t.views[0], most) != t.answer] == []
    for example in train:  # nothing is drawn that the curtain hides
        (view,) = example.views
        assert not {thing["at"] for thing in things_of(view)} & set(cells_of(str(view.curtain)))
        assert 1 <= len(view.scene.things) <= 2
    for split, shares in ((train, {"place": 8 / 14, "region": 2 / 14}), (val, dict.fromkeys(SAY, 1 / 6))):
        counts = Counter((example.kind, example.answer) for example in split)
        assert set(counts) == set(product(SAY, LABELS))
        for (kind, _), count in counts.items():
            expected = shares.get(kind, 1 / 14) / 3 * len(split)
            assert abs(count - expected) < 4.5 * expected**0.5, counts
