"""Reading json, lines of json and folders of images: what is found, and the one line that says what is wrong."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from karpathy_rows import image

from maskvlm.data.files import (
    ImagesByKey,
    check_missing,
    digest_of,
    get,
    get_label,
    get_name,
    image_folder,
    image_names,
    json_lines,
    load_json,
)
from maskvlm.data.raw import RawRow, open_raw
from maskvlm.utils.errors import ExitCode, UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=6,
)


def error_of(read: Callable[[], object]) -> UserError | None:
    """The user's error that reading ends with; any other exception is ours."""
    try:
        read()
    except UserError as error:
        return error
    return None


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


# ------------------------------------------------------------------ lines


def test_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xe2\x80\xa8"}')
    assert [*json_lines(file)] == [(f"{file}:1", 1, {"a": 1}), (f"{file}:4", 4, {"a": "\u2028"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "x.jsonl:2: not JSON (column 8: "),
        (b'{"a": "\xff"}', "x.jsonl:2: not UTF-8 text (byte 7)"),
        (b"[" * 200_000, "x.jsonl:2: nested too deeply for JSON data"),
        (b'{"a": ' + b"1" * 5000 + b"}", "x.jsonl:2: not JSON (a number is too long)"),
        (b"[1]", "x.jsonl:2: list instead of a JSON object. Write one object per line."),
        (b"null", "x.jsonl:2: NoneType instead of"),
        (b"{} {}", "x.jsonl:2: not JSON (column 4: Extra data)"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"{}\n" + line + b"\n{}\n")
    with pytest.raises(UserError) as caught:
        list(json_lines(file))
    assert message in str(caught.value)
    assert caught.value.code == ExitCode.BAD_DATA


@given(line=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_a_line_holds_is_an_object_or_an_error_that_names_it(
    tmp_path_factory: pytest.TempPathFactory, line: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(b"{}\n" + line)
    error = error_of(lambda: [each.record.keys() for each in json_lines(file)])
    assert error is None or error.where in {f"{file}:{number}" for number in range(2, 42)}
    assert "\n" not in str(error)


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    no_folder = f" (there is no folder {tmp_path / 'no'})"
    for path, folder in ((tmp_path / "no", ""), (tmp_path, ""), (tmp_path / "no" / "x", no_folder)):
        for read in (
            lambda file: list(json_lines(file, "Look there")),
            lambda file: digest_of(file, todo="Look there"),
        ):
            with pytest.raises(UserError) as caught:
                read(path)
            assert str(caught.value) == f"{path}: no such file{folder}. Look there."
            assert caught.value.code == ExitCode.MISSING_INPUT


def test_the_digest_follows_contents_and_their_order(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    a.write_bytes(b"1"), b.write_bytes(b"2"), c.write_bytes(b"1")
    assert digest_of(a) == digest_of(c)
    assert len({digest_of(a), digest_of(b), digest_of(a, b), digest_of(b, a), digest_of()}) == 5


# ------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("record", "kind", "message"),
    [
        ([], int, "list instead of an object with 'key'"),
        ({}, int, "key 'key' is missing"),
        ({"key": "3"}, int, "'key' is str instead of int"),
        ({"key": True}, int, "'key' is bool instead of int"),
        ({"key": None}, str, "'key' is NoneType instead of str"),
    ],
)
def test_a_value_of_another_type_is_refused(record: Any, kind: type, message: str) -> None:
    with pytest.raises(UserError) as caught:
        get(record, "key", kind, "file:3", "VQA")
    assert str(caught.value) == f"file:3: {message}. A file in the VQA layout is needed."


def test_values_of_the_right_type_come_back() -> None:
    record = {"number": 3, "text": "", "list": []}
    assert get(record, "number", int, "", "") == 3
    assert get(record, "text", str, "", "") == ""
    assert get(record, "list", list, "", "") == []


@pytest.mark.parametrize(("value", "name"), [(0, "0"), (12, "12"), ("dev-1", "dev-1"), ("3.jpg#2r1c", "3.jpg#2r1c")])
def test_numbers_and_plain_texts_are_names(value: Any, name: str) -> None:
    assert get_name({"id": value}, "id", "x:1", "toy") == name


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "'id' is bool instead of a number or a name"),
        (1.5, "'id' is float instead"),
        (None, "'id' is NoneType instead"),
        ([], "'id' is list instead"),
        (-1, "'id' is -1"),
        ("", "'id' is '': empty, or not plain text"),
        (" a", "empty, or not plain text"),
        ("a\nb", "'id' is 'a\\nb': empty"),
        ("\ud800", "empty, or not plain text"),
        ("a\x00", "empty, or not plain text"),
        ("../a", "'../a' leads out of the folder"),
        ("/a", "'/a' leads out of the folder"),
        ("a/../b", "'a/../b' leads out of the folder"),
    ],
)
def test_what_cannot_name_a_thing_is_refused(value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        get_name({"id": value}, "id", "x:1", "toy")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.where == "x:1"


@pytest.mark.parametrize("value", ["True", "true", " TRUE ", True])
def test_labels_are_found_in_any_case(value: Any) -> None:
    assert get_label({"label": value}, "label", ("False", "True"), "x:1", "toy") == "True"


@pytest.mark.parametrize(
    ("value", "text"), [("maybe", "maybe"), ("2", "2"), (None, "NoneType"), ([["True"]], "list"), ("", "")]
)
def test_another_label_is_named_with_the_classes(value: Any, text: str) -> None:
    with pytest.raises(UserError) as caught:
        get_label({"label": value}, "label", ("False", "True"), "x:1", "toy")
    assert str(caught.value).startswith(f"x:1: 'label' is '{text}', the classes are False, True. ")


@pytest.mark.parametrize("value", [2, 0, -1.5])
def test_a_number_is_no_label(value: float) -> None:
    with pytest.raises(UserError) as caught:
        get_label({"label": value}, "label", ("False", "True"), "x:1", "toy")
    assert str(caught.value) == (
        f"x:1: 'label' is {value}, a number; the classes are named False, True. Correct the label or remove the row."
    )


@given(value=JSON)
def test_no_value_raises_anything_else(value: Any) -> None:
    for read in (get_name, lambda *a: get_label(a[0], a[1], ("a", "-"), a[2], a[3])):
        error = error_of(lambda: read({"id": value}, "id", "x:1", "toy"))  # noqa: B023  called at once
        assert error is None or error.where == "x:1"
        assert "\n" not in str(error)


def test_documents_name_the_line_of_the_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"f\.json:3: not JSON"):
        load_json(b'{\n"a": 1,\n}', Path("f.json"))


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf"])
def test_an_empty_document_is_called_so(content: bytes) -> None:
    with pytest.raises(UserError) as caught:
        load_json(content, Path("f.json"))
    assert str(caught.value) == "f.json: empty file. Fetch it again."
    assert caught.value.code == ExitCode.BAD_DATA
    with pytest.raises(UserError, match=r"f\.json:3: not JSON"):  # one line of several
        load_json(content, Path("f.json"), 3)


# ------------------------------------------------------------------ images


def test_images_are_found_in_all_folders_but_hidden_ones(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "in/a.JPG", "in/deep/c.webp", "in/._a.jpg", ".hidden/d.jpg", "a.txt", "in/jpg")
    assert image_names(tmp_path) == ["b.png", "in/a.JPG", "in/deep/c.webp"]


def test_links_within_the_folder_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "here/there/a.jpg", "here/b.jpg")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "here" / "there")
    (tmp_path / "here" / "there" / "back").symlink_to(tmp_path / "here")
    (tmp_path / "by link").symlink_to(tmp_path / "here")
    assert image_names(tmp_path / "here") == image_names(tmp_path / "by link") == ["b.jpg", "link/a.jpg"]


