"""The list of answers, their weights in training, and the reader of annotations."""

import json
from collections.abc import Callable
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

WORDS = st.sampled_from(
    ["yes", "no", "two", "2", "Two.", "a", "the dog", "dog", "red,blue", "1,000", "dont", "-", " x "]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def written(path: Path, content: Any) -> Path:
    """Bytes and text as they are, all else as JSON."""
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
    return path


def complaint(read: Callable[[Path], Any], path: Path) -> UserError | None:
    """The user's error, if it is one; any other exception goes through."""
    try:
        read(path)
    except UserError as error:
        return error
    return None


def annotation(number: int, majority: str | None, *answers: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"question_id": number, "answers": [{"answer": answer} for answer in answers or ["x"]]}
    return entry if majority is None else {**entry, "multiple_choice_answer": majority}


# ------------------------------------------------------------------ building


def test_frequent_answers_in_normal_form_and_in_order() -> None:
    answers = ["two"] * 2 + ["2"] + ["The dog", "a dog"] + ["cat"] * 2 + ["rare"] + ["a", "the"] + ["Bee"] * 2
    assert build_vocabulary(answers, 2) == ("2", "", "bee", "cat", "dog")
    assert build_vocabulary(answers, 3) == ("2",)
    assert build_vocabulary(answers, 1)[-1] == "rare"


def test_nine_questions_are_the_usual_threshold() -> None:
    assert build_vocabulary(["yes"] * 9 + ["no"] * 8) == ("yes",)


def test_no_threshold_below_one() -> None:
    with pytest.raises(UserError, match="min_count: 0 is too small"):
        build_vocabulary([], 0)


@given(st.lists(WORDS | st.text(max_size=5), max_size=30), st.integers(1, 3), st.randoms())
def test_the_order_of_questions_does_not_matter(answers: list[str], least: int, chance: Any) -> None:
    built = build_vocabulary(answers, least)
    counts = {answer: sum(normalise(other) == answer for other in answers) for answer in built}
    assert all(count >= least for count in counts.values())
    assert list(built) == sorted(built, key=lambda answer: (-counts[answer], answer))
    assert set(map(normalise, answers)) - set(built) == {a for a in map(normalise, answers) if a not in counts}
    chance.shuffle(answers)
    assert build_vocabulary(answers, least) == built


@given(st.text(max_size=20))
def test_no_comma_is_left(answer: str) -> None:
    """The usual list's rule removes commas once more at the end; normalising has done so already."""
    assert "," not in normalise(answer)


def test_rooms_have_97_frequent_answers(shared_data: Path) -> None:
    entries = read_annotations(shared_data / "daquar_vqa" / "v2_daquar_train_annotations.json")
    built = build_vocabulary(entry.majority for entry in entries)
    assert len(built) == 97
    assert built[:4] == ("2", "table", "chair", "3")


# ------------------------------------------------------------------ weights


def test_soft_targets_of_ten_people() -> None:
    answers = ["net"] * 4 + ["mesh"] * 3 + ["two", "2"] + ["The fence"]
    assert soft_targets(answers) == {"net": 1, "mesh": 0.9, "2": 0.6, "fence": 0.3}
    assert soft_targets(["net"] * 9 + ["x"]) == {"net": 1, "x": 0.3}


def test_soft_targets_of_other_numbers() -> None:
    assert soft_targets(["Red"]) == {"red": 1}
    assert soft_targets(["red", "blue"]) == {"red": 0.5, "blue": 0.5}
    assert soft_targets([]) == {}


@given(st.lists(WORDS, min_size=2, max_size=12))
def test_a_soft_target_is_the_accuracy_of_that_answer(answers: list[str]) -> None:
    """Where people differ; where all gave the same text, the metric does not normalise."""
    if len({answer.strip() for answer in answers}) > 1:
        worth = {answer: accuracy(answer, answers) for answer in map(normalise, answers)}
        assert soft_targets(answers) == worth


def test_shares() -> None:
    assert answer_shares(["two", "2", "2", "dog"]) == {"2": 0.75, "dog": 0.25}
    assert answer_shares([]) == {}


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
        ("a.json", {"no": 1, "café": 2, "yes": 0}),
        ("a.json", b'\xef\xbb\xbf["yes", "no", "caf\xc3\xa9"]'),
        ("a.JSON", ["yes", "no", "café"]),
        ("a.txt", "yes\nno\ncafé\n"),
        ("a.txt", "yes\nno\ncafé"),
        ("a.txt", "\ufeffyes\nno\ncafé"),
        ("answers", "yes\r\nno\r\ncafé\r\n"),
    ],
)
def test_forms_of_a_list(tmp_path: Path, name: str, content: Any) -> None:
    assert read_vocabulary(str(written(tmp_path / name, content))) == ("yes", "no", "café")


