"""The list of answers, their weights in training, and the reader of annotations."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvlm.utils.errors import ExitCode, UserError
from tasks.vqa.metric import accuracy, normalise
from tasks.vqa.vocabulary import (
    answer_shares,
    build_vocabulary,
    main,
    read_annotations,
    read_vocabulary,
    soft_targets,
)

WORDS = st.sampled_from(["yes", "two", "2", "Two.", "a", "the dog", "dog", "red,blue", "1,000", "dont", "-", " x "])


def written(path: Path, content: Any) -> Path:
    """Bytes and text as they are, all else as JSON."""
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
    return path


def annotation(number: int, majority: str | None, *answers: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"question_id": number, "answers": [{"answer": answer} for answer in answers or ["x"]]}
    return entry if majority is None else {**entry, "multiple_choice_answer": majority}


def test_frequent_answers_in_normal_form_and_in_order() -> None:
    answers = ["two"] * 2 + ["2"] + ["The dog", "a dog"] + ["cat"] * 2 + ["rare"] + ["a", "the"] + ["Bee"] * 2
    assert build_vocabulary(answers, 2) == ("2", "", "bee", "cat", "dog")
    assert build_vocabulary(answers[::-1], 2) == ("2", "", "bee", "cat", "dog")
    assert build_vocabulary(answers, 3) == ("2",)
    assert build_vocabulary(answers, 1)[-1] == "rare"
    assert build_vocabulary(["yes"] * 9 + ["no"] * 8) == ("yes",)  # nine is the usual threshold
    with pytest.raises(UserError, match="min_count"):
        build_vocabulary([], 0)


def test_soft_targets_and_shares() -> None:
    answers = ["net"] * 4 + ["mesh"] * 3 + ["two", "2"] + ["The fence"]
    assert soft_targets(answers) == {"net": 1, "mesh": 0.9, "2": 0.6, "fence": 0.3}
    assert soft_targets(["net"] * 9 + ["x"]) == {"net": 1, "x": 0.3}
    assert soft_targets(["Red"]) == {"red": 1}
    assert soft_targets(["red", "blue"]) == {"red": 0.5, "blue": 0.5}
    assert answer_shares(["two", "2", "2", "dog"]) == {"2": 0.75, "dog": 0.25}
    assert soft_targets([]) == answer_shares([]) == {}


@given(st.lists(WORDS, min_size=2, max_size=12))
def test_a_soft_target_is_the_accuracy_of_that_answer(answers: list[str]) -> None:
    """Where people differ; where all gave the same text, the metric does not normalise."""
    if len({answer.strip() for answer in answers}) > 1:
        worth = {answer: accuracy(answer, answers) for answer in map(normalise, answers)}
        assert soft_targets(answers) == worth


# ------------------------------------------------------------------ given lists


def test_the_usual_list(shared_data: Path) -> None:
    path = shared_data / "formats" / "vqav2" / "trainval_ans2label.json"
    answers = read_vocabulary(path)
    assert len(answers) == 3129
    assert {answer: index for index, answer in enumerate(answers)} == json.loads(path.read_text())
    assert [normalise(answer) for answer in answers] == list(answers)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", ["yes", "no", "café"]),
        ("a.JSON", {"no": 1, "café": 2, "yes": 0}),
        ("a.txt", "\ufeffyes\nno\ncafé"),
        ("answers", "yes\r\nno\r\ncafé\r\n"),
    ],
)
def test_forms_of_a_list(tmp_path: Path, name: str, content: Any) -> None:
    assert read_vocabulary(str(written(tmp_path / name, content))) == ("yes", "no", "café")
    assert read_vocabulary(written(tmp_path / "b.json", {"": 0, "x": 1})) == ("", "x")


LISTS: list[tuple[str, Any, str]] = [
    ("a.json", ["yes", "no", "yes"], "a.json answer 2: 'yes' appears twice"),
    ("a.txt", "yes\nno\nno\n", "a.txt:3: 'no' appears twice"),
    ("a.json", {"yes": 0, "no": 2}, "index 2 of 'no'"),
    ("a.json", {"yes": 0, "no": True}, "index True of 'no'"),
    ("a.json", {"yes": 0, "no": 0}, "same index 0"),
    ("a.json", b'{"yes": 0, "no": 1, "yes": 2}', "'yes'"),
    ("a.json", ["yes", 2], "answer 1"),
    ("a.json", b'["yes", "\\ud800"]', "surrogate"),
    ("a.json", [], "no answers"),
    ("a.txt", b"yes\n\xff", "a.txt:2"),
    ("a.txt", "yes\n\nno", "a.txt:2"),
]


@pytest.mark.parametrize(("name", "content", "message"), LISTS)
def test_refused_lists(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_vocabulary(written(tmp_path / name, content))
    assert caught.value.code == ExitCode.BAD_DATA


# ------------------------------------------------------------------ annotations


def test_annotations_as_distributed(shared_data: Path) -> None:
    folder = shared_data / "daquar_vqa"
    path = folder / "v2_daquar_val_annotations.json"
    entries = list(read_annotations(path))
    assert len(entries) == 1360
    assert entries[0] == (300001, ["desk"] * 10, f"{path} annotations[0]", "desk", "what is", "other", 3)
    built = build_vocabulary(entry.majority for entry in read_annotations(folder / "v2_daquar_train_annotations.json"))
    assert len(built) == 97
    assert built[:4] == ("2", "table", "chair", "3")
    # types and majority may be absent
    first = next(read_annotations(shared_data / "formats" / "vqav2" / "annotations.json"))
    assert first.answers[2:5] == ["net", "netting", "net"]
    assert first[3:6] == ("", "", "")


ANNOTATIONS: list[tuple[list[Any], str]] = [
    ([annotation(1, None), {"question_id": 2}], r"annotations\[1\]: key 'answers'"),
    ([{"question_id": 2, "answers": []}], r"annotations\[0\]: a question without answers"),
    ([{"question_id": 2, "answers": ["x"]}], r"annotations\[0\]\.answers\[0\]: str"),
    ([{"question_id": 2, "answers": [{"answer": 2}]}], r"answers\[0\]: 'answer' is int"),
    ([annotation(True, None)], "'question_id' is bool"),
    ([annotation(7, None), annotation(8, None), annotation(7, None)], r"annotations\[2\]: .* position 0"),
    ([{**annotation(1, None), "answer_type": 3}], "'answer_type' is int"),
]


@pytest.mark.parametrize(("entries", "message"), ANNOTATIONS)
def test_refused_annotations(tmp_path: Path, entries: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_annotations(written(tmp_path / "a.json", {"annotations": entries})))


# ------------------------------------------------------------------ the command


def test_the_command_writes_a_list(tmp_path: Path) -> None:
    train = written(tmp_path / "t.json", {"annotations": [annotation(1, "Two"), annotation(2, "café")]})
    entries = [annotation(1, "2"), annotation(3, "Café!"), annotation(4, "x")]
    val = written(tmp_path / "v.json", {"annotations": entries})
    out = tmp_path / "answers.json"
    assert main([str(train), str(val), "--min-count", "2", "--out", str(out)]) == 0
    assert read_vocabulary(out) == ("2", "café")
    assert out.read_text(encoding="utf-8") == '[\n"2",\n"café"\n]\n'


def test_refused_commands(tmp_path: Path) -> None:
    few = str(written(tmp_path / "a.json", {"annotations": [annotation(1, "x")]}))
    bare = str(written(tmp_path / "b.json", {"annotations": [annotation(1, "x"), annotation(2, None)]}))
    out = ["--out", str(tmp_path / "x.json")]
    for words, message in (
        ([few, "--out", "x.txt"], "x.txt"),
        ([few, *out, "--min-count", "0"], "min_count"),
        ([few, *out], "no answer is shared by 9 questions"),
        ([bare, *out], r"annotations\[1\]: no multiple_choice_answer"),
    ):
        with pytest.raises(UserError, match=message):
            main(words)
    assert not (tmp_path / "x.json").exists()
