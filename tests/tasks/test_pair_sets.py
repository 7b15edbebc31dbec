"""NLVR2 and SNLI-VE as distributed: what is read, left out, corrected and refused; the official consistency."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskvlm.data.images import safe_open
from maskvlm.data.table import RowOrigin
from maskvlm.utils.errors import ExitCode, UserError
from tasks.entailment.data import SnliVe
from tasks.nlvr.data import Nlvr2, parse_nlvr

Write = Callable[..., Any]


def pair(
    identifier: Any = "dev-1-0-0", sentence: Any = "Two dogs.", label: Any = "True", **more: Any
) -> dict[str, Any]:
    """A line of NLVR2."""
    return {"identifier": identifier, "sentence": sentence, "label": label, **more}


def row(name: Any = "a", label: Any = "entailment", text: Any = "A dog.", photo: Any = "11") -> dict[str, Any]:
    """A line of SNLI-VE."""
    return {"Flickr30K_ID": photo, "gold_label": label, "pairID": name, "sentence2": text, "captionID": "11.jpg#0"}


def write_lines(file: Path, rows: list[Any]) -> None:
    file.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in rows))


@pytest.fixture
def nlvr(tmp_path: Path) -> Write:
    """Write rows as a split, with the images named; gives the source."""

    def write(rows: list[Any], *pairs: str, split: str = "val", **options: Any) -> Nlvr2:
        (tmp_path / "images" / "deep").mkdir(parents=True, exist_ok=True)
        for name in pairs or ("dev-1-0", "dev-1-1"):
            (tmp_path / "images" / "deep" / f"{name}-img0.png").touch()
            (tmp_path / "images" / "deep" / f"{name}-img1.jpg").touch()
        write_lines(tmp_path / {"train": "train.json", "val": "dev.json", "test": "test1.json"}[split], rows)
        return Nlvr2(str(tmp_path), cache=str(tmp_path / "cache"), **options)

    return write


@pytest.fixture
def snli(tmp_path: Path) -> Write:
    """Write rows as a split, with the images of 11 and 22; gives the source."""

    def write(rows: list[Any], split: str = "val", **options: Any) -> SnliVe:
        (tmp_path / "images").mkdir(exist_ok=True)
        for photo in ("11-a.jpg", "11.jpg", "22_ab.jpg"):
            (tmp_path / "images" / photo).touch()
        write_lines(tmp_path / f"snli_ve_{'dev' if split == 'val' else split}.jsonl", rows)
        return SnliVe(str(tmp_path), cache=str(tmp_path / "cache"), **options)

    return write


def test_a_line_of_nlvr2_is_an_example_of_two_images(nlvr: Write, tmp_path: Path) -> None:
    rows = [pair(), pair("dev-1-1-0", label="false", synset="dog"), pair("dev-1-1-1", "One  cat.", False)]
    source = nlvr(rows)
    assert source.labels == ("False", "True")
    examples = source.split("val")
    assert len(examples) == 3
    assert examples[2] == {
        "images": [str(tmp_path / "images" / "deep" / f"dev-1-1-img{name}") for name in ("0.png", "1.jpg")],
        "image_ids": ["nlvr2 dev-1-1-img0", "nlvr2 dev-1-1-img1"],
        "text": "One cat.",
        "answers": ["False"],
        "id": "dev-1-1-1",
        "kind": "",
        "group": "dev-1-1",
        "origin": "dev.json:3",
    }
    assert [examples[i]["answers"] for i in range(3)] == [["True"], ["False"], ["False"]]
    assert [examples[i]["group"] for i in range(3)] == ["dev-1-0", "dev-1-0", "dev-1-1"]
    assert source.targets(["False"]) == {"False": 1.0}


def test_a_line_of_snli_ve_is_an_example_of_one_image(snli: Write, tmp_path: Path) -> None:
    source = snli([row(), row("22.jpg#1r1n", "Neutral", "It is  late.", 22)])
    assert source.labels == ("entailment", "neutral", "contradiction")
    examples = source.split("val")
    assert len(examples) == 2
    assert examples[0]["images"][0].endswith("images/11.jpg")  # one named by its number alone is preferred
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


def test_training_skips_and_counts_what_evaluation_refuses(nlvr: Write, snli: Write, tmp_path: Path) -> None:
    rows = [pair(f"train-{i}-0-0", "a \ud800" if i == 7 else "" if i == 8 else "a") for i in range(10)]
    source = nlvr(rows, *(f"train-{i}-0" for i in range(10)), split="train", max_missing=0.12)
    (tmp_path / "images" / "deep" / "train-4-0-img1.jpg").unlink()
    examples = source.split("train")
    assert [examples[i]["id"] for i in range(8)] == [f"train-{i}-0-0" for i in range(10) if i not in (4, 8)]
    assert examples.skipped == {
        "text surrogate": ["train.json:8"], "empty text": ["train.json:9"], "missing image": ["train.json:5"],
    }  # fmt: skip
    assert examples[6]["text"] == "a \ufffd"
    (tmp_path / "images" / "deep" / "train-5-0-img0.png").unlink()
    with pytest.raises(UserError, match=r"2 of .* nlvr2 train-4-0-img1, nlvr2 train-5-0-img0"):
        source.split("train")
    with pytest.raises(UserError, match=r"dev\.json:2: 1 of 2 .* nlvr2 dev-9-0-img0") as caught:
        nlvr([pair(), pair("dev-9-0-0")], max_missing=1.0).split("val")
    assert caught.value.code == ExitCode.MISSING_INPUT
    rows = [row("a"), row("b", photo="33"), row("c", text=""), row("d", "-")]
    assert snli(rows, "train", max_missing=0.5).split("train").skipped == {
        "no gold label": ["snli_ve_train.jsonl:4"],
        "empty text": ["snli_ve_train.jsonl:3"],
        "missing image": ["snli_ve_train.jsonl:2"],
    }
    assert snli([row(), row("d", "-")], "test").split("test").skipped == {"no gold label": ["snli_ve_test.jsonl:2"]}


LINES: list[tuple[Any, str]] = [
    ("{", "not JSON"),
    ("[]", "list instead of a JSON object"),
    (pair("dev-1-1-0", 3), "'sentence' is int"),
    (pair("dev-1-1-0", " \u200b"), "the text is empty"),
    (pair("dev-1-1-0", label="maybe"), "'label' is 'maybe'"),
    (pair("dev-1-1-0", label=1), "'label' is 1, a number"),
    (pair("dev-1-1"), "'dev-1-1' is not split-set-pair-sentence"),
    (pair("dev-1--0"), "'dev-1--0' is not"),
    (pair("../dev-1-1-0"), "leads out of the folder"),
    (pair(), "'dev-1-0-0' appears twice"),
    ({"pairID": "x", "gold_label": "neutral"}, "'Flickr30K_ID'"),
    (row("x", "unsure"), "'gold_label' is 'unsure'"),
    (row("x", text=["a"]), "'sentence2' is list"),
    (row("x", text=" "), "the text is empty"),
    (row("x", photo="../11"), "leads out of the folder"),
    (row("x", photo="33"), "1 of 2 examples"),
    (row(), "'a' appears twice"),
]


@pytest.mark.parametrize(("line", "message"), LINES)
def test_a_wrong_line_is_named(nlvr: Write, snli: Write, line: Any, message: str) -> None:
    source = snli([row(), line]) if isinstance(line, dict) and "pairID" in line else nlvr([pair(), line])
    with pytest.raises(UserError, match=rf"dev\.jsonl?:2: .*{message}"):
        source.split("val")


def test_missing_files_and_splits_are_named(nlvr: Write, snli: Write) -> None:
    for source in (nlvr([pair()], val=None), snli([row()], val=None)):
        with pytest.raises(UserError, match=r"test1?\.jsonl?: no such file"):
            source.split("test")
        with pytest.raises(UserError, match=r"data\.source\.val: no file"):
            source.split("val")
    with pytest.raises(UserError, match=r"dev\.json: no example"):
        nlvr([]).split("val")


# ------------------------------------------------------------------ corrected labels


def corrections(folder: Path, name: str, *rows: tuple[str, str], column: str = "gold_label") -> str:
    """A file in the layout of e-ViL's esnlive_dev.csv, or lines of json."""
    file = folder / name
    if file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["", "pairID", "Flickr30kID", "hypothesis", column, "explanation"])
            writer.writerows([i, pair, "1.jpg", 'a "dog",\nyes', label, ""] for i, (pair, label) in enumerate(rows))
    else:
        file.write_text("".join(json.dumps({"pairID": name, column: label}) + "\n" for name, label in rows))
    return str(file)


