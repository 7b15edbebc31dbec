"""`python -m maskvlm data` and `make data`: from raw files to a set that trains, and the one line for each mistake."""

import csv
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from toy_raw import encoded, photo

from maskvlm.cli.main import main as maskvlm
from maskvlm.data.prepare.command import main, named_columns
from maskvlm.data.prepared.source import Prepared
from maskvlm.data.raw import SETS
from maskvlm.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Six photos and a csv with columns of unusual names; one picture is not there."""
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


COLUMNS = ["--columns", "image=ding,caption=spruch"]


def test_a_spreadsheet_becomes_a_set(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["csv", str(pairs), "--out", str(tmp_path / "sets" / "mine"), "--workers", "1", *COLUMNS]
    assert main([*command, "--look"], []) == 0
    assert [file.name for file in (tmp_path / "sets" / "mine").iterdir()] == ["first-look.png"]
    assert main(command, []) == 0
    split = Prepared(str(tmp_path / "sets" / "mine")).split("train")
    assert [split[index]["captions"] for index in range(6)] == [[f"photo number {number}"] for number in range(6)]
    assert split.column("source").unique().to_pylist() == ["mine"]
    told = capsys.readouterr().out
    assert f"{tmp_path / 'sets' / 'mine'}: 6 pictures (train 6), 6 captions; licence: " in told
    assert "left out: 1 rows (missing picture: 1), listed in " in told
    pairs.unlink()  # what is complete needs its raw files no more
    assert main(command, []) == 0
    assert "is prepared already (6 pictures); nothing to do" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "sets" / "mine" / "manifest.json").read_text())
    assert manifest["settings"]["columns"] == {"image": "ding", "caption": "spruch"}
    assert maskvlm(["data-check", str(tmp_path / "sets" / "mine"), "--workers", "1"]) == 0


def test_the_folder_of_sets_is_named_by_the_environment(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "here"))
    assert main(["csv", str(pairs), "--look", *COLUMNS], []) == 0
    assert (tmp_path / "here" / "csv" / "first-look.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cocoo", "x"], "SET: there is no set 'cocoo'. Did you mean coco?"),
        (["coco", "/no/such"], "RAW=/no/such: there is no such file or folder"),
        (["csv", "RAW", "--side", "4"], "--side: 4 is not from 8 to 10000"),
        (["csv", "RAW", "--quality", "101"], "--quality: 101 is not from 1 to 100"),
        (["csv", "RAW", "--side", "big"], "maskvlm data: argument --side: invalid int value"),
        (
            ["csv", "RAW", "--columns", "image"],
            "--columns: 'image' is not ROLE=COLUMN. Roles are: image, caption, id, split",
        ),
        (["csv", "RAW", "--columns", "picture=x"], "--columns: 'picture=x' is not ROLE=COLUMN"),
        (["csv"], "maskvlm data: the following arguments are required: RAW"),
        (["csv", "RAW", "--workers", "0"], "--workers: 0 is not from 1 to 1024"),
        (["csv", "RAW", "--out", "PARENT"], "RAW lies in the folder that is to be made"),
        (["folder", "PARENT", "--out", "PARENT/set"], "lies in RAW and would be read as a part of it"),
        (["folder", "PARENT", "--out", "PARENT"], "RAW lies in the folder that is to be made"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [each.replace("RAW", str(pairs)).replace("PARENT", str(pairs.parent)) for each in arguments]
    if "--out" not in words:
        words += ["--out", str(tmp_path / "out")]
    assert maskvlm(["data", *words]) != 0
    line = capsys.readouterr().err
    assert said in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_columns_may_have_any_name() -> None:
    assert named_columns(["image=a b,caption=c=d", "split = x"]) == {"image": "a b", "caption": "c=d", "split": "x"}
    assert named_columns([]) == {}
    with pytest.raises(UserError):
        named_columns(["image="])


# ------------------------------------------------------------------ make


def make(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    surroundings = {name: value for name, value in os.environ.items() if name != "DATA_ROOT"} | environment
    return subprocess.run(["make", *words], cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=60)


def test_make_knows_every_set() -> None:
    assert f"SET     {' '.join(SETS)}" in make("help").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data"], "no SET=; there are: coco flickr30k "),
        (["data", "SET=coca", "RAW=/x"], "no SET=coca; there are: coco flickr30k "),
        (["data", "SET=coco vg", "RAW=/x"], "no SET=coco vg; there are: "),
        (["data", "SET=coco"], "no RAW=; give the folder or file of SET=coco"),
        (["data", "SET=csv", "RAW=x", "NAME=a/b"], "NAME='a/b' is no name of a set"),
        (["data", "SET=csv", "RAW=x", "NAME=.."], "NAME='..' is no name of a set"),
        (["data-check"], "NAME='' is no name of a set; give one word"),
    ],
)
def test_make_refuses_before_anything_is_installed(words: list[str], said: str) -> None:
    done = make(*words, "PYTHON=false")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_make_hands_names_on(tmp_path: Path) -> None:
    done = make("-n", "data", "SET=csv", "RAW=my pairs.csv", "NAME=mine", "PYTHON=python", 'ARGS=--columns "image=a b"')
    assert done.stdout.strip() == "python -m maskvlm data csv 'my pairs.csv' --out 'data/mine' --columns \"image=a b\""
    done = make("-n", "data", "SET=coco", "RAW=/x", "PYTHON=python", DATA_ROOT=str(tmp_path / "a b"))
    assert done.stdout.strip() == f"python -m maskvlm data coco '/x' --out '{tmp_path}/a b/coco'"
    done = make("-n", "data-check", "SET=coco", "PYTHON=python", "DATA_ROOT=/d")
    assert done.stdout.strip() == "python -m maskvlm data-check '/d/coco'"


def test_a_prepared_set_needs_no_file_of_its_own(tmp_path: Path) -> None:
    for name in ("mine", "half", "coco"):
        (tmp_path / "s p" / name).mkdir(parents=True)
    for name in ("mine", "coco"):
        (tmp_path / "s p" / name / "manifest.json").touch()
    there = f"DATA_ROOT={tmp_path / 's p'}"
    done = make("-n", "pretrain", "DATA=mine", "PYTHON=python", "RUN=x", there, "ARGS=--data.seed 1")
    assert (
        f"-c conf/data/prepared.yaml -c conf/where/auto.yaml --data.source.root '{tmp_path}/s p/mine' --data.seed 1"
        in (done.stdout)
    )
    done = make("-n", "pretrain", "DATA=coco", "PYTHON=python", "RUN=x", there)
    assert "-c conf/data/coco.yaml" in done.stdout
    assert "source.root" not in done.stdout
    done = make("pretrain", "DATA=half", "PYTHON=false", there)
    assert "no DATA=half; there are: " in done.stderr
    assert f"prepared in {tmp_path}/s p: coco mine" in done.stderr
    assert f"prepared in {tmp_path}/s p: coco mine" in make("help", there).stdout


def test_the_prepared_sets_file_parses_with_the_root_that_make_gives() -> None:
    from maskvlm.cli.lightning import Parsed, run

    files = ["conf/base.yaml", "conf/model/tiny.yaml", "conf/pretrain.yaml", "conf/data/prepared.yaml"]
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        words: list[Any] = [word for file in files for word in ("-c", file)]
        settings = run(Parsed, ["fit", *words, "--data.source.root", "/d/mine"]).settings
    finally:
        os.chdir(here)
    assert settings.data.init_args.source.init_args.root == "/d/mine"
    assert settings.data.init_args.source.init_args.hold_out == 1000
