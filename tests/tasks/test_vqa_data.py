"""VQA v2 and Visual Genome's questions as distributed: what is read, skipped, counted and refused."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from maskvlm.data.files import images_by_number
from maskvlm.data.images import safe_open
from maskvlm.data.table import RowOrigin
from maskvlm.utils.errors import ExitCode, UserError
from tasks.vqa.data import VqaV2
from tasks.vqa.genome import parse_genome

PART = "mscoco_train2014"
QUESTIONS, ANNOTATIONS = f"v2_OpenEnded_{PART}_questions.json", f"v2_{PART}_annotations.json"


def question(number: Any = 1, image: Any = 9, text: Any = "What is it?") -> dict[str, Any]:
    return {"question_id": number, "image_id": image, "question": text}


def annotation(number: Any = 1, *answers: str, kind: str = "what is") -> dict[str, Any]:
    """Ten answers, the given ones in turn; the first is the `multiple_choice_answer`."""
    entries = [{"answer": (answers or ("dog",))[i % len(answers or ("dog",))], "answer_id": i + 1} for i in range(10)]
    majority = entries[0]["answer"]
    return {"question_id": number, "answers": entries, "multiple_choice_answer": majority, "question_type": kind}


def write(folder: Path, part: str, questions: Any, annotations: Any = None, *photos: int) -> None:
    (folder / f"v2_OpenEnded_{part}_questions.json").write_text(json.dumps({"questions": questions}))
    if annotations is not None:
        (folder / f"v2_{part}_annotations.json").write_text(json.dumps({"annotations": annotations}))
    place = part.split("_")[1]
    (folder / "images" / place).mkdir(parents=True, exist_ok=True)
    for photo in photos:
        (folder / "images" / place / f"COCO_{place}_{photo:012d}.jpg").touch()


@pytest.fixture
def source(tmp_path: Path) -> Any:
    """A source over the test's folder, whose vocabulary takes every answer."""

    def make(**options: Any) -> VqaV2:
        return VqaV2(str(tmp_path), cache=str(tmp_path / "cache"), **{"min_count": 1, **options})

    return make


def test_a_question_is_an_example_with_ten_answers(source: Any, tmp_path: Path) -> None:
    annotations = [annotation(6), annotation(5, "A dog!", "cat", kind="")]
    write(tmp_path, PART, [question(5, 9, "What  is it?"), question(6, 12)], annotations, 9, 12)
    examples = source().split("train")
    assert len(examples) == 2
    assert examples[0] == {
        "images": [str(tmp_path / "images" / "train2014" / "COCO_train2014_000000000009.jpg")],
        "image_ids": ["coco 9"],
        "text": "What is it?",
        "answers": ["A dog!", "cat"] * 5,
        "id": "5",
        "kind": "",
        "group": "",
        "origin": f"{QUESTIONS} questions[0]",
    }
    assert examples[1]["kind"] == "what is"
    assert examples[-1] == examples[1]
    assert [*examples.image_ids()] == ["coco 9", "coco 12"]
    assert pickle.loads(pickle.dumps(examples))[1] == examples[1]
    with pytest.raises(IndexError):
        examples[2]


def test_labels_are_the_frequent_answers_of_training(source: Any, tmp_path: Path) -> None:
    answers = ["dog", "The dog.", "cat", "cat", "cat", "cow"]
    write(tmp_path, PART, [question(i) for i in range(6)], [annotation(i, answers[i]) for i in range(6)], 9)
    assert source(min_count=2).labels == ("cat", "dog")
    assert source(min_count=3).labels == ("cat",)
    assert source(min_count=2).targets(["dog"] * 3 + ["cow"] * 7) == {"dog": pytest.approx(0.9)}
    assert source(min_count=2).shares(["dog"] * 3 + ["cow"] * 7) == {"dog": pytest.approx(0.3)}
    with pytest.raises(UserError, match=r"data\.source\.min_count"):
        _ = source(min_count=4).labels


def test_a_vocabulary_of_some_of_the_questions_is_refused(source: Any, tmp_path: Path) -> None:
    """It would lack the answers of the others, and nobody would know."""
    some = annotation(7) | {"multiple_choice_answer": ""}
    write(tmp_path, PART, [question(5), question(7), question(9)], [{**some, "question_id": 9}, some, annotation(5)], 9)
    with pytest.raises(UserError, match=r"2 questions have no multiple_choice_answer, .* first is 7") as caught:
        source().split("train")
    assert caught.value.code == ExitCode.BAD_DATA
    (tmp_path / "answers.json").write_text('["dog"]')
    assert len(source(answers=str(tmp_path / "answers.json")).split("train")) == 3