@pytest.mark.parametrize(("name", "column"), [("dev.csv", "gold_label"), ("dev.jsonl", "label")])
def test_corrected_labels_replace_those_of_the_pair(snli: Write, tmp_path: Path, name: str, column: str) -> None:
    new = [("a", "contradiction"), ("b", "neutral"), ("c", "neutral"), ("d", "-"), ("elsewhere", "neutral")]
    files = [corrections(tmp_path, name, *new, column=column), corrections(tmp_path, "2.csv", ("f", "neutral"))]
    rows = [row("a"), row("b", "neutral"), row("c", "-"), row("d"), row("e"), row("f")]
    plain, examples = (snli(rows, corrected=corrected).split("val") for corrected in (None, files))
    answers = {examples[i]["id"]: examples[i]["answers"][0] for i in range(len(examples))}
    assert answers == {"a": "contradiction", "b": "neutral", "c": "neutral", "e": "entailment", "f": "neutral"}
    assert {reason: [place[-2:] for place in places] for reason, places in examples.skipped.items()} == {
        "label corrected": [":1", ":3", ":4", ":6"],
        "no gold label": [":4"],
    }
    assert examples.fingerprint != plain.fingerprint


def test_corrections_for_none_of_the_pairs_are_warned_of(
    snli: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for each evaluated split, also from the cache; not in training, nor where one fits."""
    files = [corrections(tmp_path, "none.csv", ("x", "neutral")), corrections(tmp_path, "z.jsonl", ("z", "-"))]
    for _ in range(2):
        caplog.clear()
        source = snli([row("a"), row("b", "-")], corrected=files)
        for _ in range(2):
            assert source.split("val")[0]["answers"] == ["entailment"]
        assert [record.args[1:] for record in caplog.records] == [(", ".join(files), "snli_ve_dev.jsonl")]
    caplog.clear()
    snli([row("b")], "train", corrected=files).split("train")
    # Also where the label was right before, or a pair is left out now.
    for number, hit in enumerate([("a", "entailment"), ("a", "-"), ("b", "neutral")]):
        fits = corrections(tmp_path, f"{number}.csv", hit)
        snli([row("a"), row("b", "-"), row("c")], corrected=[*files, fits]).split("val")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"pairID,text\n1,b\n", ":2: no columns .*'text'"),
        ("a.csv", b"pairID,gold_label\nx,maybe\n", ":2: 'gold_label' is 'maybe'"),
        ("a.csv", b"pairID,gold_label\nx,neutral\nx,entailment\n", ":3: pairID 'x' is 'entailment' here"),
        ("a.csv", b'pairID,gold_label\nx,"neutral', ":2: .*quote left open"),
        ("a.csv", b'pairID,gold_label\nx,"neutral\ny,neutral\nz,"\n', ":2: .*another row"),
        ("a.csv", b'pairID,gold_label\nx,"\n\xff"\n', ":2: "),
        ("a.csv", b"pairID,gold_label\n", ": no label in this file"),
        ("a.jsonl", b"{}", ":1: no columns"),
    ],
)
def test_a_wrong_file_of_corrections_is_named(
    snli: Write, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name + message):
        snli([row()], corrected=str(tmp_path / name)).split("val")
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match="no such file"):
        snli([row()], corrected=str(tmp_path / name)).split("val")


# ------------------------------------------------------------------ the real thing


def official(identifiers: list[str], right: list[bool]) -> float:
    """Consistency by the rule of nlvr2/eval/metrics.py: the third part of the identifier does not count."""
    consistent: dict[tuple[str, ...], bool] = {}
    for identifier, one in zip(identifiers, right, strict=True):
        parts = identifier.split("-")
        sentence = (*parts[:2], *parts[3:])
        consistent[sentence] = consistent.get(sentence, True) and one
    return sum(consistent.values()) / len(consistent)


def test_groups_give_the_official_consistency(shared_data: Path) -> None:
    file = shared_data / "formats" / "nlvr2" / "dev.head300.json"
    table = parse_nlvr(RowOrigin(file, "{file}:{place}"))
    right = [number % 5 > 0 for number in range(300)]
    by_group: dict[str, list[bool]] = {}
    for group, one in zip(table.columns["group"], right, strict=True):
        by_group.setdefault(group, []).append(one)
    assert len(by_group) == len({json.loads(line)["sentence"] for line in file.read_text().splitlines()}) == 88
    assert sum(map(all, by_group.values())) / 88 == official(table.columns["id"], right)


def test_true_rows_are_read(shared_data: Path, tmp_path: Path) -> None:
    examples = Nlvr2(str(shared_data / "formats" / "nlvr2"), val="tiny-dev.json", cache=str(tmp_path)).split("val")
    assert (len(examples), len({*examples.image_ids()})) == (8, 8)
    assert [safe_open(image, "").width > 100 for image in examples[7]["images"]] == [True, True]
    folder = shared_data / "formats" / "visual_entailment"
    examples = SnliVe(str(folder), val="sample_pairs.jsonl", cache=str(tmp_path)).split("val")
    assert (len(examples), examples[0]["text"]) == (16, "A toddler sleeps outside.")


def test_all_pairs_of_the_small_sets_are_read(shared_data: Path, tmp_path: Path) -> None:
    pairs = Nlvr2(str(shared_data / "nlvr_pairs"), cache=str(tmp_path)).split("val")
    assert pairs.column("answers").to_pylist().count(["True"]) == 1112
    assert (len(pairs), len([*pairs.image_ids()]), pairs.skipped) == (1980, 2 * 1980, {})
    source = SnliVe(str(shared_data / "snli_ve"), cache=str(tmp_path))
    train, val = source.split("train"), source.split("val")
    answers = val.column("answers").to_pylist()
    assert [answers.count([label]) for label in source.labels] == [281, 181, 291]
    assert (len(train), len(val), train.skipped, val.skipped) == (2177, 753, {}, {})
    assert (len({*train.image_ids()}), len({*val.image_ids()})) == (156, 52)
    assert not {*train.image_ids()} & {*val.image_ids()}
