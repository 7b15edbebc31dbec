"""Answers and their metrics: cases written out by hand."""

import math

from hypothesis import given
from hypothesis import strategies as st
from toy_examples import example, example_batch, take_examples

from maskvlm.objectives.answers import ScoredExample, ScoredExamples, by_kind, majority, percent


def scored(*rows: tuple[str, float | None, str, list[str]]) -> list[ScoredExample]:
    """Examples by (prediction, right, kind, answers)."""
    return [
        ScoredExample(number, example(number, kind=kind, answers=answers), prediction, right)
        for number, (prediction, right, kind, answers) in enumerate(rows)
    ]


def same(prediction: str, answers: list[str]) -> float | None:
    return float(prediction == answers[0]) if answers else None


def test_truth_is_the_most_frequent_answer_and_the_first_of_equals() -> None:
    answer_lists: list[list[str]] = [["b", "a", "a"], ["b", "a"], ["a"], []]
    assert [one.truth for one in scored(*(("x", None, "", answers) for answers in answer_lists))] == ["a", "b", "a", ""]


def test_a_line_of_predictions_holds_what_was_asked_and_said() -> None:
    one = ScoredExample(7, example(2, kind="odd one", answers=["blue", "red", "red"]), "green", 0.5)
    assert one.line == {
        "id": "1002",
        "text": "is number 2 red or green or blue",
        "truth": "red",
        "prediction": "green",
        "right": 0.5,
        "images": ["toy 2 0"],
        "index": [7],
        "kind": "odd one",
    }


def test_percent_leaves_out_what_nobody_knows() -> None:
    known = scored(("a", 1.0, "", ["a"]), ("a", 0.0, "", ["b"]), ("a", None, "", []), ("a", 0.3, "", ["c"]))
    assert math.isclose(percent(known), 130 / 3)
    assert math.isnan(percent(scored(("a", None, "", []))))
    assert math.isnan(percent([]))


def test_kinds_are_sorted_and_the_nameless_left_out() -> None:
    groups = by_kind(scored(("a", 1, "z", ["a"]), ("b", 1, "", ["a"]), ("c", 1, "k", ["a"]), ("d", 1, "z", ["a"])))
    assert {kind: [one.prediction for one in part] for kind, part in groups.items()} == {"k": ["c"], "z": ["a", "d"]}
    assert list(groups) == ["k", "z"]


def test_majority_answers_the_usual_of_each_kind() -> None:
    """`yes` is usual of the first kind (2 of 3 right), `2` of the second (2 of 4); the nameless one's is right."""
    first = [("x", 0, "is", [answer]) for answer in ("yes", "yes", "no")]
    second = [("x", 0, "count", [answer]) for answer in ("2", "1", "3", "2")]
    rows = scored(*first, *second, ("x", 0, "", ["deep"]), ("x", None, "is", []))
    assert majority(rows, same) == 100 * 5 / 8
    assert math.isnan(majority(scored(("x", None, "is", [])), same))


def test_majority_is_judged_by_the_tasks_own_rule() -> None:
    rows = scored(("x", 0, "", ["a", "a", "b"]), ("x", 0, "", ["b", "b", "a"]), ("x", 0, "", ["a", "a", "a"]))
    shares = {"a": [2 / 3, 1 / 3, 1.0]}
    assert math.isclose(majority(rows, lambda word, answers: answers.count(word) / 3), 100 * sum(shares["a"]) / 3)


def test_answers_come_back_in_the_order_of_the_split_and_once() -> None:
    batch, examples = example_batch(5), ScoredExamples()
    examples.add(take_examples(batch, 3, 5), ["d", "e"], [1.0, None])
    examples.add(take_examples(batch, 0, 3), ["a", "b", "c"], [0.0, 1.0, 1.0])
    every = examples.all()
    assert [(one.row, one.prediction, one.correct) for one in every] == [
        (0, "a", 0.0), (1, "b", 1.0), (2, "c", 1.0), (3, "d", 1.0), (4, "e", None),
    ]  # fmt: skip
    assert [one.example["id"] for one in every] == [f"{1000 + number}" for number in range(5)]
    assert examples.all() == []


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")), min_size=1))
def test_no_single_answer_to_a_kind_beats_the_majority(rows: list[tuple[str, str]]) -> None:
    whole = scored(*(("", 0.0, kind, [answer]) for kind, answer in rows))
    level = majority(whole, same)
    for one in "xyz":
        for other in "xyz":
            answer_by_kind = {"a": one, "b": other}
            assert 100 * sum(answer_by_kind[kind] == answer for kind, answer in rows) / len(rows) <= level + 1e-9