def test_training_skips_questions_without_an_answer_of_the_vocabulary(source: Any, tmp_path: Path) -> None:
    given = (["dog"], ["dog"], ["emu"], ["emu", "ox", "Dogs", "dog"])
    answered = [annotation(i, *answers) for i, answers in enumerate(given)]
    write(tmp_path, PART, [question(i) for i in range(4)], answered, 9)
    (tmp_path / "answers.json").write_text('["dog"]')
    examples = source(answers=str(tmp_path / "answers.json")).split("train")
    assert [examples[i]["id"] for i in range(3)] == ["0", "1", "3"]
    assert examples.skipped == {"answer outside the vocabulary": [f"{QUESTIONS} questions[2]"]}
    assert len(source(answers=str(tmp_path / "answers.json"), val=PART).split("val")) == 4
    (tmp_path / "answers.json").write_text('["cow"]')
    with pytest.raises(UserError, match="no examples are left"):
        source(answers=str(tmp_path / "answers.json")).split("train")


def test_several_parts_are_trained_on_at_once(source: Any, tmp_path: Path) -> None:
    write(tmp_path, PART, [question(1), question(2)], [annotation(1, "dog"), annotation(2, "dog")], 9)
    more = [question(3, 12), question(4, 12, " "), question(5, 12)]
    write(tmp_path, "mscoco_val2014", more, [annotation(3, "cat"), annotation(4), annotation(5, "cow")], 12)
    both = source(train=[PART, "mscoco_val2014"])
    examples = both.split("train")
    assert [examples[i]["id"] for i in range(len(examples))] == ["1", "2", "3", "5"]
    assert both.labels == ("dog", "cat", "cow")
    assert examples[2]["origin"] == "v2_OpenEnded_mscoco_val2014_questions.json questions[0]"
    assert examples.skipped == {"empty text": ["v2_OpenEnded_mscoco_val2014_questions.json questions[1]"]}
    assert [*examples.image_ids()] == ["coco 9", "coco 12"]
    assert examples.fingerprint != source().split("train").fingerprint
    with pytest.raises(UserError, match="2 question_ids stand in more than one of the training parts: 1, 2"):
        source(train=[PART, PART]).split("train")


def test_test_questions_need_no_annotations(source: Any, tmp_path: Path) -> None:
    write(tmp_path, "mscoco_test2015", [question(1, 9)], None, 9)
    examples = source().split("test")
    assert (examples[0]["answers"], examples[0]["kind"]) == ([], "")
    write(tmp_path, "mscoco_test2015", [question(1, 9)], [annotation(1)])
    assert source().split("test")[0]["answers"] == ["dog"] * 10


# ------------------------------------------------------------------ images


def test_the_part_s_own_image_is_preferred() -> None:
    names = [f"{part}2014/COCO_{part}2014_000000000009.jpg" for part in ("train", "val")] + ["vg/9.jpg", "vg/10.jpg"]
    assert images_by_number(names, "mscoco_train2014") == {"coco 9": names[0]}
    assert images_by_number(names, "mscoco_val2014") == {"coco 9": names[1]}
    assert images_by_number(names[2:], "mscoco_val2014") == {"coco 9": "vg/9.jpg", "coco 10": "vg/10.jpg"}


def test_a_few_questions_without_image_are_skipped_in_training_alone(source: Any, tmp_path: Path) -> None:
    ten = range(10)
    write(tmp_path, PART, [question(i, 9 + (i == 4)) for i in ten], [annotation(i) for i in ten], 9)
    examples = source(max_missing=0.1).split("train")
    assert [examples[i]["id"] for i in range(9)] == [str(i) for i in ten if i != 4]
    assert examples.skipped == {"missing image": [f"{QUESTIONS} questions[4]"]}
    for options, split in (({}, "train"), ({"val": PART, "max_missing": 1.0}, "val")):
        with pytest.raises(UserError, match=r"questions\[4\]: 1 of 10 .* coco 10") as caught:
            source(**options).split(split)
        assert caught.value.code == ExitCode.MISSING_INPUT


