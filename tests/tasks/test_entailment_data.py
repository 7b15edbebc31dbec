"""SNLI-VE as distributed, corrected labels, and the one line for every wrong file."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskvlm.data.table import RowOrigin
from maskvlm.utils.errors import ExitCode, UserError
from tasks.entailment.data import SnliVe, parse_entailment, read_labels


def error_of(read: Callable[[], object]) -> UserError | None:
    """The user's error that reading ends with; any other exception is ours."""
    try:
        read()
    except UserError as error:
        return error
    return None


def row(
    pair: Any = "11.jpg#0r1e", label: Any = "entailment", text: Any = "A dog.", photo: Any = "11"
) -> dict[str, Any]:
    return {"Flickr30K_ID": photo, "gold_label": label, "pairID": pair, "sentence2": text, "captionID": "11.jpg#0"}


@pytest.fixture
def snli(tmp_path: Path) -> Any:
    """Write rows as a split, with the images 11.jpg and 22_ab.jpg; gives the source."""

    def write(
        rows: list[Any], split: str = "val", photos: tuple[str, ...] = ("11.jpg", "22_ab.jpg"), **options: Any
    ) -> SnliVe:
        (tmp_path / "images").mkdir(exist_ok=True)
        for photo in photos:
            (tmp_path / "images" / photo).touch()
        name = {"train": "snli_ve_train", "val": "snli_ve_dev", "test": "snli_ve_test"}[split]
        lines = [each if isinstance(each, str) else json.dumps(each) for each in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        return SnliVe(str(tmp_path), cache=str(tmp_path / "cache"), **options)

    return write


def corrections(
    folder: Path, name: str, *rows: tuple[str, str], columns: tuple[str, str] = ("pairID", "gold_label")
) -> str:
    """A file in the layout of e-ViL's esnlive_dev.csv, or lines of json."""
    file = folder / name
    if file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["", columns[0], "Flickr30kID", "hypothesis", columns[1], "explanation"])
            writer.writerows([i, pair, "1.jpg", 'a "dog",\nyes', label, ""] for i, (pair, label) in enumerate(rows))
    else:
        file.write_text("".join(json.dumps(dict(zip(columns, each, strict=True))) + "\n" for each in rows))
    return str(file)


def test_a_line_is_an_example_of_one_image(snli: Any, tmp_path: Path) -> None:
    source = snli([row(), row("22.jpg#1r1n", "Neutral", "It is  late.", 22)])
    assert source.labels == ("entailment", "neutral", "contradiction")
    examples = source.split("val")
    assert len(examples) == 2
    assert examples[1] == {
        "images": [str(tmp_path / "images" / "22_ab.jpg")],
        "image_ids": ["flickr 22"],
        "text": "It is late.",
        "answers": ["neutral"],
        "id": "22.jpg#1r1n",
        "kind": "",
        "group": "",
        "origin": "snli_ve_dev.jsonl:2",
    }


def test_a_photo_named_by_its_number_alone_is_preferred(snli: Any) -> None:
    examples = snli([row()], photos=("11-a.jpg", "11.jpg", "11_b.jpg")).split("val")
    assert examples[0]["images"][0].endswith("images/11.jpg")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_pairs_without_agreement_are_left_out_and_counted(snli: Any, split: str) -> None:
    examples = snli([row("a", "-"), row("b"), row("c", "-")], split).split(split)
    name = {"train": "train", "val": "dev", "test": "test"}[split]
    assert [examples[i]["id"] for i in range(len(examples))] == ["b"]
    assert examples.skipped == {"no gold label": [f"snli_ve_{name}.jsonl:1", f"snli_ve_{name}.jsonl:3"]}


@pytest.mark.parametrize("name", ["dev.csv", "dev.jsonl"])
@pytest.mark.parametrize("column", ["gold_label", "label"])
def test_corrected_labels_replace_those_of_the_pair(snli: Any, tmp_path: Path, name: str, column: str) -> None:
    new = [("a", "contradiction"), ("b", "neutral"), ("c", "neutral"), ("d", "-"), ("elsewhere", "neutral")]
    file = corrections(tmp_path, name, *new, columns=("pairID", column))
    rows = [row("a"), row("b", "neutral"), row("c", "-"), row("d"), row("e")]
    examples = snli(rows, corrected=file).split("val")
    answers = {examples[i]["id"]: examples[i]["answers"][0] for i in range(len(examples))}
    assert answers == {"a": "contradiction", "b": "neutral", "c": "neutral", "e": "entailment"}
    assert {reason: [place[-2:] for place in places] for reason, places in examples.skipped.items()} == {
        "label corrected": [":1", ":3", ":4"],
        "no gold label": [":4"],
    }


