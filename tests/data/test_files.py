"""Reading json, lines of json and folders of images: what is found, and the one line that says what is wrong."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from maskvlm.data.files import (
    ImagesByKey,
    digest_of,
    get,
    get_label,
    get_name,
    image_names,
    json_lines,
    load_json,
)
from maskvlm.utils.errors import ExitCode, UserError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


# ------------------------------------------------------------------ lines and documents


def test_lines_and_documents_name_the_line_of_a_mistake(tmp_path: Path) -> None:
    """Numbered as an editor does."""
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xe2\x80\xa8"}')
    assert [*json_lines(file)] == [(f"{file}:1", 1, {"a": 1}), (f"{file}:4", 4, {"a": "\u2028"})]
    for line in (b'{"a": 1', b'{"a": "\xff"}', b"[" * 200_000, b'{"a": ' + b"1" * 5000 + b"}", b"[1]", b"{} {}"):
        file.write_bytes(b"{}\n" + line + b"\n{}\n")
        with pytest.raises(UserError) as caught:
            list(json_lines(file))
        assert (caught.value.where, caught.value.code) == (f"{file}:2", ExitCode.BAD_DATA)
    for content, where in ((b'{\n"a": 1,\n}', "f.json:3"), (b"\xef\xbb\xbf \n", "f.json")):
        with pytest.raises(UserError, match=f"{where}: "):
            load_json(content, Path("f.json"))


def test_a_file_is_known_by_its_content_and_a_missing_one_is_named(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    a.write_bytes(b"1"), b.write_bytes(b"2"), c.write_bytes(b"1")
    assert digest_of(a) == digest_of(c)
    assert len({digest_of(a), digest_of(b), digest_of(a, b), digest_of(b, a), digest_of()}) == 5
    for path in (tmp_path / "no", tmp_path, tmp_path / "no" / "x"):
        for read in (lambda file: [*json_lines(file, "Look there")], lambda file: digest_of(file, todo="Look there")):
            with pytest.raises(UserError, match="Look there") as caught:
                read(path)
            assert (caught.value.where, caught.value.code) == (str(path), ExitCode.MISSING_INPUT)


# ------------------------------------------------------------------ values


def name_of(value: Any) -> str:
    return get_name({"id": value}, "id", "x:1", "toy")


def label_of(value: Any) -> str:
    return get_label({"label": value}, "label", ("False", "True"), "x:1", "toy")


def test_values_of_the_right_type_come_back() -> None:
    record = {"number": 3, "text": "", "list": []}
    assert [get(record, key, type(value), "", "") for key, value in record.items()] == [3, "", []]
    assert [name_of(value) for value in (0, 12, "dev-1", "3.jpg#2r1c")] == ["0", "12", "dev-1", "3.jpg#2r1c"]
    assert {label_of(value) for value in ("True", " TRUE ", True)} == {"True"}


@pytest.mark.parametrize(
    "read",
    [
        *(lambda record=record: get(record, "key", int, "x:1", "VQA") for record in ([], {}, {"key": "3"})),
        lambda: get({"key": True}, "key", int, "x:1", "VQA"),
        *(lambda value=value: name_of(value) for value in ("a\x00", "../a", "/a", "a/../b")),
        *(lambda value=value: label_of(value) for value in ("maybe", None, [["True"]], "", 0, -1.5)),
    ],
)
def test_a_value_of_another_type_is_refused(read: Callable[[], object]) -> None:
    with pytest.raises(UserError) as caught:
        read()
    assert caught.value.where == "x:1"
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ images


def test_links_within_the_folder_are_followed_once(tmp_path: Path) -> None:
    """All images are found but hidden ones."""
    touch(tmp_path, "b.png", "in/a.JPG", "in/deep/c.webp", "in/._a.jpg", ".hidden/d.jpg", "a.txt", "in/jpg")
    assert image_names(tmp_path) == ["b.png", "in/a.JPG", "in/deep/c.webp"]
    touch(tmp_path, "here/there/a.jpg", "here/b.jpg")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "here" / "there")
    (tmp_path / "here" / "there" / "back").symlink_to(tmp_path / "here")
    (tmp_path / "by link").symlink_to(tmp_path / "here")
    assert image_names(tmp_path / "here") == image_names(tmp_path / "by link") == ["b.jpg", "link/a.jpg"]


def test_images_are_found_by_key_and_told_by_their_names_and_sizes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"1234")
    images = pickle.loads(pickle.dumps(ImagesByKey(tmp_path, {f"x {name}": f"{name}.png" for name in "abc"})))
    positions = images.find(pa.chunked_array([["x b", "x d"], ["x a"]]))
    assert positions.tolist() == [1, -1, 0]
    assert images.path(positions[0]) == str(tmp_path / "b.png")
    first = images.identity([0, 1])
    assert first != images.identity([0, 2])
    (tmp_path / "c.png").write_bytes(b"12345")
    assert images.identity([0, 1]) == first
    (tmp_path / "b.png").write_bytes(b"12345")
    assert images.identity([0, 1]) != first
