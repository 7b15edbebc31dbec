"""Answers and their metrics: cases written out by hand."""

import math

from toy_examples import example, example_batch, take_examples

from maskvlm.objectives.answers import ScoredExample, ScoredExamples, majority, percent


def scored(*rows: tuple[str, float | None, str, list[str]]) -> list[ScoredExample]:
    """Examples by (prediction, right, kind, answers)."""
    return [
        ScoredExample(number, example(number, kind=kind, answers=answers), prediction, right)
        for number, (prediction, right, kind, answers) in enumerate(rows)
    ]


def same(prediction: str, answers: list[str]) -> float | None:
    return float(prediction == answers[0]) if answers else None


def test_percent_leaves_out_what_nobody_knows() -> None:
    known = scored(("a", 1.0, "", ["a"]), ("a", 0.0, "", ["b"]), ("a", None, "", []), ("a", 0.3, "", ["c"]))
    assert math.isclose(percent(known), 130 / 3)
    assert math.isnan(percent(scored(("a", None, "", []))))


def test_majority_answers_the_usual_of_each_kind_by_the_tasks_own_rule() -> None:
    """`yes` is usual of the first kind (2 of 3 right), `2` of the second (2 of 4); the nameless one's is right."""
    first = [("x", 0, "is", [answer]) for answer in ("yes", "yes", "no")]
    second = [("x", 0, "count", [answer]) for answer in ("2", "1", "3", "2")]
    assert majority(scored(*first, *second, ("x", 0, "", ["deep"]), ("x", None, "is", [])), same) == 100 * 5 / 8
    assert math.isnan(majority(scored(("x", None, "is", [])), same))
    rows = scored(("x", 0, "", ["a", "a", "b"]), ("x", 0, "", ["b", "b", "a"]), ("x", 0, "", ["a", "a", "a"]))
    level = majority(rows, lambda word, answers: answers.count(word) / 3)
    assert math.isclose(level, 100 * (2 / 3 + 1 / 3 + 1) / 3)


def test_answers_come_back_in_the_order_of_the_split_and_once() -> None:
    batch, examples = example_batch(5), ScoredExamples()
    examples.add(take_examples(batch, 3, 5), ["d", "e"], [1.0, None])
    examples.add(take_examples(batch, 0, 3), ["a", "b", "c"], [0.0, 1.0, 1.0])
    every = examples.all()
    expected = [(0, "a", 0.0), (1, "b", 1.0), (2, "c", 1.0), (3, "d", 1.0), (4, "e", None)]
    assert [(one.row, one.prediction, one.correct) for one in every] == expected
    assert [one.example["id"] for one in every] == [f"{1000 + number}" for number in range(5)]
    assert examples.all() == []
