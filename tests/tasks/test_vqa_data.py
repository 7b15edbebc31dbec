"""VQA v2 and Visual Genome's questions as distributed: what is read, and the one line for every wrong file."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvlm.data.files import images_by_number
from maskvlm.data.images import safe_open
from maskvlm.data.table import RowOrigin
from maskvlm.utils.errors import ExitCode, UserError
from tasks.vqa.data import VqaV2, parse_vqa
from tasks.vqa.genome import parse_genome

PART = "mscoco_train2014"
QUESTIONS, ANNOTATIONS = f"v2_OpenEnded_{PART}_questions.json", f"v2_{PART}_annotations.json"


def error_of(read: Callable[[], object]) -> UserError | None:
    """The user's error that reading ends with; any other exception is ours."""
    try:
        read()
    except UserError as error:
        return error
    return None


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
    write(
        tmp_path,
        PART,
        [question(5, 9, "What  is it?"), question(6, 12)],
        [annotation(6), annotation(5, "A dog!", "cat", kind="")],
        9,
        12,
    )
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
    with pytest.raises(UserError, match=r"is shared by 4 questions\. Lower data\.source\.min_count") as caught:
        _ = source(min_count=4).labels
    assert (caught.value.where, caught.value.code) == ("data.source.min_count", ExitCode.USAGE)


def test_of_a_set_with_one_answer_a_question_answers_are_in_the_form_that_is_taught(tmp_path: Path) -> None:
    """The official accuracy compares raw texts there. COCO's stay as people wrote them."""
    answers = {}
    for part in ("daquar_val", "mscoco_val2014"):
        write(tmp_path, part, [question(1)], [annotation(1, "garbage_bin")])
        origin = RowOrigin(tmp_path / f"v2_OpenEnded_{part}_questions.json", "{file} questions[{place}]")
        columns = parse_vqa(origin, part, tmp_path / f"v2_{part}_annotations.json")
        answers[part] = {*columns.columns["answers"][0]}
    assert answers == {"daquar_val": {"garbage bin"}, "mscoco_val2014": {"garbage_bin"}}


@pytest.mark.parametrize("majority", [{"multiple_choice_answer": ""}, {}])
def test_a_vocabulary_of_some_of_the_questions_is_refused(source: Any, tmp_path: Path, majority: Any) -> None:
    """It would lack the answers of the others, and nobody would know."""
    some = {key: value for key, value in annotation(7).items() if key != "multiple_choice_answer"} | majority
    write(tmp_path, PART, [question(5), question(7), question(9)], [{**some, "question_id": 9}, some, annotation(5)], 9)
    with pytest.raises(UserError) as caught:
        source().split("train")
    assert str(caught.value) == (
        f"{tmp_path / ANNOTATIONS}: 2 questions have no multiple_choice_answer, which the vocabulary is built from; "
        "the first is 7. Take the annotations as distributed, or set data.source.answers."
    )
    assert caught.value.code == ExitCode.BAD_DATA
    (tmp_path / "answers.json").write_text('["dog"]')
    assert len(source(answers=str(tmp_path / "answers.json")).split("train")) == 3


@pytest.mark.parametrize("from_file", [True, False])
def test_a_part_outside_the_vocabulary_says_how_to_change_that(source: Any, tmp_path: Path, from_file: bool) -> None:
    write(tmp_path, PART, [question(1), question(2)], [annotation(1, "dog"), annotation(2, "dog")], 9)
    write(tmp_path, "mscoco_val2014", [question(3, 12)], [annotation(3, "cow")], 12)
    (tmp_path / "answers.json").write_text('["emu"]')
    options: Any = {"answers": str(tmp_path / "answers.json")} if from_file else {"min_count": 2}
    with pytest.raises(UserError) as caught:
        source(train=[PART, "mscoco_val2014"], **options).split("train")
    number, todo = (
        (2, f"Correct data.source.answers ({tmp_path / 'answers.json'})")
        if from_file
        else (
            1,
            "Lower data.source.min_count, or set data.source.answers",
        )
    )
    assert caught.value.what == f"no examples are left (answer outside the vocabulary: {number})"
    assert caught.value.todo == todo


def test_training_skips_questions_without_an_answer_of_the_vocabulary(source: Any, tmp_path: Path) -> None:
    answered = [annotation(0, "dog"), annotation(1, "dog"), annotation(2, "cow"), annotation(3, "cow", "Dogs", "dog")]
    write(tmp_path, PART, [question(i) for i in range(4)], answered, 9)
    examples = source(min_count=2).split("train")
    assert [examples[i]["id"] for i in range(3)] == ["0", "1", "2"]  # cow, twice
    assert source(min_count=2).labels == ("cow", "dog")
    write(
        tmp_path,
        PART,
        [question(i) for i in range(4)],
        [*answered[:2], annotation(2, "emu"), annotation(3, "emu", "ox", "dog", "yak")],
    )
    source_of_dogs = source(answers=str(tmp_path / "answers.json"))
    (tmp_path / "answers.json").write_text('["dog"]')
    examples = source_of_dogs.split("train")
    assert [examples[i]["id"] for i in range(3)] == ["0", "1", "3"]
    assert examples.skipped == {"answer outside the vocabulary": [f"{QUESTIONS} questions[2]"]}
    assert len(source(answers=str(tmp_path / "answers.json"), val=PART).split("val")) == 4


