"""`manifest.json` of a stranger: one closed schema; whatever it says, no file outside of the set is opened."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from mutators import json_text
from watching import watched

from maskvlm.cli.main import main
from maskvlm.data.prepared.manifest import MANIFEST
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
    document: dict[str, Any] = json.loads(json.dumps(GOOD))
    *way, last = path.split("/")
    inner: Any = document
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
    assert read({**GOOD, "coverage": "\x1b]0;evil\x07a\x1b[2Jb\n"})["coverage"].isprintable()


WRONG: dict[str, tuple[Any, ...]] = {
    "splits/train/shards/0/file": ("../x/a", "/etc/passwd", "a", "train/.x", "train/\x00", "s3://b/c", "a\\b/c"),
    "splits/train/shards/0/rows": (-1, 2**60, 1.5, True, "1"),
    "splits/train/shards/0/sha256": ("", "x" * 64, None),
    "splits/train/shards": (5, [5]),
    "splits/train": (5, {}),
    "splits": (5, {"..": GOOD["splits"]["train"]}, {"a/b": GOOD["splits"]["train"]}),
    "files": (5, {"../x": SHA}, {"a": "b"}, {".hidden": SHA}),
    "left_out": (5, {"a": {"count": -1}}),
    "format": (0, 2, "1", None, True),
    "notes": ("x", ["x" * 20_000]),
    "settings": (5, {"columns": 5}),
    "look": ({"a": {"b": {"c": 1}}},),
}  # fmt: skip


@pytest.mark.parametrize("path", WRONG)
def test_each_wrong_value_is_one_line(path: str) -> None:
    for value in WRONG[path]:
        with pytest.raises(UserError) as raised:
            read(changed(path, value))
        assert raised.value.code == ExitCode.BAD_DATA
        assert str(raised.value).isprintable()
        assert len(str(raised.value)) < 400


def test_edits_at_random_are_read_or_one_line() -> None:
    for seed in range(200):
        try:
            manifest = checked_manifest(json_text(json.dumps(GOOD).encode(), random.Random(seed)), Path("m.json"))
        except UserError as error:
            assert str(error).isprintable()  # noqa: PT017
            continue
        for split in manifest["splits"].values():
            assert all(Path("set", shard["file"]).parent.parent == Path("set") for shard in split["shards"])


@pytest.mark.parametrize("name", ["train/data-00000.arrow", "train", MANIFEST, "skipped.jsonl"])
def test_no_link_of_a_set_is_followed_outside(name: str, tmp_path: Path) -> None:
    """Real links, and every file that is opened is watched."""
    root, secret = tmp_path / "toy", tmp_path / "secret"
    for folder in (root, secret):
        (folder / "train").mkdir(parents=True)
        (folder / "train" / "data-00000.arrow").write_bytes(b"abc")
        (folder / "skipped.jsonl").write_text("")
        (folder / MANIFEST).write_text(json.dumps(GOOD))
    (root / name).rename(tmp_path / "aside")
    (root / name).symlink_to(secret / name)
    with watched() as deeds:
        assert main(["data-check", str(root), "--workers", "1"]) == (77 if name == MANIFEST else 65)
        if name != "skipped.jsonl":
            with pytest.raises(UserError, match="leads out of"):
                Prepared(str(root)).split("train")
    assert not [deed for deed in deeds if deed.startswith(f"read {secret}/")]
