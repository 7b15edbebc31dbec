"""`maskvlm data`: from raw files in every layout to a set that trains, and the one line for each mistake.

How to break the code so that these fail: leave a check of `RowMaker.take` or of a reader out (another row is left out,
or another reason told); compose `data=mine` without its root.
"""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from prepared_sets import in_process
from raw_toys import TEXTS, TOYS, write
from toy_raw import encoded, photo

from maskvlm.cli.commands import COMMANDS
from maskvlm.cli.main import main as maskvlm
from maskvlm.data.prepare.command import main, verify_set
from maskvlm.data.prepared.manifest import read_manifest
from maskvlm.data.prepared.source import Prepared
from maskvlm.utils.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ["--columns", "image=ding,caption=spruch"]


@pytest.fixture(autouse=True)
def in_this_process() -> Iterator[None]:
    with in_process():
        yield


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Six photos and a csv with columns of unusual names; one image is not there."""
    folder = tmp_path / "raw"
    folder.mkdir()
    with (folder / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ding", "spruch"])
        for number in range(6):
            (folder / f"{number}.jpg").write_bytes(encoded(photo(number)))
            rows.writerow([f"{number}.jpg", f"photo number {number}"])
        rows.writerow(["lost.jpg", "nothing"])
    return folder / "pairs.csv"


@pytest.mark.parametrize("toy", TOYS)
def test_every_published_layout_becomes_a_set(tmp_path: Path, own_cache: None, toy: str) -> None:
    name, files = TOYS[toy]
    raw = write(tmp_path / "raw", files())
    assert main([name, str(raw), "--out", str(tmp_path / "mine"), "--side", "8"], []) == 0
    manifest = read_manifest(tmp_path / "mine")
    splits = ["train", "val", "test"] if name in ("coco", "flickr30k", "flickr8k") else ["train"]
    splits = ["train", "val"] if toy == "flickr8k token" else splits
    annotated = name in ("vqav2", "daquar", "nlvr2", "nlvr_pairs", "snli_ve")
    assert [*manifest["splits"]] == (["pictures"] if annotated else splits)
    assert manifest["pictures"] == 3
    assert (len(manifest["files"]) > 2) == annotated  # the lists of annotations
    assert sum(entry["count"] for entry in manifest["left_out"].values()) == name.startswith("nlvr")  # a lone image
    if not annotated:
        rows = [Prepared(str(tmp_path / "mine")).split(split) for split in splits]
        assert sorted(text for part in rows for n in range(len(part)) for text in part.captions(n)) == sorted(TEXTS)


GOOD = ("كلب أسود يركض في الثلج", "一只黑狗在雪地里奔跑", "🐕 in the snow ❄ 🐾", 'a dog, a "cat"', "犬が雪の中を走る。")
JPEG = encoded(photo(0))
BROKEN: list[tuple[str, bytes, bytes]] = [
    ("not an image (text/html)", b"<!DOCTYPE html><html><body>410 Gone</body></html>", b"a dog"),
    ("truncated", JPEG[: len(JPEG) // 2], b"a dog"),
    ("empty caption", JPEG, "\u200b\u200e".encode()),
    ("caption too long", JPEG, b"dog " * 30_000),
    ("not UTF-8 text", JPEG, b"un chien \xe0 la neige"),
    ("not UTF-8 text", JPEG, b"a dog \xed\xa0\x80"),
    ("null bytes", JPEG, b"a\x00dog"),
]


def test_exactly_the_broken_rows_are_left_out(tmp_path: Path) -> None:
    """Each under its reason, between good rows; captions in every script stay byte by byte."""

    def line(name: str, caption: bytes) -> bytes:
        return f'{name},"'.encode() + caption.replace(b'"', b'""') + b'"'

    images, lines, expected = dict[str, bytes](), [b"image,caption"], dict[str, str]()
    for number, (reason, image, text) in enumerate(BROKEN):
        images |= {f"{number}.jpg": encoded(photo(number)), f"{number}.bad": image}
        lines += [line(f"{number}.jpg", GOOD[number % len(GOOD)].encode()), line(f"{number}.bad", text)]
        expected[f"pairs.csv:{len(lines)}"] = reason
    raw = write(tmp_path / "raw", {**images, "pairs.csv": b"\n".join(lines)})
    assert main(["csv", str(raw), "--out", str(tmp_path / "mine"), "--side", "8"], []) == 0
    skipped = [json.loads(line) for line in (tmp_path / "mine" / "skipped.jsonl").read_text().splitlines()]
    assert {entry["origin"]: entry["reason"] for entry in skipped} == expected
    pairs = Prepared(str(tmp_path / "mine")).split("train")
    assert [pairs.captions(n) for n in range(len(pairs))] == [[GOOD[n % len(GOOD)]] for n in range(len(expected))]


# ------------------------------------------------------------------ the command


def test_a_spreadsheet_becomes_a_set(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "sets" / "coco"
    command = ["csv", str(pairs), "--out", str(root), *COLUMNS]
    assert main([*command, "--look"], []) == 0
    assert [file.name for file in root.iterdir()] == ["first-look.png"]
    assert main(command, []) == 0
    assert "note: data=coco still refers to the set of conf/data/coco.yaml" in capsys.readouterr().out
    split = Prepared(str(root)).split("train")
    assert [split[index]["captions"] for index in range(6)] == [[f"photo number {number}"] for number in range(6)]
    assert split.column("source").unique().to_pylist() == ["coco"]
    assert verify_set([str(root), "--workers", "1"], []) == 0
    later = (root / "manifest.json").stat().st_mtime + 2
    os.utime(pairs, (later, later))
    assert main(command, []) == 0
    assert "was written after this set" in capsys.readouterr().err
    pairs.unlink()  # what is complete needs its raw files no more
    assert main(command, []) == 0
    assert "already prepared (6 images); nothing to do" in capsys.readouterr().out
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["settings"]["columns"] == {"image": "ding", "caption": "spruch"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coco", "/no/such"], "there is no such file or folder"),
        (["csv", "RAW", "--side", "4"], "--side: 4 is not from 8 to 10000"),
        (["csv", "RAW", "--colums", "a"], "did you mean --columns?"),
        (["csv", "RAW", "--out", "PARENT"], "RAW is inside the folder to be created"),
        (["folder", "PARENT", "--out", "PARENT/set"], "is inside RAW and would be read as part of it"),
        (["csv", "RAW", "--columns", "picture=ding"], "is not ROLE=COLUMN"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [each.replace("RAW", str(pairs)).replace("PARENT", str(pairs.parent)) for each in arguments]
    words += ["--out", str(tmp_path / "out")] * ("--out" not in words)
    assert maskvlm(["data", *words]) != 0
    line = capsys.readouterr().err
    assert message in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_set_of_your_own_is_trained_on_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "sets"))
    rows = "".join(f"{n}.jpg,a dog number {n},{'val' if n < 6 else 'train'}\n" for n in range(18))
    images = {f"{n}.jpg": encoded(photo(n)) for n in range(18)}
    raw = write(tmp_path / "raw", {**images, "pairs.csv": f"image,caption,split\n{rows}".encode()})
    assert main(["csv", str(raw), "--out", str(tmp_path / "sets" / "mine"), "--side", "48"], []) == ExitCode.DONE
    arguments = COMMANDS["pretrain"].full(["data=mine", "where=cpu"])
    arguments[arguments.index("--folder") + 1] = str(tmp_path / "run")
    short = ["--data.steps=2", "--data.epochs=null", "--data.batch_size=4", "--trainer.limit_val_batches=0"]
    assert maskvlm([*arguments, *short]) == 0
    facts = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert facts["finished"]["step"] == 2
    assert facts["data"]["train"]["sha"] == Prepared(str(tmp_path / "sets" / "mine")).split("train").fingerprint