def test_the_vocabulary_is_kept(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, PART, [question(1), question(2)], [annotation(1), annotation(2, "cat")], 9)
    first = source()
    assert len(first.split("train")) == 2
    for name in ("parse_vqa", "build_vocabulary", "soft_targets"):
        monkeypatch.setattr(f"tasks.vqa.data.{name}", None)
    second = source()
    assert second.labels == first.labels == ("cat", "dog")
    assert second.split("train").fingerprint == first.split("train").fingerprint


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
    with pytest.raises(UserError, match=r"2 question_ids stand in more than one .*parts: 1, 2\. Name each part once"):
        source(train=[PART, PART]).split("train")


@pytest.mark.parametrize(
    ("number", "ending"),
    [(1, "1 question_id stands in more than one of the training parts: 0"), (5, ": 0, 1, 2, ...")],
)
def test_some_ids_of_two_parts_are_named(source: Any, tmp_path: Path, number: int, ending: str) -> None:
    write(tmp_path, PART, [question(i) for i in range(6)], [annotation(i) for i in range(6)], 9)
    same = [question(i) for i in range(number)]
    write(tmp_path, "mscoco_val2014", [question(9), *same], [annotation(9), *map(annotation, range(number))], 9)
    with pytest.raises(UserError) as caught:
        source(train=[PART, "mscoco_val2014"]).split("train")
    assert caught.value.what.endswith(ending)
    assert caught.value.what.startswith(f"{number} question_id")


def test_test_questions_need_no_annotations(source: Any, tmp_path: Path) -> None:
    write(tmp_path, "mscoco_test2015", [question(1, 9)], None, 9)
    examples = source().split("test")
    assert (examples[0]["answers"], examples[0]["kind"]) == ([], "")
    write(tmp_path, "mscoco_test2015", [question(1, 9)], [annotation(1)])
    assert source().split("test")[0]["answers"] == ["dog"] * 10


# ------------------------------------------------------------------ images


def test_the_part_s_own_image_is_preferred() -> None:
    names = [
        "train2014/COCO_train2014_000000000009.jpg",
        "val2014/COCO_val2014_000000000009.jpg",
        "vg/9.jpg",
        "vg/10.jpg",
    ]
    assert images_by_number(names, "mscoco_train2014") == {"coco 9": names[0]}
    assert images_by_number(names, "mscoco_val2014") == {"coco 9": names[1]}
    assert images_by_number(names[2:], "mscoco_val2014") == {"coco 9": "vg/9.jpg", "coco 10": "vg/10.jpg"}
    assert images_by_number(["train2017/000000000009.jpg", "x.jpg"], PART) == {"coco 9": "train2017/000000000009.jpg"}


def test_a_few_questions_without_image_are_skipped_in_training_alone(source: Any, tmp_path: Path) -> None:
    ten = range(10)
    write(tmp_path, PART, [question(i, 9 + (i == 4)) for i in ten], [annotation(i) for i in ten], 9)
    examples = source(max_missing=0.1).split("train")
    assert [examples[i]["id"] for i in range(9)] == [str(i) for i in ten if i != 4]
    assert examples.skipped == {"missing image": [f"{QUESTIONS} questions[4]"]}
    with pytest.raises(UserError, match=r"questions\[4\]: 1 of 10 .* coco 10\. .*raise data\.source\.max_missing"):
        source().split("train")
    with pytest.raises(UserError, match=r"questions\[4\]: 1 of 10 .* evaluation leaves nothing out") as caught:
        source(val=PART, max_missing=1.0).split("val")
    assert caught.value.code == ExitCode.MISSING_INPUT


def test_images_that_no_question_names_are_no_matter_but_none_is_an_error(source: Any, tmp_path: Path) -> None:
    write(tmp_path, PART, [question(1, 9)], [annotation(1)], 9, 10, 11)
    assert source().split("train").skipped == {}
    write(tmp_path, PART, [question(1, 7)], [annotation(1)])
    with pytest.raises(UserError, match=r"1 of 1 examples of split 'train' lacks an image in .*: coco 7"):
        source(max_missing=1.0).split("train")
    with pytest.raises(UserError, match="there is no such folder of images"):
        source(images=str(tmp_path / "no")).split("train")