def test_corrections_of_two_files_make_another_table(snli: Any, tmp_path: Path) -> None:
    plain = snli([row("a"), row("b")]).split("val")
    files = [corrections(tmp_path, "1.csv", ("a", "neutral")), corrections(tmp_path, "2.csv", ("b", "neutral"))]
    both = snli([row("a"), row("b")], corrected=files).split("val")
    assert [both[i]["answers"] for i in range(2)] == [["neutral"], ["neutral"]]
    assert both.fingerprint != plain.fingerprint


def test_corrections_for_none_of_the_pairs_are_warned_of(
    snli: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [
        corrections(tmp_path, "none.csv", ("x", "neutral"), ("y", "neutral")),
        corrections(tmp_path, "z.jsonl", ("z", "-")),
    ]
    message = f"none of the 3 pairIDs of {files[0]}, {files[1]} is in snli_ve_dev.jsonl; its labels are unchanged"
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        source = snli([row("a"), row("b", "-")], corrected=files)
        for _ in range(2):  # a run may ask for its splits several times
            assert source.split("val")[0]["answers"] == ["entailment"]
        assert [record.getMessage() for record in caplog.records] == [f"warning: {message}"]


@pytest.mark.parametrize("hit", [("a", "neutral"), ("a", "entailment"), ("a", "-"), ("b", "neutral")])
def test_one_correction_that_fits_is_enough(
    snli: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, hit: tuple[str, str]
) -> None:
    """Whichever of several files it is in, and also where the label was right before, or a pair is left out now."""
    files = [corrections(tmp_path, "none.csv", ("x", "neutral")), corrections(tmp_path, "dev.csv", hit)]
    snli([row("a"), row("b", "-"), row("c")], corrected=files).split("val")
    assert caplog.records == []


def test_training_needs_no_correction_and_each_evaluated_split_one(
    snli: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = corrections(tmp_path, "dev.csv", ("a", "neutral"))
    snli([row("b")], "train", corrected=files).split("train")
    assert caplog.records == []
    snli([row("b")], "test", corrected=files).split("test")
    assert [record.getMessage() for record in caplog.records] == [
        f"warning: none of the 1 pairID of {files} is in snli_ve_test.jsonl; its labels are unchanged"
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,text\n1,b\n", "a.csv:2: no columns 'pairID' and 'gold_label' (found: 'id', 'text')"),
        ("a.csv", b"pairID,text\n1,b\n", "a.csv:2: no columns 'pairID' and 'gold_label' (found: 'pairID', 'text')"),
        ("a.csv", b"pairID,gold_label\nx,maybe\n", "a.csv:2: 'gold_label' is 'maybe', the classes are entailment, "),
        ("a.csv", b"pairID,gold_label\nx\n", "a.csv:2: not comma-separated text (missing column: "),
        (
            "a.csv",
            b"pairID,gold_label\nx,neutral\nx,entailment\n",
            "a.csv:3: pairID 'x' is 'entailment' here and 'neutral'",
        ),
        ("a.csv", b'pairID,gold_label\nx,"neutral', "a.csv:2: not comma-separated text (quote left open: "),
        ("a.csv", b"pairID,gold_label\nx,neutral\ny,\xff\n", "a.csv:3: not comma-separated text (not UTF-8 text: "),
        ("a.csv", b"", "a.csv: is empty"),
        ("a.csv", b"pairID,gold_label\n", "a.csv: no label in this file"),
        ("a.jsonl", b'{"pairID": "x"}', "a.jsonl:1: no columns 'pairID' and 'gold_label' (found: 'pairID')"),
        ("a.jsonl", b"{}", "(found: nothing)"),
        ("a.jsonl", b"pairID,gold_label\n", "a.jsonl:1: not JSON"),
    ],
)
def test_a_wrong_file_of_corrections_is_named(
    snli: Any, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        snli([row()], corrected=str(tmp_path / name)).split("val")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_of_corrections_is_named(snli: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.csv: no such file\. Correct data\.source\.corrected"):
        snli([row()], corrected=str(tmp_path / "no.csv")).split("val")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "snli_ve_dev.jsonl:2: not JSON"),
        ({"gold_label": "neutral"}, ":2: key 'pairID' is missing"),
        ({"pairID": "x"}, ":2: key 'gold_label' is missing"),
        ({"pairID": "x", "gold_label": "neutral"}, ":2: key 'Flickr30K_ID' is missing"),
        ({"pairID": "x", "gold_label": "neutral", "Flickr30K_ID": "11"}, ":2: key 'sentence2' is missing"),
        (row("x", "unsure"), ":2: 'gold_label' is 'unsure', the classes are entailment, neutral, contradiction, -"),
        (row("x", 3), ":2: 'gold_label' is 3, a number; the classes are named entailment, "),
        (row("x", text=["a"]), ":2: 'sentence2' is list instead of str"),
        (row("x", text=" "), ":2: the text is empty"),
        (row("x", photo="../11"), ":2: file name '../11' leads out of the folder"),
        (row("x", photo="33"), "snli_ve_dev.jsonl:2: 1 of 2 examples of split 'val' lacks an image in "),
        (row(), ":2: pairID '11.jpg#0r1e' appears twice, first at snli_ve_dev.jsonl:1"),
    ],
)
def test_a_wrong_line_is_named(snli: Any, line: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        snli([row(), line]).split("val")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_training_skips_a_pair_without_its_image(snli: Any) -> None:
    examples = snli([row("a"), row("b", photo="33"), row("c", text="")], "train", max_missing=0.5).split("train")
    assert len(examples) == 1
    assert examples.skipped == {
        "empty text": ["snli_ve_train.jsonl:3"],
        "missing image": ["snli_ve_train.jsonl:2"],
    }


def test_missing_files_and_splits_are_named(snli: Any, tmp_path: Path) -> None:
    todo = r"Prepare the set \(maskvlm data snli_ve FOLDER\), or set data\.source\.root to the folder"
    with pytest.raises(UserError, match=rf"snli_ve_test\.jsonl: no such file\. {todo}") as caught:
        snli([row()]).split("test")
    assert caught.value.code == ExitCode.MISSING_INPUT
    with pytest.raises(UserError, match=rf"/no/snli_ve_dev\.jsonl: no such file \(there is no folder .*/no\)\. {todo}"):
        SnliVe(str(tmp_path / "no")).split("val")
    for name in ("val", "validation"):
        with pytest.raises(UserError, match=rf"data\.source\.{name}: no file was given for this split"):
            snli([row()], "train", val=None).split(name)


KEYS = st.sampled_from(["Flickr30K_ID", "gold_label", "pairID", "sentence2"])
VALUES = st.none() | st.integers() | st.text(max_size=8) | st.sampled_from(["11", "-", "neutral"])


@given(line=st.binary(max_size=60) | st.dictionaries(KEYS, VALUES).map(lambda record: json.dumps(record).encode()))
def test_any_line_is_a_row_or_an_error_that_names_it(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "snli.jsonl"
    file.write_bytes(json.dumps(row()).encode() + b"\n" + line)
    error = error_of(lambda: parse_entailment(RowOrigin(file, "{file}:{place}"), {}))
    assert error is None or re.fullmatch(rf"{file}:[2-9]\d?", error.where)
    assert "\n" not in str(error)


@given(content=st.binary(max_size=60) | st.text('ab,"\n\r\x00é', max_size=40).map(str.encode))
def test_any_csv_is_labels_or_an_error_that_names_a_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.csv"
    file.write_bytes(b"pairID,gold_label\nx,neutral\n" + content)
    error = error_of(lambda: read_labels([file]))
    assert error is None or re.fullmatch(rf"{file}:[2-9]\d?", error.where)
    assert "\n" not in str(error)


# ------------------------------------------------------------------ the real thing


@pytest.mark.parametrize(("split", "photos", "counts"), [("train", 156, (792, 516, 869)), ("val", 52, (281, 181, 291))])
def test_all_pairs_of_the_small_set_are_read(
    shared_data: Path, tmp_path: Path, split: str, photos: int, counts: tuple[int, ...]
) -> None:
    source = SnliVe(str(shared_data / "snli_ve"), cache=str(tmp_path))
    examples = source.split(split)
    answers = examples.column("answers").to_pylist()
    assert tuple(answers.count([label]) for label in source.labels) == counts
    assert len(examples) == sum(counts)
    assert examples.skipped == {}
    assert len([*examples.image_ids()]) == photos


def test_no_photo_is_in_two_splits(shared_data: Path, tmp_path: Path) -> None:
    source = SnliVe(str(shared_data / "snli_ve"), cache=str(tmp_path))
    assert not {*source.split("train").image_ids()} & {*source.split("val").image_ids()}


def test_a_row_with_all_its_columns_is_read(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "formats" / "visual_entailment"
    examples = SnliVe(str(folder), val="sample_pairs.jsonl", cache=str(tmp_path)).split("val")
    assert (len(examples), examples[0]["text"]) == (16, "A toddler sleeps outside.")