def test_missing_files_are_named(source: Any, tmp_path: Path) -> None:
    write(tmp_path, PART, [question(1, 7)], None, 9)
    for options, split in (({}, "train"), ({"val": PART}, "val")):
        with pytest.raises(UserError, match=f"{ANNOTATIONS}: no such file"):
            source(**options).split(split)
    write(tmp_path, PART, [question(1, 7)], [annotation(1)])
    with pytest.raises(UserError, match=r"data\.source\.val: no part"):
        source(val=None).split("val")
    with pytest.raises(UserError, match=r"answers\.txt: no such file"):
        _ = source(answers=str(tmp_path / "answers.txt")).labels
    with pytest.raises(UserError, match="1 of 1 examples"):
        source(max_missing=1.0).split("train")


TWO = [annotation(1), annotation(2)]
WRONG: list[tuple[Any, Any, str]] = [
    ([question(), question(2), question(1)], TWO, r"questions\[2\]: question_id '1' appears twice"),
    ([question(), question(2), question(3)], TWO, r"questions\[2\]: question 3 has no annotation"),
    ([question()], TWO, r"annotations\[1\]: question 2 is not in"),
    ([question(), {"question_id": 2, "question": "a"}], TWO, r"questions\[1\]: key 'image_id'"),
    ([question(), question("2")], TWO, "'question_id' is str"),
    ([question(), question(2, "../9")], TWO, "'image_id' is str"),
    ({}, TWO, "'questions' is dict"),
    ([question()], [annotation(1), annotation(1)], r"annotations\[1\]: question_id 1"),
    ([question()], [{**annotation(1), "answers": []}], r"annotations\[0\]: a question without"),
    ([question()], [{**annotation(1), "image_id": 12}], r"image_id of question 1 is 12 here and 9"),
]


@pytest.mark.parametrize(("questions", "annotations", "message"), WRONG)
def test_a_wrong_entry_is_named(source: Any, tmp_path: Path, questions: Any, annotations: Any, message: str) -> None:
    write(tmp_path, PART, questions, annotations, 9)
    with pytest.raises(UserError, match=message) as caught:
        source().split("train")
    assert caught.value.code == ExitCode.BAD_DATA


def test_an_empty_question_is_an_error_in_evaluation_and_a_mended_one_is_counted(source: Any, tmp_path: Path) -> None:
    write(tmp_path, PART, [question(1, 9, ""), question(2, 9, "\ud800?")], [annotation(1), annotation(2)], 9)
    counts = source().split("train").skipped
    assert counts == {"text surrogate": [f"{QUESTIONS} questions[1]"], "empty text": [f"{QUESTIONS} questions[0]"]}
    with pytest.raises(UserError, match=r"questions\[0\]: the text is empty"):
        source(val=PART).split("val")


# ------------------------------------------------------------------ Visual Genome


def genome(folder: Path, *answers: Any, photos: tuple[int, ...] = (9,)) -> str:
    (folder / "vg" / "VG_100K").mkdir(parents=True, exist_ok=True)
    for photo in photos:
        (folder / "vg" / "VG_100K" / f"{photo}.jpg").touch()
    # Of its photos 8 is COCO's 42.
    content = [{"image_id": number, "coco_id": {8: 42}.get(number)} for number in (8, 9)]
    (folder / "vg" / "image_data.json").write_text(json.dumps(content))
    qas = [{"qa_id": i + 1, "image_id": 9, "question": "Which?", "answer": answer} for i, answer in enumerate(answers)]
    (folder / "vg" / "question_answers.json").write_text(json.dumps([{"id": 8, "qas": []}, {"id": 9, "qas": qas}]))
    return str(folder / "vg" / "question_answers.json")


def test_visual_genome_is_added_to_training_alone(source: Any, tmp_path: Path) -> None:
    write(tmp_path, PART, [question(1, 9)], [annotation(1, "dog")], 9)
    both = source(visual_genome=genome(tmp_path, "Dog.", "Cat."), val=PART)
    examples = both.split("train")
    assert both.labels == ("dog",)
    assert len(examples) == 2
    assert examples[1] == {
        "images": [str(tmp_path / "vg" / "VG_100K" / "9.jpg")],
        "image_ids": ["vg 9"],
        "text": "Which?",
        "answers": ["Dog."],
        "id": "vg 1",
        "kind": "",
        "group": "",
        "origin": "question_answers.json question 0",
    }
    assert both.targets(["Dog."]) == {"dog": 1.0}
    assert examples.skipped == {"answer outside the vocabulary": ["question_answers.json question 1"]}
    assert [*examples.image_ids()] == ["coco 9", "vg 9"]
    assert len(both.split("val")) == 1


