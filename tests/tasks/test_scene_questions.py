"""Questions about scenes: one true answer each, which their words do not give away."""

import re
from collections import Counter

import pytest
from scene_probe import (
    CELLS,
    GROUNDS,
    NOUN,
    PLACE,
    Thing,
    blind_accuracy,
    features_of,
    is_noun,
    noise_bound,
    things_of,
    words_of,
    worst_lean,
)

from maskvlm.data.scenes.examples import PlannedExample, SceneExamples
from tasks.vqa.scenes import ANSWERS, SceneQuestions

GROUP_FREE_NOUN = re.sub(r"\((?!\?)", "(?:", NOUN)
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
NUMBERS = ["none", "one", "two", "three"]


def the(noun: str, things: list[Thing]) -> Thing:
    """The one thing of that noun."""
    matches = [thing for thing in things if is_noun(noun, thing)]
    assert len(matches) == 1, (noun, things)
    return matches[0]


def answer_of(example: PlannedExample) -> str:
    """The answer, by the question's words and the scene alone."""
    text, things, noun = example.text, things_of(example.views[0]), rf"({GROUP_FREE_NOUN})"
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


@pytest.fixture(scope="module")
def train() -> list[PlannedExample]:
    split = SceneQuestions(train=18000).split("train")
    return [split.plan(index) for index in range(len(split))]


@pytest.fixture(scope="module")
def val() -> list[PlannedExample]:
    split = SceneQuestions(val=4500).split("val")
    return [split.plan(index) for index in range(len(split))]


def test_each_answer_is_the_one_that_the_words_ask_for(train: list[PlannedExample], val: list[PlannedExample]) -> None:
    wrong = [
        (example.text, example.answer, example.views[0].scene.key)
        for example in train + val
        if answer_of(example) != example.answer
    ]
    assert wrong == []
    assert {example.kind for example in train} == set(ANSWERS)


def test_every_answer_of_a_kind_is_as_likely(train: list[PlannedExample]) -> None:
    for kind, answers in ANSWERS.items():
        counts = Counter(example.answer for example in train if example.kind == kind)
        total = counts.total()
        assert total == pytest.approx(len(train) / len(ANSWERS), rel=0.1)
        assert set(counts) == set(answers)
        for count in counts.values():
            expected = total / len(answers)
            assert abs(count - expected) < 4.5 * expected**0.5, (kind, counts)


@pytest.mark.parametrize("kind", ANSWERS)
def test_the_words_do_not_tell_the_answer(kind: str, train: list[PlannedExample], val: list[PlannedExample]) -> None:
    """No word leans to an answer, and a classifier of words guesses as well as chance, within 4 deviations."""
    ours, theirs = ([example for example in split if example.kind == kind] for split in (train, val))
    sets = [
        ([words_of(example.text) for example in split], [example.answer for example in split])
        for split in (ours, theirs)
    ]
    z, where = worst_lean(*sets[0])
    assert z < 4.5, where
    assert blind_accuracy(sets[0], sets[1]) < noise_bound(1 / len(ANSWERS[kind]), len(theirs))


@pytest.mark.parametrize("kind", ["existence", "relation"])
def test_the_images_do_not_tell_yes_from_no(kind: str, train: list[PlannedExample]) -> None:
    ours = [example for example in train if example.kind == kind]
    z, where = worst_lean([features_of(example.views) for example in ours], [example.answer for example in ours])
    assert z < 4.5, where


def test_the_probe_finds_a_planted_leak(train: list[PlannedExample]) -> None:
    """One answer in ten given away by a word is found by both probes."""
    ours = [example for example in train if example.kind == "existence"]
    words = [words_of(example.text) for example in ours]
    answers = [
        "yes" if "red" in own_words and place % 2 else example.answer
        for place, (own_words, example) in enumerate(zip(words, ours, strict=True))
    ]
    assert worst_lean(words, answers)[0] > 4.5
    half = len(ours) // 2
    leaky = [
        "yes" if "red" in own_words or "blue" in own_words else example.answer
        for own_words, example in zip(words, ours, strict=True)
    ]
    assert blind_accuracy((words[:half], leaky[:half]), (words[half:], leaky[half:])) > noise_bound(0.5, half)


def test_most_scenes_hold_something_to_confuse(train: list[PlannedExample]) -> None:
    """Two things or more in three of five; of them many share a word of the question."""
    assert sum(len(example.views[0].scene.things) > 1 for example in train) / len(train) > 0.6
    assert all(len(example.views[0].scene.things) == 3 for example in train if example.kind == "count")


def test_labels_are_all_answers_sorted() -> None:
    labels = SceneQuestions().labels
    assert len(labels) == 42
    assert list(labels) == sorted(set(labels))
    assert {"none", "top left", "yes", "mint", "striped", *GROUNDS} <= set(labels)
    assert SceneQuestions().targets(["yes"]) == {"yes": 1.0}


GOLDEN = [
    ("what is the background", "white"),
    ("what colour is the background", "mint"),
    ("how many striped things are there", "three"),
    ("how large is the plain yellow star", "small"),
    ("how large is the striped red star", "large"),
    ("how large is the yellow cross", "large"),
]


def test_the_same_questions_on_every_machine() -> None:
    """Written out: other questions from the same seed need another VERSION in scene_examples."""
    split: SceneExamples = SceneQuestions().split("train")
    assert [(split.plan(i).text, split.plan(i).answer) for i in range(len(GOLDEN))] == GOLDEN