def test_an_empty_answer_in_json(tmp_path: Path) -> None:
    assert read_vocabulary(written(tmp_path / "a.json", {"": 0, "x": 1})) == ("", "x")


@pytest.mark.parametrize(
    ("name", "content", "where", "what"),
    [
        ("a.json", ["yes", "no", "yes"], "a.json answer 2", "'yes' appears twice, first at 0"),
        ("a.txt", "yes\nno\nno\n", "a.txt:3", "'no' appears twice, first at 2"),
        ("a.json", {"yes": 0, "no": 2}, "a.json", "index 2 of 'no' is not one of 0 to 1"),
        ("a.json", {"yes": -1, "no": 0}, "a.json", "index -1 of 'yes' is not"),
        ("a.json", {"yes": 0, "no": True}, "a.json", "index True of 'no' is not"),
        ("a.json", {"yes": 0, "no": "1"}, "a.json", "index '1' of 'no' is not"),
        ("a.json", {"yes": 0, "no": 0}, "a.json", "'yes' and 'no' have the same index 0"),
        ("a.json", b'{"yes": 0, "no": 1, "yes": 2}', "a.json", "key 'yes' appears twice"),
        ("a.json", ["yes", 2], "a.json answer 1", "int instead of an answer"),
        ("a.json", b'["yes", "\\ud800"]', "a.json answer 1", "half a surrogate pair"),
        ("a.json", 3, "a.json", "int instead of a list of answers"),
        ("a.json", [], "a.json", "no answers"),
        ("a.json", {}, "a.json", "no answers"),
        ("a.json", '["yes",\n', "a.json:2", "not JSON"),
        ("a.json", "", "a.json", "empty file"),
        ("a.json", b"\xff", "a.json", "not UTF-8"),
        ("a.txt", b"yes\n\xff", "a.txt:2", "not UTF-8 text (byte 0"),
        ("a.txt", "yes\n\nno", "a.txt:2", "an empty line"),
        ("a.txt", "", "a.txt", "no answers"),
    ],
)
def test_refused_lists(tmp_path: Path, name: str, content: Any, where: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        read_vocabulary(written(tmp_path / name, content))
    assert caught.value.where == str(tmp_path / where)
    assert what in caught.value.what
    assert caught.value.code == ExitCode.BAD_DATA


@given(JSON | st.binary(max_size=20), st.sampled_from(["a.json", "a.txt"]))
def test_any_other_content_is_the_users_error(tmp_path_factory: Any, content: Any, name: str) -> None:
    path = written(tmp_path_factory.getbasetemp() / name, content)
    for read in (read_vocabulary, lambda path: tuple(read_annotations(path))):
        error = complaint(read, path)
        assert error is None or ("\n" not in str(error) and error.where.startswith(str(path)))


# ------------------------------------------------------------------ annotations


def test_annotations_as_distributed(shared_data: Path) -> None:
    path = shared_data / "daquar_vqa" / "v2_daquar_val_annotations.json"
    entries = list(read_annotations(path))
    assert len(entries) == 1360
    assert entries[0] == (300001, ["desk"] * 10, f"{path} annotations[0]", "desk", "what is", "other", 3)


def test_types_and_majority_may_be_absent(shared_data: Path) -> None:
    first = next(read_annotations(shared_data / "formats" / "vqav2" / "annotations.json"))
    assert first.answers[2:5] == ["net", "netting", "net"]
    assert first[3:6] == ("", "", "")


@pytest.mark.parametrize(
    ("entries", "where", "what"),
    [
        ([annotation(1, None), {"question_id": 2}], "annotations[1]", "key 'answers' is missing"),
        ([{"question_id": 2, "answers": []}], "annotations[0]", "a question without answers"),
        ([{"question_id": 2, "answers": ["x"]}], "annotations[0].answers[0]", "str instead of an object with 'answer'"),
        (
            [{"question_id": 2, "answers": [{"answer": 2}]}],
            "annotations[0].answers[0]",
            "'answer' is int instead of str",
        ),
        ([{"answers": [{"answer": "x"}]}], "annotations[0]", "key 'question_id' is missing"),
        ([annotation(True, None)], "annotations[0]", "'question_id' is bool instead of int"),
        (
            [annotation(7, None), annotation(8, None), annotation(7, None)],
            "annotations[2]",
            "7 is also that of position 0",
        ),
        ([annotation(1, None, "\ud800")], "annotations[0].answers[0]", "half a surrogate pair"),
        ([{**annotation(1, None), "answer_type": 3}], "annotations[0]", "'answer_type' is int instead of str"),
        ([[]], "annotations[0]", "list instead of an object with 'answers'"),
    ],
)
def test_refused_annotations(tmp_path: Path, entries: list[Any], where: str, what: str) -> None:
    path = written(tmp_path / "a.json", {"annotations": entries})
    with pytest.raises(UserError) as caught:
        list(read_annotations(path))
    assert caught.value.where == f"{path} {where}"
    assert what in caught.value.what


# ------------------------------------------------------------------ the command


def test_the_command_writes_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = written(tmp_path / "t.json", {"annotations": [annotation(1, "Two"), annotation(2, "café")]})
    val = written(
        tmp_path / "v.json", {"annotations": [annotation(1, "2"), annotation(3, "Café!"), annotation(4, "x")]}
    )
    out = tmp_path / "answers.json"
    assert main([str(train), str(val), "--min-count", "2", "--out", str(out)]) == 0
    assert read_vocabulary(out) == ("2", "café")
    assert out.read_text(encoding="utf-8") == '[\n"2",\n"café"\n]\n'
    assert capsys.readouterr().out == f"{out}: 2 answers\n"


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (
            ["--out", "x.json"],
            "the following arguments are required: annotations. See maskvlm vqa.vocabulary --help",
            ExitCode.USAGE,
        ),
        (["{file}"], "the following arguments are required: --out", ExitCode.USAGE),
        (["{file}", "--out", "x.txt"], "--out: 'x.txt' does not end in .json", ExitCode.USAGE),
        (["{file}", "--out", "x.json", "--min-count", "0"], "min_count: 0 is too small", ExitCode.USAGE),
        (
            ["{file}", "--out", "x.json", "--min-count", "few"],
            "argument --min-count: invalid int value",
            ExitCode.USAGE,
        ),
        (["{file}", "--out", "x.json", "--min", "2"], "unrecognized arguments: --min", ExitCode.USAGE),
        (["{file}", "--out", "x.json"], "no answer is shared by 9 questions", ExitCode.BAD_DATA),
        (["none.json", "--out", "x.json"], "none.json: no such file", ExitCode.MISSING_INPUT),
        (["{file}", "--out", "no/x.json", "--min-count", "1"], "no/x.json: cannot be written", ExitCode.CANNOT_CREATE),
        (["{bare}", "--out", "x.json"], "{bare} annotations[1]: no multiple_choice_answer", ExitCode.BAD_DATA),
    ],
)
def test_refused_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str, code: ExitCode
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"file": "a.json", "bare": "b.json"}
    written(tmp_path / "a.json", {"annotations": [annotation(1, "x")]})
    written(tmp_path / "b.json", {"annotations": [annotation(1, "x"), annotation(2, None)]})
    with pytest.raises(UserError) as caught:
        main([argument.format(**names) for argument in arguments])
    assert message.format(**names) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.code == code
    assert not (tmp_path / "x.json").exists()
