"""NLVR2 as distributed: what is read, and the one line for every wrong file."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvlm.data.images import safe_open
from maskvlm.data.table import RowOrigin
from maskvlm.utils.errors import ExitCode, UserError
from tasks.nlvr.data import Nlvr2, parse_nlvr


def error_of(read: Callable[[], object]) -> UserError | None:
    """The user's error that reading ends with; any other exception is ours."""
    try:
        read()
    except UserError as error:
        return error
    return None


def row(identifier: Any = "dev-1-0-0", sentence: Any = "Two dogs.", label: Any = "True", **more: Any) -> dict[str, Any]:
    return {"identifier": identifier, "sentence": sentence, "label": label, **more}


@pytest.fixture
def nlvr(tmp_path: Path) -> Any:
    """Write rows as a split, with the images named; gives the source."""

    def write(rows: list[Any], *pairs: str, split: str = "val", suffix: str = "png", **options: Any) -> Nlvr2:
        (tmp_path / "images" / "deep").mkdir(parents=True, exist_ok=True)
        for pair in pairs or ("dev-1-0", "dev-1-1"):
            for side in (0, 1):
                (tmp_path / "images" / "deep" / f"{pair}-img{side}.{suffix}").touch()
        name = {"train": "train.json", "val": "dev.json", "test": "test1.json"}[split]
        lines = [each if isinstance(each, str) else json.dumps(each) for each in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return Nlvr2(str(tmp_path), cache=str(tmp_path / "cache"), **options)

    return write


def test_a_line_is_an_example_of_two_images(nlvr: Any, tmp_path: Path) -> None:
    source = nlvr([row(), row("dev-1-1-0", label="false", synset="dog"), row("dev-1-1-1", "One  cat.", False)])
    assert source.labels == ("False", "True")
    examples = source.split("val")
    assert len(examples) == 3
    assert examples[2] == {
        "images": [str(tmp_path / "images" / "deep" / f"dev-1-1-img{side}.png") for side in (0, 1)],
        "image_ids": ["nlvr2 dev-1-1-img0", "nlvr2 dev-1-1-img1"],
        "text": "One cat.",
        "answers": ["False"],
        "id": "dev-1-1-1",
        "kind": "",
        "group": "dev-1-1",
        "origin": "dev.json:3",
    }
    assert [examples[i]["answers"] for i in range(3)] == [["True"], ["False"], ["False"]]
    assert source.targets(["False"]) == {"False": 1.0}


def test_pairs_of_a_sentence_share_their_group(nlvr: Any) -> None:
    rows = [row("dev-1-0-0"), row("dev-1-1-0"), row("dev-1-0-1"), row("dev-2-0-0")]
    examples = nlvr(rows, "dev-1-0", "dev-1-1", "dev-2-0").split("val")
    assert [examples[i]["group"] for i in range(4)] == ["dev-1-0", "dev-1-0", "dev-1-1", "dev-2-0"]


def test_photos_may_be_jpg_and_anywhere(nlvr: Any, tmp_path: Path) -> None:
    assert nlvr([row()], suffix="jpg").split("val")[0]["images"][0].endswith("images/deep/dev-1-0-img0.jpg")
    source = Nlvr2(str(tmp_path), images=str(tmp_path / "images" / "deep"), cache=str(tmp_path / "cache"))
    assert len(source.split("val")) == 1


def test_training_skips_a_few_pairs_without_an_image(nlvr: Any, tmp_path: Path) -> None:
    rows = [row(f"train-{i}-0-0") for i in range(10)]
    source = nlvr(rows, *(f"train-{i}-0" for i in range(10)), split="train", max_missing=0.1)
    (tmp_path / "images" / "deep" / "train-4-0-img1.png").unlink()
    examples = source.split("train")
    assert [examples[i]["id"] for i in range(9)] == [f"train-{i}-0-0" for i in range(10) if i != 4]
    assert examples.skipped == {"missing image": ["train.json:5"]}
    (tmp_path / "images" / "deep" / "train-5-0-img0.png").unlink()
    with pytest.raises(
        UserError,
        match=r"train\.json:5: 2 of 10 examples .* lack an image in .*train-4-0-img1, nlvr2 train-5-0-img0\. ",
    ):
        source.split("train")


def test_evaluation_names_the_missing_image(nlvr: Any) -> None:
    with pytest.raises(UserError, match=r"dev\.json:2: 1 of 2 .* nlvr2 dev-9-0-img0\. .*leaves nothing out") as caught:
        nlvr([row(), row("dev-9-0-0")], max_missing=1.0).split("val")
    assert caught.value.code == ExitCode.MISSING_INPUT


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "dev.json:2: not JSON"),
        ("[]", "dev.json:2: list instead of a JSON object"),
        ({"sentence": "a", "label": "True"}, "dev.json:2: key 'identifier' is missing"),
        ({"identifier": "dev-1-1-0", "label": "True"}, "dev.json:2: key 'sentence' is missing"),
        ({"identifier": "dev-1-1-0", "sentence": "a"}, "dev.json:2: key 'label' is missing"),
        (row("dev-1-1-0", 3), "dev.json:2: 'sentence' is int instead of str"),
        (row("dev-1-1-0", " \u200b"), "dev.json:2: the text is empty"),
        (row("dev-1-1-0", label="maybe"), "dev.json:2: 'label' is 'maybe', the classes are False, True"),
        (row("dev-1-1-0", label=1), "dev.json:2: 'label' is 1, a number; the classes are named False, True"),
        (row("dev-1-1"), "dev.json:2: identifier 'dev-1-1' is not split-set-pair-sentence"),
        (row("dev-1--0"), "dev.json:2: identifier 'dev-1--0' is not split-set-pair-sentence"),
        (row("../dev-1-1-0"), "dev.json:2: file name '../dev-1-1-0' leads out of the folder"),
        (row("dev-\ud800-1-0"), "dev.json:2: 'identifier' is 'dev-\\ud800-1-0': empty, or not plain text"),
        (row(), "dev.json:2: identifier 'dev-1-0-0' appears twice, first at dev.json:1"),
    ],
)
def test_a_wrong_line_is_named(nlvr: Any, line: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        nlvr([row(), line]).split("val")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_sentence_is_skipped_in_training_and_a_mended_one_counted(nlvr: Any) -> None:
    examples = nlvr([row(), row("dev-1-1-0", ""), row("dev-1-1-1", "a \ud800")], split="train").split("train")
    assert examples.skipped == {"text surrogate": ["train.json:3"], "empty text": ["train.json:2"]}
    assert [examples[i]["text"] for i in range(2)] == ["Two dogs.", "a \ufffd"]


def test_missing_files_and_splits_are_named(nlvr: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"test1\.json: no such file\. Prepare the set \(maskvlm data nlvr2 FOLDER\), or set "
    ) as caught:
        nlvr([row()]).split("test")
    assert caught.value.code == ExitCode.MISSING_INPUT
    with pytest.raises(UserError, match=r"/no/dev\.json: no such file \(there is no folder .*/no\)\. .*maskvlm data"):
        Nlvr2(str(tmp_path / "no")).split("val")
    with pytest.raises(UserError, match=r"data\.source\.test: no file was given for this split"):
        nlvr([row()], test=None).split("test")
    (tmp_path / "dev.json").write_text("\n")
    with pytest.raises(UserError, match=r"dev\.json: no example in this file"):
        nlvr([]).split("val")


KEYS = st.sampled_from(["identifier", "sentence", "label"])
VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=12) | st.sampled_from(["dev-1-0-0", "True"])