def test_a_name_that_is_no_text_is_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).touch()
    left_out: dict[str, list[str]] = {}
    assert image_names(tmp_path, left_out) == ["a.jpg"]
    assert left_out == {"name is not text": ["\udcff.jpg"]}


def test_images_of_formats_that_are_not_read_are_listed(tmp_path: Path) -> None:
    touch(tmp_path, "a.JFIF", "in/b.HEIC", "c.tif", "d.txt", "._e.heic")
    left_out: dict[str, list[str]] = {}
    assert image_names(tmp_path, left_out) == ["a.JFIF"]
    assert left_out == {"image format not read: convert to .jpg or .png": ["c.tif", "in/b.HEIC"]}
    (tmp_path / "a.JFIF").unlink()
    with pytest.raises(UserError, match="no image in this folder that can be read; 2 in other formats"):
        image_names(tmp_path)


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no image in this folder\. Name a folder with images \(\.bmp, ") as caught:
        image_names(touch(tmp_path, "a.txt"))
    assert caught.value.code == ExitCode.MISSING_INPUT


def test_the_folder_is_the_named_one_or_images_or_the_root(tmp_path: Path) -> None:
    assert image_folder(None, tmp_path) == tmp_path
    (tmp_path / "images").mkdir()
    assert image_folder(None, tmp_path) == tmp_path / "images"
    assert image_folder(str(tmp_path), tmp_path / "else") == tmp_path
    with pytest.raises(UserError, match=r"/no: there is no such folder of images\. Correct data\.source\.images"):
        image_folder(str(tmp_path / "no"), tmp_path)


def test_keys_are_looked_up_at_once(tmp_path: Path) -> None:
    images = pickle.loads(pickle.dumps(ImagesByKey(tmp_path, {"x 1": "a.png", "x 2": "in/b.png"})))
    positions = images.find(pa.chunked_array([["x 2", "x 3"], ["x 1"]]))
    assert positions.tolist() == [1, -1, 0]
    assert images.path(positions[0]) == str(tmp_path / "in" / "b.png")


def test_other_images_are_told_by_their_names_and_sizes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"1234")
    images = ImagesByKey(tmp_path, {f"x {name}": f"{name}.png" for name in "abc"})
    first = images.identity([0, 1])
    assert images.identity([0, 1]) == first != images.identity([0, 2])
    (tmp_path / "c.png").write_bytes(b"12345")
    assert images.identity([0, 1]) == first
    (tmp_path / "b.png").write_bytes(b"12345")
    assert images.identity([0, 1]) != first