# ------------------------------------------------------------------ wrong files


def test_missing_files_are_named(source: Any, tmp_path: Path) -> None:
    write(tmp_path, PART, [question()], None, 9)
    for split, options in (("train", {}), ("val", {"val": PART})):
        todo = r"Prepare the set \(maskvlm data vqav2 FOLDER\), or set data\.source\.root"
        with pytest.raises(UserError, match=rf"{ANNOTATIONS}: no such file\. {todo}") as caught:
            source(**options).split(split)
        assert caught.value.code == ExitCode.MISSING_INPUT
    with pytest.raises(UserError, match=r"mscoco_val2014_questions\.json: no such file"):
        source().split("val")
    message = r"_questions\.json: no such file \(there is no folder .*/no\)\. .*maskvlm data"
    with pytest.raises(UserError, match=message):
        VqaV2(str(tmp_path / "no")).split("val")
    with pytest.raises(UserError, match=r"data\.source\.val: no part was given for this split"):
        source(val=None).split("val")
    with pytest.raises(UserError, match=r"answers\.txt: no such file"):
        _ = source(answers=str(tmp_path / "answers.txt")).labels


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([question(), question(2), question(1)], "questions[2]: question_id '1' appears twice, first at"),
        ([question(), question(2), question(3)], "questions[2]: question 3 has no annotation in "),
        ([question()], f"{ANNOTATIONS} annotations[1]: question 2 is not in "),
        ([question(), {"question_id": 2, "question": "a"}], "questions[1]: key 'image_id' is missing"),
        ([question(), {"image_id": 2, "question": "a"}], "questions[1]: key 'question_id' is missing"),
        ([question(), {"image_id": 9, "question_id": 2}], "questions[1]: key 'question' is missing"),
        ([question(), question("2")], "questions[1]: 'question_id' is str instead of int"),
        ([question(), question(2, "../9")], "questions[1]: 'image_id' is str instead of int"),
        ([question(), question(2, 9, None)], "questions[1]: 'question' is NoneType instead of str"),
        ([question(), 3], "questions[1]: int instead of an object with 'question_id'"),
        ({}, f"{QUESTIONS}: 'questions' is dict instead of list"),
        ([], f"{QUESTIONS}"),
    ],
)
def test_a_wrong_question_is_named(source: Any, tmp_path: Path, questions: Any, message: str) -> None:
    write(tmp_path, PART, questions, [annotation(1), annotation(2)], 9)
    with pytest.raises(UserError) as caught:
        source().split("train")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.code == ExitCode.BAD_DATA


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([annotation(1), annotation(1)], "annotations[1]: question_id 1 is also that of position 0"),
        ([{**annotation(1), "answers": []}], "annotations[0]: a question without answers"),
        ([{**annotation(1), "answers": [{"answer": 3}]}], "annotations[0].answers[0]: 'answer' is int instead of str"),
        ([{"question_id": 1}], "annotations[0]: key 'answers' is missing"),
        ([annotation(1, "\ud800")], "half a surrogate"),
        ({}, "'annotations' is dict instead of list"),
    ],
)
def test_a_wrong_annotation_is_named(source: Any, tmp_path: Path, annotations: Any, message: str) -> None:
    write(tmp_path, PART, [question()], annotations, 9)
    with pytest.raises(UserError) as caught:
        source().split("train")
    assert f"{ANNOTATIONS}" in caught.value.where
    assert message in str(caught.value)


@pytest.mark.parametrize("image", [12, "9", [9]])
def test_an_annotation_of_another_image_is_named(source: Any, tmp_path: Path, image: Any) -> None:
    fits = {**annotation(1), "image_id": 9}
    write(tmp_path, PART, [question(1), question(2)], [{**annotation(2), "image_id": None}, fits], 9)
    assert len(source().split("train")) == 2
    write(tmp_path, PART, [question(1), question(2)], [fits, {**annotation(2), "image_id": image}])
    with pytest.raises(UserError) as caught:
        source().split("train")
    assert str(caught.value) == (
        f"{tmp_path / ANNOTATIONS} annotations[1]: image_id of question 2 is {image!r} here and 9 in "
        f"{tmp_path / QUESTIONS} questions[1]. Use questions and annotations of the same part."
    )
    assert caught.value.code == ExitCode.BAD_DATA


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 99_999, b"[]", b'{"questions": 3}', b"<html>"])
def test_a_file_that_is_something_else_is_named(source: Any, tmp_path: Path, content: bytes) -> None:
    write(tmp_path, PART, [question()], [annotation()], 9)
    (tmp_path / QUESTIONS).write_bytes(content)
    with pytest.raises(UserError) as caught:
        source().split("train")
    assert caught.value.where.startswith(str(tmp_path / QUESTIONS))
    assert caught.value.code == ExitCode.BAD_DATA


