"""The scoring command: what it prints, and one error for each kind of wrong file."""

import json
from pathlib import Path
from typing import Any

import pytest

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


def test_the_table_and_one_line_of_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert main(["r.json", "a.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "overall": pytest.approx(47.5),
        "perAnswerType": {"number": pytest.approx(60), "other": pytest.approx(65), "yes/no": 0},
        "perQuestionType": {"how many": pytest.approx(60), "is the": 0, "what is": pytest.approx(65)},
        "questions": 4,
    }


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


WRONG: list[tuple[str, Any, str]] = [
    ("r.json", [result(10, "x"), {"question_id": 11}], "r.json [1]: key 'answer'"),
    ("r.json", [{"question_id": 10, "answer": 2}], "r.json [0]: 'answer' is int"),
    ("r.json", [*RESULTS, result(12, "cat")], "r.json [4]: question_id 12 is also that of position 1"),
    ("r.json", RESULTS[:2], "r.json: no answer to 2 of 4 questions of a.json, the first is 10"),
    ("r.json", [*RESULTS, result(9, "x"), result(8, "x")], "r.json: 2 of 6 question ids are not in a.json"),
    ("a.json", {"annotations": []}, "a.json: no annotations"),
    ("q.json", {"questions": QUESTIONS[1:]}, "a.json: 1 of 4 question ids are not in q.json, the first is 10"),
    ("q.json", {"questions": [*QUESTIONS, {"question_id": 14}]}, "a.json: no annotation to 1 of 5 questions"),
    ("q.json", {"questions": QUESTIONS * 2}, "q.json questions[4]: question_id 10"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_wrong_files(files: Path, name: str, content: Any, message: str) -> None:
    Path(name).write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        main(["r.json", "a.json", "--questions", "q.json"])
    assert str(caught.value).startswith(message)
    assert caught.value.code == ExitCode.BAD_DATA
    Path(name).unlink()
    with pytest.raises(UserError, match=f"{name}: no such file"):
        main(["r.json", "a.json", "--questions", "q.json"])