@pytest.mark.parametrize(
    ("split", "absent", "share", "refused"),
    [("train", 1, 0.1, False), ("train", 2, 0.1, True), ("train", 10, 1.0, True), ("val", 1, 0.5, True)],
)
def test_how_many_images_may_be_missing(split: str, absent: int, share: float, refused: bool) -> None:
    def check() -> None:
        check_missing("x:1", split, Path("in"), [f"{i // 2}.png" for i in range(absent)], 10, share)

    if not refused:
        return check()
    verb = "is" if absent == 1 else "are"
    with pytest.raises(
        UserError, match=f"x:1: {absent} of 10 images of split '{split}' {verb} not in in: 0.png"
    ) as caught:
        check()
    assert caught.value.code == ExitCode.MISSING_INPUT
    assert ("evaluation leaves nothing out" in str(caught.value)) == (split == "val")


@pytest.mark.parametrize(("names", "fault"), [(["a 1"], "lacks an image"), (["a 1", "a 1"], "lack an image")])
def test_of_examples_it_is_examples_that_are_counted(names: list[str], fault: str) -> None:
    with pytest.raises(UserError) as caught:
        check_missing("x:1", "val", Path("in"), names, 9, 0, "examples")
    assert caught.value.what == f"{len(names)} of 9 examples of split 'val' {fault} in in: a 1"


# ------------------------------------------------------------------ the same photo, the same id


def ids_by_split(name: str, raw: Path) -> dict[str, list[str]]:
    """Of a raw set: the ids of each split, in order."""
    ids: dict[str, list[str]] = {}
    for row in open_raw(name, str(raw)).rows():
        if isinstance(row, RawRow):
            ids.setdefault(row.split, []).append(row.image_id)
    return ids


def test_a_flickr_photo_has_its_own_number_as_id(karpathy: Any) -> None:
    names = ["1019604187_d087bf9a5f.jpg", "36979.jpg", "x.jpg", "77_a.jpg", "77_b.jpg"]
    file = karpathy([image(name, "train", "a dog", imgid=number) for number, name in enumerate(names)])
    ids = ["flickr 1019604187", "flickr 36979", "flickr 2", "flickr 3", "flickr 4"]
    whole = Path(file).rename(Path(file).with_name("dataset_flickr30k.json"))
    assert ids_by_split("flickr30k", whole.parent) == {"train": ids}


def test_photos_of_snli_ve_are_found_in_flickr8k(shared_data: Path) -> None:
    ids = ids_by_split("flickr8k", shared_data / "flickr8k")
    train, val = ({*ids[name]} for name in ("train", "val"))
    assert (len(train), len(val)) == (6000, 1000)
    premises = {f"flickr {file.stem}" for file in (shared_data / "snli_ve" / "images").iterdir()}
    assert (len(premises), len(premises & train), len(premises & val)) == (208, 185, 20)
