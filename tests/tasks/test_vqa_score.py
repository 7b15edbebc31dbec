"""The scoring command: what it prints, and one line for each kind of wrong file."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvlm.utils.errors import ExitCode, UserError
from tasks.vqa.metric import Mean, VqaAccuracy, normalise
from tasks.vqa.score import main, read_questions, read_results, score_answers


def annotation(number: int, answers: dict[str, int], question: str = "what is", kind: str = "other") -> dict[str, Any]:
    people = [answer for answer, count in answers.items() for _ in range(count)]
    listed = [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(people, 1)]
    return {"question_id": number, "answers": listed, "question_type": question, "answer_type": kind}


def result(number: int, answer: str) -> dict[str, Any]:
    return {"question_id": number, "answer": answer}


ANNOTATIONS = [
    annotation(10, {"yes": 10}, "is the", "yes/no"),
    annotation(11, {"two": 2, "3": 8}, "how many", "number"),
    annotation(12, {"dog": 1, "cat": 9}),
    annotation(13, {"dog": 4, "cat": 6}),
]
RESULTS = [result(13, "The dog."), result(12, "dog"), result(11, "2"), result(10, "no")]  # 1, 0.3, 0.6, 0
QUESTIONS = [{"question_id": number, "image_id": 1, "question": "?"} for number in (10, 11, 12, 13)]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """r.json, a.json and q.json in the working folder, which fit each other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    Path("r.json").write_text(json.dumps(RESULTS))
    Path("a.json").write_text(json.dumps({"annotations": ANNOTATIONS}))
    Path("q.json").write_text(json.dumps({"questions": QUESTIONS}))
    return tmp_path


# ------------------------------------------------------------------ what is printed