def test_an_empty_question_is_an_error_in_evaluation_and_a_mended_one_is_counted(source: Any, tmp_path: Path) -> None:
    write(tmp_path, PART, [question(1, 9, ""), question(2, 9, "\ud800?")], [annotation(1), annotation(2)], 9)
    counts = source().split("train").skipped
    assert counts == {"text surrogate": [f"{QUESTIONS} questions[1]"], "empty text": [f"{QUESTIONS} questions[0]"]}
    with pytest.raises(UserError, match=r"questions\[0\]: the text is empty"):
        source(val=PART).split("val")


KEYS = st.sampled_from(["question_id", "image_id", "question", "answers", "multiple_choice_answer"])
ENTRY = (
    st.dictionaries(KEYS, st.none() | st.integers() | st.text(max_size=5) | st.just([{"answer": "a"}])) | st.integers()
)


@given(questions=st.lists(ENTRY, max_size=3), annotations=st.lists(ENTRY, max_size=3))
def test_any_entries_are_rows_or_an_error_that_names_one(
    tmp_path_factory: pytest.TempPathFactory, questions: list[Any], annotations: list[Any]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    write(folder, PART, questions, annotations)
    origin = RowOrigin(folder / QUESTIONS, "{file} questions[{place}]")
    error = error_of(lambda: parse_vqa(origin, PART, folder / ANNOTATIONS))
    if error is None:
        assert len(questions) == len(annotations) > 0
    else:
        assert error.where.startswith((str(folder / QUESTIONS), str(folder / ANNOTATIONS)))
        assert "\n" not in str(error)


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


def test_visual_genome_may_add_nothing(source: Any, tmp_path: Path) -> None:
    write(tmp_path, PART, [question(1, 9)], [annotation(1, "dog")], 9)
    plain = source().split("train")
    both = source(visual_genome=genome(tmp_path, "Cat.", "Cow.")).split("train")
    assert [both[i] for i in (0, -1)] == [plain[0]] * 2
    assert len(both) == 1
    assert [*both.image_ids()] == ["coco 9"]
    places = [f"question_answers.json question {place}" for place in (0, 1)]
    assert both.skipped == {"answer outside the vocabulary": places}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "vg.json: dict instead of a list of images with `qas`"),
        ([3], "vg.json [0]: int instead of an object with 'id'"),
        ([{"id": 1}], "vg.json [0]: key 'qas' is missing"),
        ([{"id": 1, "qas": [{}]}], "vg.json [0].qas[0]: key 'qa_id' is missing"),
        ([{"id": 1, "qas": [{"qa_id": 1, "question": "a"}]}], "vg.json [0].qas[0]: key 'answer' is missing"),
        (
            [{"id": 1, "qas": [{"qa_id": 1, "question": "a", "answer": "b"}] * 2}],
            "question 1: qa_id 'vg 1' appears twice",
        ),
        ([], "vg.json: no example in this file"),
    ],
)
def test_a_wrong_file_of_visual_genome_is_named(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "vg.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        parse_genome(RowOrigin(file, "{file} question {place}"), {})
    assert message in str(caught.value)


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
    (file.parent / "image_data.json").unlink()
    with pytest.raises(UserError, match=r"image_data\.json is missing: only this file says which images are also"):
        source(visual_genome=str(file)).split("train")


def test_a_missing_file_of_visual_genome_is_named(source: Any, tmp_path: Path) -> None:
    write(tmp_path, PART, [question()], [annotation()], 9)
    with pytest.raises(UserError, match=r"no\.json: no such file\. Correct data\.source\.visual_genome"):
        source(visual_genome=str(tmp_path / "no.json")).split("train")


# ------------------------------------------------------------------ the real thing


def test_all_questions_of_the_small_set_are_read(shared_data: Path, tmp_path: Path) -> None:
    folder = str(shared_data / "daquar_vqa")
    small = VqaV2(folder, ["daquar_train"], "daquar_val", min_count=1, cache=str(tmp_path))
    train, val = small.split("train"), small.split("val")
    assert (len(train), len(val)) == (5435, 1360)
    assert (len({*train.image_ids()}), len({*val.image_ids()})) == (635, 159)
    assert not {*train.image_ids()} & {*val.image_ids()}
    assert train.skipped == val.skipped == {}
    assert all(len(small.targets(train[i]["answers"])) == 1 for i in range(100))
    frequent = VqaV2(folder, ["daquar_train"], "daquar_val", cache=str(tmp_path))
    rows = frequent.split("train")
    assert len(rows) + len(rows.skipped["answer outside the vocabulary"]) == 5435
    assert len(rows) == sum(bool(frequent.targets(train[i]["answers"])) for i in range(5435))


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
