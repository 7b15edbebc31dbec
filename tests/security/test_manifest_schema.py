"""`manifest.json` of a stranger: one closed schema; whatever it says, no file outside of the set is opened."""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from guards import Build
from hypothesis import given, settings
from hypothesis import strategies as st
from mutators import json_text

from maskvlm.cli.main import main
from maskvlm.data.prepared.manifest import MANIFEST, read_manifest
from maskvlm.data.prepared.manifest_schema import checked_manifest
from maskvlm.data.prepared.source import Prepared
from maskvlm.utils.errors import ExitCode, UserError

SHA = "0" * 64
SHARD = {"file": "train/data-00000.arrow", "rows": 1, "bytes": 3, "sha256": SHA}
GOOD: dict[str, Any] = {
    "format": 1,
    "name": "toy",
    "coverage": "1 image",
    "notes": ["a note"],
    "splits": {"train": {"pictures": 1, "captions": 1, "sha256": SHA, "shards": [SHARD]}},
    "files": {"skipped.jsonl": SHA},
    "settings": {"set": "csv", "raw": "x  y", "columns": {"image": "i"}, "side": 48},
    "left_out": {"gone": {"count": 2, "examples": [{"origin": "a:1", "message": "gone"}]}},
    "look": {"repeated_captions": 0, "caption_words": {"5 %": 1}},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    document = json.loads(json.dumps(GOOD))
    *way, last = path.split("/")
    inner = document
    for key in way:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[last] = value
    return document


def read(document: Any) -> dict[str, Any]:
    return checked_manifest(json.dumps(document).encode(), Path("m.json"))


def test_a_good_one_is_read_and_what_is_unknown_is_left_out() -> None:
    manifest = read({**GOOD, "evil": {"class_path": "os.system"}, "splits": changed("splits/train/more", 1)["splits"]})
    assert "evil" not in manifest
    assert "more" not in manifest["splits"]["train"]
    assert manifest["splits"]["train"]["shards"] == [SHARD]
    assert (manifest["title"], manifest["mended"], manifest["settings"]["raw"]) == ("unknown", {}, "x  y")
    assert read({"format": 1, "splits": {}})["files"] == {}


@pytest.mark.guard("maskvlm.data.prepared.manifest_schema:checked_manifest", gives="__import__('json').loads(args[0])")
@pytest.mark.parametrize(
    ("path", "value"),
    [
        *[
            ("splits/train/shards/0/file", name)
            for name in ("../x/a", "/etc/passwd", "a", "a/../b", "train/.x", "a/b/c")
        ],
        *[
            ("splits/train/shards/0/file", name)
            for name in ("train/\x00", "train/\x9b2J", "s3://b/c", "a\\b/c", "train/\ud800", "", 5)
        ],
        *[("splits/train/shards/0/rows", number) for number in (-1, 2**60, 1.5, True, "1", None)],
        *[("splits/train/shards/0/sha256", text) for text in ("", "x" * 64, None, 0)],
        *[
            ("splits", value)
            for value in (
                5,
                [],
                None,
                {"..": {}},
                {"\x9b2J": GOOD["splits"]["train"]},
                {"a/b": GOOD["splits"]["train"]},
                {"": {}},
            )
        ],
        *[("splits/train", value) for value in (5, [], None, {})],
        *[("splits/train/shards", value) for value in (5, {}, None, [5], [None])],
        *[("files", value) for value in (5, [], {"../x": SHA}, {"/x": SHA}, {"a": "b"}, {".hidden": SHA})],
        *[("left_out", value) for value in (5, [], {"a": 5}, {"a": {"count": -1}}, {"a": {}})],
        *[("format", value) for value in (0, 2, -1, "1", None, True, 10**30, [])],
        *[("notes", value) for value in ("x", [5], ["x" * 20_000])],
        *[("coverage", value) for value in (5, [], "x" * 20_000)],
        *[("settings", value) for value in (5, {"columns": 5}, {"side": "x"})],
        ("look", {"a": {"b": {"c": 1}}}),
    ],
)
def test_each_wrong_value_is_one_line(path: str, value: Any, build: Build) -> None:
    with pytest.raises(UserError) as raised:
        read(changed(path, value))
    assert raised.value.code == ExitCode.BAD_DATA
    assert str(raised.value).startswith("m.json: ")
    assert len(str(raised.value)) < 400
    assert str(raised.value).isprintable()


def test_what_could_reach_a_terminal_as_a_command_is_dropped() -> None:
    assert read({**GOOD, "coverage": "\x1b]0;evil\x07a\x1b[2Jb\n"})["coverage"].isprintable()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_edits_at_random_are_read_or_one_line(seed: int) -> None:
    content = json_text(json.dumps(GOOD).encode(), random.Random(seed))
    try:
        manifest = checked_manifest(content, Path("m.json"))
    except UserError as error:
        assert str(error).isprintable()  # noqa: PT017
        return
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            assert Path("set", shard["file"]).parent.parent == Path("set")


# ------------------------------------------------------------------ what reads it


OPENED: list[str] = []
WATCHING: list[bool] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHING and event == "open" and isinstance(arguments[0], str):
        OPENED.append(os.path.realpath(arguments[0]))


sys.addaudithook(watch)


@pytest.mark.guard("maskvlm.data.safe_open:Inside.holds", gives="True")
@pytest.mark.parametrize("what", ["shard", "folder", "manifest", "file"])
def test_no_link_of_a_set_is_followed_outside(what: str, tmp_path: Path, build: Build) -> None:
    """Real links, and every file that is opened is watched."""
    root, secret = tmp_path / "toy", tmp_path / "secret"
    (root / "train").mkdir(parents=True)
    secret.mkdir()
    (secret / "data-00000.arrow").write_bytes(b"abc")
    (secret / MANIFEST).write_text(json.dumps(GOOD))
    (root / "skipped.jsonl").write_text("")
    (root / "train" / "data-00000.arrow").write_bytes(b"abc")
    (root / MANIFEST).write_text(json.dumps(GOOD))
    places = {"shard": "train/data-00000.arrow", "manifest": MANIFEST, "file": "skipped.jsonl"}
    if what == "folder":
        (root / "train" / "data-00000.arrow").unlink()
        (root / "train").rmdir()
        (root / "train").symlink_to(secret)
    else:
        (root / places[what]).unlink()
        (root / places[what]).symlink_to(secret / (MANIFEST if what == "manifest" else "data-00000.arrow"))
    OPENED.clear()
    WATCHING.append(True)
    assert main(["data-check", str(root), "--workers", "1"]) == (77 if what == "manifest" else 65)
    if what != "file":
        with pytest.raises(UserError, match="leads out of"):
            Prepared(str(root)).split("train")
    WATCHING.clear()
    assert not [path for path in OPENED if path.startswith(f"{secret}/")]


@pytest.mark.parametrize("content", ["{}", "[]", "5", '{"format": 1, "splits": {"train": 5}}', "{" * 9000, "\x00"])
def test_data_check_of_a_damaged_manifest_is_one_line(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / MANIFEST).write_text(content)
    assert main(["data-check", str(tmp_path)]) == ExitCode.BAD_DATA
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError):
        read_manifest(tmp_path)