@given(line=st.binary(max_size=60) | st.dictionaries(KEYS, VALUES).map(lambda record: json.dumps(record).encode()))
def test_any_line_is_a_row_or_an_error_that_names_it(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "nlvr.json"
    file.write_bytes(json.dumps(row("dev-0-0-0")).encode() + b"\n" + line)
    error = error_of(lambda: parse_nlvr(RowOrigin(file, "{file}:{place}")))
    assert error is None or re.fullmatch(rf"{file}:[2-9]\d?", error.where)
    assert "\n" not in str(error)


# ------------------------------------------------------------------ the real thing


def official(identifiers: list[str], right: list[bool]) -> float:
    """Consistency by the rule of nlvr2/eval/metrics.py: the third part of the identifier does not count."""
    consistent: dict[tuple[str, ...], bool] = {}
    for identifier, one in zip(identifiers, right, strict=True):
        parts = identifier.split("-")
        sentence = (*parts[:2], *parts[3:])
        consistent[sentence] = consistent.get(sentence, True) and one
    return sum(consistent.values()) / len(consistent)


def test_groups_give_the_official_consistency(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "formats" / "nlvr2" / "dev.head300.json").read_text().splitlines()
    table = parse_nlvr(RowOrigin(shared_data / "formats" / "nlvr2" / "dev.head300.json", "{file}:{place}"))
    right = [number % 5 > 0 for number in range(300)]
    by_group: dict[str, list[bool]] = {}
    for group, one in zip(table.columns["group"], right, strict=True):
        by_group.setdefault(group, []).append(one)
    assert len(by_group) == len({json.loads(line)["sentence"] for line in lines}) == 88
    assert sum(map(all, by_group.values())) / 88 == official(table.columns["id"], right)


def test_the_real_photos_are_found(shared_data: Path, tmp_path: Path) -> None:
    source = Nlvr2(str(shared_data / "formats" / "nlvr2"), val="tiny-dev.json", cache=str(tmp_path))
    examples = source.split("val")
    assert (len(examples), len({*examples.image_ids()})) == (8, 8)
    assert [safe_open(image, "").width > 100 for image in examples[7]["images"]] == [True, True]


@pytest.mark.parametrize(("split", "count", "true"), [("train", 5967, 3402), ("val", 1980, 1112)])
def test_all_pairs_of_the_small_set_are_read(
    shared_data: Path, tmp_path: Path, split: str, count: int, true: int
) -> None:
    examples = Nlvr2(str(shared_data / "nlvr_pairs"), cache=str(tmp_path)).split(split)
    assert len(examples) == count
    assert examples.column("answers").to_pylist().count(["True"]) == true
    assert examples.skipped == {}
    assert len([*examples.image_ids()]) == 2 * count