def test_the_table(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["r.json", "a.json", "--questions", "q.json"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [row for row in rows if "─" not in row[0]] == [
        ["VQA", "accuracy", "%", "questions"],
        ["overall", "47.50", "4"],
        ["by", "answer", "type"],
        ["other", "65.00", "2"],
        ["number", "60.00", "1"],
        ["yes/no", "0.00", "1"],
        ["by", "question", "type"],
        ["what", "is", "65.00", "2"],
        ["how", "many", "60.00", "1"],
        ["is", "the", "0.00", "1"],
    ]


def test_one_line_of_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["r.json", "a.json", "--json"]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert json.loads(line) == {
        "overall": pytest.approx(47.5),
        "perAnswerType": {"number": pytest.approx(60), "other": pytest.approx(65), "yes/no": 0},
        "perQuestionType": {"how many": pytest.approx(60), "is the": 0, "what is": pytest.approx(65)},
        "questions": 4,
    }


def test_types_with_brackets_are_no_markup(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.json").write_text(json.dumps({"annotations": [annotation(1, {"x": 10}, "[red]which", "")]}))
    Path("r.json").write_text(json.dumps([result(1, "x")]))
    main(["r.json", "a.json"])
    output = capsys.readouterr().out
    assert "[red]which" in output
    assert "answer type" not in output


def test_people_who_agree_in_rooms(shared_data: Path, tmp_path: Path) -> None:
    """All ten answers are the same text there, so those that normalising changes count as wrong in normal form."""
    path = shared_data / "daquar_vqa" / "v2_daquar_val_annotations.json"
    questions = shared_data / "daquar_vqa" / "v2_OpenEnded_daquar_val_questions.json"
    results = tmp_path / "r.json"
    entries = json.loads(path.read_text())["annotations"]
    for form, right in ((str, 1360), (normalise, 1238)):
        answers = [result(entry["question_id"], form(entry["multiple_choice_answer"])) for entry in entries]
        results.write_text(json.dumps(answers))
        measured = score_answers(results, path, questions)
        assert measured.overall.percent == pytest.approx(100 * right / 1360)
        assert measured.overall.questions == 1360
    assert {kind: mean.questions for kind, mean in measured.by_answer_type.items()} == {"number": 180, "other": 1180}


def test_results_of_the_original(shared_data: Path) -> None:
    folder = shared_data / "formats" / "vqav2"
    results = read_results(folder / "OpenEnded_mscoco_train2014_fake_results.json")
    assert results[10] == "16"
    assert len(results) == 10
    assert list(read_questions(folder / "questions.json")) == [458752000, 458752001, 458752002]


def test_the_three_true_questions(shared_data: Path, tmp_path: Path) -> None:
    """net: 6 of 10 people; catcher: 1; orange: all, but in lower case."""
    results = tmp_path / "r.json"
    results.write_text(
        json.dumps([result(458752000, "Net"), result(458752001, "catcher"), result(458752002, "Orange")])
    )
    folder = shared_data / "formats" / "vqav2"
    measured = score_answers(results, folder / "annotations.json", folder / "questions.json")
    assert measured == VqaAccuracy(Mean(measured.overall.percent, 3), {}, {})
    assert measured.overall.percent == pytest.approx(130 / 3)


# ------------------------------------------------------------------ what is refused

BAD = ExitCode.BAD_DATA
WRONG: list[tuple[str, Any, str, ExitCode]] = [
    ("r.json", None, "r.json: no such file", ExitCode.MISSING_INPUT),
    ("a.json", None, "a.json: no such file", ExitCode.MISSING_INPUT),
    ("q.json", None, "q.json: no such file", ExitCode.MISSING_INPUT),
    ("r.json", b'[{"question_id": 1,\n "answer": yes}]', "r.json:2: not JSON (column 12", BAD),
    ("a.json", b"{", "a.json:1: not JSON", BAD),
    ("q.json", b"\xff\xfe", "q.json: not UTF-8 text (byte 0)", BAD),
    ("r.json", {"annotations": []}, "r.json: dict instead of a list of answers. Write [{", BAD),
    ("r.json", [result(10, "x"), {"question_id": 11}], "r.json [1]: key 'answer' is missing", BAD),
    ("r.json", [{"answer": "x"}], "r.json [0]: key 'question_id' is missing", BAD),
    ("r.json", ["x"], "r.json [0]: str instead of an object with 'question_id'", BAD),
    ("r.json", [{"question_id": "10", "answer": "x"}], "r.json [0]: 'question_id' is str instead of int", BAD),
    ("r.json", [{"question_id": 10, "answer": 2}], "r.json [0]: 'answer' is int instead of str", BAD),
    ("r.json", [*RESULTS, result(12, "cat")], "r.json [4]: question_id 12 is also that of position 1", BAD),
    ("r.json", RESULTS[:2], "r.json: no answer to 2 of 4 questions of a.json, the first is 10", BAD),
    ("r.json", [], "r.json: no answer to 4 of 4 questions of a.json, the first is 10", BAD),
    (
        "r.json",
        [*RESULTS, result(9, "x"), result(8, "x")],
        "r.json: 2 of 6 question ids are not in a.json, the first is 9",
        BAD,
    ),
    ("a.json", [], "a.json: list instead of an object with 'annotations'", BAD),
    ("a.json", {"questions": []}, "a.json: key 'annotations' is missing", BAD),
    ("a.json", {"annotations": []}, "a.json: no annotations", BAD),
    ("a.json", {"annotations": [annotation(10, {})]}, "a.json annotations[0]: a question without answers", BAD),
    ("a.json", {"annotations": [result(10, "x")]}, "a.json annotations[0]: key 'answers' is missing", BAD),
    ("a.json", {"annotations": ANNOTATIONS + ANNOTATIONS[:1]}, "a.json annotations[4]: question_id 10 is also", BAD),
    ("q.json", {"questions": QUESTIONS[1:]}, "a.json: 1 of 4 question ids are not in q.json, the first is 10", BAD),
    (
        "q.json",
        {"questions": [*QUESTIONS, {"question_id": 14}]},
        "a.json: no annotation to 1 of 5 questions of q.json",
        BAD,
    ),
    ("q.json", {"questions": QUESTIONS * 2}, "q.json questions[4]: question_id 10 is also that of position 0", BAD),
    ("q.json", {"questions": 3}, "q.json: 'questions' is int instead of list", BAD),
]


@pytest.mark.parametrize(("name", "content", "message", "code"), WRONG)
def test_wrong_files(files: Path, name: str, content: Any, message: str, code: ExitCode) -> None:
    if content is None:
        Path(name).unlink()
    else:
        Path(name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(UserError) as caught:
        main(["r.json", "a.json", "--questions", "q.json"])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: results, annotations. See maskvlm vqa.score --help"),
        (["r.json"], "the following arguments are required: annotations"),
        (["r.json", "a.json", "q.json"], "unrecognized arguments: q.json"),
        (["r.json", "a.json", "--question", "q.json"], "unrecognized arguments: --question"),
        (["r.json", "a.json", "--questions"], "argument --questions: expected one argument"),
    ],
)
def test_wrong_arguments(files: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.code == ExitCode.USAGE


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(8, 14) | st.sampled_from(["x", "yes", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["question_id", "answer", "answers", "questions"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_other_content_is_the_users_error(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.json"
    path.write_text(json.dumps(content))
    for arguments in ([str(path), str(path)], [str(path), str(path), "--questions", str(path)]):
        with pytest.raises(UserError) as caught:
            main(arguments)
        assert caught.value.where.startswith(str(path))
        assert "\n" not in str(caught.value)