def test_a_wrong_file_of_visual_genome_is_named(tmp_path: Path) -> None:
    file, one = tmp_path / "vg.json", {"qa_id": 1, "question": "a", "answer": "b"}
    for content, message in (
        ({}, "dict instead of a list"),
        ([{"id": 1}], r"\[0\]: key 'qas'"),
        ([{"id": 1, "qas": [{"qa_id": 1, "question": "a"}]}], r"\[0\]\.qas\[0\]: key 'answer'"),
        ([{"id": 1, "qas": [one] * 2}], "question 1: qa_id 'vg 1' appears twice"),
        ([], "no example"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"vg.json.*{message}"):
            parse_genome(RowOrigin(file, "{file} question {place}"), {})


def test_visual_genomes_photos_of_coco_have_their_ids_there(source: Any, tmp_path: Path) -> None:
    """Fails where ids are `vg N` alone: a photo that is evaluated on would be trained on, and no guard would see it."""
    write(tmp_path, PART, [question(1, 42)], [annotation(1, "dog")], 42)
    file = Path(genome(tmp_path, "Dog.", photos=(8, 9)))
    document = json.loads(file.read_text())
    document[0]["qas"] = [{"qa_id": 7, "image_id": 8, "question": "Who?", "answer": "dog"}]
    file.write_text(json.dumps(document))
    examples = source(visual_genome=str(file)).split("train")
    assert [examples[row]["image_ids"] for row in range(3)] == [["coco 42"], ["coco 42"], ["vg 9"]]
    assert examples[1]["images"] == [str(tmp_path / "vg" / "VG_100K" / "8.jpg")]
    with pytest.raises(UserError, match="no such file"):
        source(visual_genome=str(tmp_path / "no.json")).split("train")
    (file.parent / "image_data.json").unlink()
    with pytest.raises(UserError, match=r"image_data\.json is missing"):
        source(visual_genome=str(file)).split("train")


# ------------------------------------------------------------------ the real thing


def test_all_questions_of_the_small_set_are_read(shared_data: Path, tmp_path: Path) -> None:
    folder = str(shared_data / "daquar_vqa")
    small = VqaV2(folder, ["daquar_train"], "daquar_val", min_count=1, cache=str(tmp_path))
    train, val = small.split("train"), small.split("val")
    assert (len(train), len(val)) == (5435, 1360)
    assert (len({*train.image_ids()}), len({*val.image_ids()})) == (635, 159)
    assert not {*train.image_ids()} & {*val.image_ids()}
    assert train.skipped == val.skipped == {}
    frequent = VqaV2(folder, ["daquar_train"], "daquar_val", cache=str(tmp_path))
    rows = frequent.split("train")
    assert len(rows) + len(rows.skipped["answer outside the vocabulary"]) == 5435
    assert all(len(frequent.targets(rows[i]["answers"])) == 1 for i in range(0, len(rows), 50))


def test_true_rows_of_vqa_v2_and_visual_genome_are_read(shared_data: Path, tmp_path: Path) -> None:
    true = shared_data / "formats"
    for name, link in (("questions", QUESTIONS), ("annotations", ANNOTATIONS)):
        shutil.copy(true / "vqav2" / f"{name}.json", tmp_path / link)
    shutil.copytree(true / "vqav2" / "images", tmp_path / "images")
    shutil.copytree(true / "vgqa", tmp_path / "vgqa")
    (tmp_path / "vgqa" / "image_data.json").write_text("[]")
    usual = VqaV2(
        str(tmp_path),
        visual_genome=str(tmp_path / "vgqa" / "question_answers.json"),
        answers=str(true / "vqav2" / "trainval_ans2label.json"),
        cache=str(tmp_path / "cache"),
    )
    assert len(usual.labels) == 3129
    examples = usual.split("train")
    ids = [examples[i]["image_ids"][0] for i in range(len(examples))]
    assert ids[:3] == ["coco 458752"] * 3
    assert {*ids[3:]} <= {f"vg {i}" for i in (1, 2, 4, 5, 2415125, 2415126)}
    assert usual.targets(examples[0]["answers"])["net"] == 1.0
    assert all(safe_open(examples[i]["images"][0], "").width > 100 for i in (0, len(examples) - 1))
