"""`maskvlm data` and `make data`: from raw files to a set that trains, and the one line for each mistake."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_raw import encoded, photo

from maskvlm.cli.main import main as maskvlm
from maskvlm.data.prepare.command import main, named_columns, verify_set
from maskvlm.data.prepared.source import Prepared
from maskvlm.data.raw import SETS
from maskvlm.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


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


def test_a_row_without_a_caption_is_listed_by_its_own_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not by the first line of its image, which has a caption."""
    for name in ("0.jpg", "1.jpg"):
        (tmp_path / name).write_bytes(encoded(photo(0 if name == "0.jpg" else 1)))
    rows = ["image,caption", "0.jpg,a photo", "1.jpg,another", '0.jpg," "']
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    assert main(["csv", str(tmp_path / "pairs.csv"), "--out", str(tmp_path / "mine"), "--workers", "1"], []) == 0
    assert "left out: 1 row (empty caption: 1)" in capsys.readouterr().out
    (line,) = (tmp_path / "mine" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["origin"] == "pairs.csv:4"
    assert [len(each) for each in Prepared(str(tmp_path / "mine")).split("train").column("captions").to_pylist()] == [
        1,
        1,
    ]


def test_repaired_captions_are_told_in_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails where they are counted in the manifest only."""
    (tmp_path / "0.jpg").write_bytes(encoded(photo(0)))
    rows = ["image,caption", f"0.jpg,{'a dog ' * 1000}", "0.jpg,a\u200b dog", "0.jpg,a\u200b cat"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    assert main(["csv", str(tmp_path / "pairs.csv"), "--out", str(tmp_path / "mine"), "--workers", "1"], []) == 0
    line = "repaired or dropped: 3 captions (caption control: 2, caption cut: 1), listed in "
    output = capsys.readouterr().out
    assert f"{line}{tmp_path / 'mine' / 'skipped.jsonl'}; for example pairs.csv:2: caption 2 of 3\n" in output
    assert "left out" not in output
    (tmp_path / "one.csv").write_text("image,caption,\n0.jpg,dog,\n")
    assert main(["csv", str(tmp_path / "one.csv"), "--out", str(tmp_path / "one"), "--workers", "1"], []) == 0
    output = capsys.readouterr().out
    assert "1 image (train 1), 1 caption; licence" in output
    assert "caption as caption; not: (a column without a name)\n" in output


COLUMNS = ["--columns", "image=ding,caption=spruch"]


def test_a_table_of_images_elsewhere_becomes_a_set(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The set remembers their folder: with another one it is another set."""
    table = pairs.rename(tmp_path / "table.csv")
    command = ["csv", str(table), "--out", str(tmp_path / "mine"), *COLUMNS, "--workers", "1", "--images"]
    assert main([*command, str(pairs.parent)], []) == 0
    assert len(Prepared(str(tmp_path / "mine")).split("train")) == 6
    # the table names its images through a link to their folder
    (tmp_path / "link").symlink_to(pairs.parent)
    (tmp_path / "links.csv").write_text(f"ding,spruch\n{tmp_path}/link/0.jpg,one\n")
    linked = ["csv", str(tmp_path / "links.csv"), "--out", str(tmp_path / "linked"), *COLUMNS, "--workers", "1"]
    assert main([*linked, "--images", str(tmp_path / "link")], []) == 0
    assert len(Prepared(str(tmp_path / "linked")).split("train")) == 1
    assert main([*command, str(pairs.parent)], []) == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="--images: it is empty"):
        main([*command, ""], [])
    with pytest.raises(UserError, match=r"made with images '.*raw' instead of '.*mine'"):
        main([*command, str(tmp_path / "mine")], [])


def test_a_set_made_before_the_folder_of_images_was_an_option_is_still_itself(pairs: Path, tmp_path: Path) -> None:
    command = ["csv", str(pairs), "--out", str(tmp_path / "mine"), *COLUMNS, "--workers", "1"]
    assert main(command, []) == 0
    file = tmp_path / "mine" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["settings"]["images"]
    file.write_text(json.dumps(manifest))
    assert main(command, []) == 0


def test_a_spreadsheet_becomes_a_set(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["csv", str(pairs), "--out", str(tmp_path / "sets" / "mine"), "--workers", "1", *COLUMNS]
    assert main([*command, "--look"], []) == 0
    assert capsys.readouterr().out.startswith("mine: 6 images with 6 captions (train 6)\n")
    assert [file.name for file in (tmp_path / "sets" / "mine").iterdir()] == ["first-look.png"]
    assert main(command, []) == 0
    split = Prepared(str(tmp_path / "sets" / "mine")).split("train")
    assert [split[index]["captions"] for index in range(6)] == [[f"photo number {number}"] for number in range(6)]
    assert split.column("source").unique().to_pylist() == ["mine"]
    output = capsys.readouterr().out
    assert f"{tmp_path / 'sets' / 'mine'}: 6 images (train 6), 6 captions; licence: " in output
    assert "left out: 1 row (missing image: 1), listed in " in output
    assert re.search(rf"skipped.jsonl; for example \S+:\d+: 'lost.jpg' is not in {pairs.parent}\n", output)
    assert main(command, []) == 0
    assert capsys.readouterr().err == ""
    later = (tmp_path / "sets" / "mine" / "manifest.json").stat().st_mtime + 2
    os.utime(pairs, (later, later))
    assert main(command, []) == 0
    assert f"warning: {pairs} was written after this set; to prepare the set again, delete" in capsys.readouterr().err
    pairs.unlink()  # what is complete needs its raw files no more
    assert main(command, []) == 0
    assert "already prepared (6 images); nothing to do" in capsys.readouterr().out
    monkeypatch.chdir(pairs.parent)
    assert main(["csv", pairs.name, *command[2:]], []) == 0  # also where its place was typed otherwise
    assert "already prepared (6 images); nothing to do" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "sets" / "mine" / "manifest.json").read_text())
    assert manifest["settings"]["columns"] == {"image": "ding", "caption": "spruch"}
    assert maskvlm(["data-check", str(tmp_path / "sets" / "mine"), "--workers", "1"]) == 0


def test_a_look_at_the_files_of_a_prepared_set_leaves_the_set_as_it_is(pairs: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "mine"), "--columns", "image=ding,caption=spruch"]
    assert main(["csv", str(pairs), *out, "--workers", "1"], []) == 0
    assert main(["csv", str(pairs), *out, "--look"], []) == 0
    assert (tmp_path / "mine-first-look.png").is_file()
    assert verify_set([str(tmp_path / "mine"), "--workers", "1"], []) == 0


def test_a_name_that_is_a_word_of_its_own_is_told(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["csv", str(pairs), "--out", str(tmp_path / "coco"), "--workers", "1", *COLUMNS], []) == 0
    note = "note: data=coco still refers to the set of conf/data/coco.yaml, not this one"
    assert note in capsys.readouterr().out


def test_the_folder_of_sets_is_named_by_the_environment(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "here"))
    assert main(["csv", str(pairs), "--look", *COLUMNS], []) == 0
    assert (tmp_path / "here" / "csv" / "first-look.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cocoo", "x"], "data: there is no set 'cocoo'. Did you mean coco?"),
        (["coco", "/no/such"], "/no/such: there is no such file or folder"),
        (
            ["csv", "RAW", "--columns", "caption=a,image=x,caption=b"],
            "--columns: caption is named twice.",
        ),
        (["csv", "RAW", "--side", "4"], "--side: 4 is not from 8 to 10000"),
        (["csv", "RAW", "--quality", "101"], "--quality: 101 is not from 1 to 100"),
        (["csv", "RAW", "--side", "big"], "maskvlm data: argument --side: invalid int value"),
        (
            ["csv", "RAW", "--columns", "image"],
            "--columns: 'image' is not ROLE=COLUMN. Available roles: image, caption, id, split",
        ),
        (["csv", "RAW", "--columns", "picture=x"], "--columns: 'picture=x' is not ROLE=COLUMN"),
        (["csv"], "data: raw= is missing. maskvlm data csv raw=FILE.csv."),
        (["csv", "RAW", "--colums", "a"], "unrecognized arguments: --colums a (did you mean --columns?)"),
        (["csv", "RAW", "--workers", "0"], "--workers: 0 is not from 1 to 1024"),
        (["csv", "RAW", "--out", "PARENT"], "RAW is inside the folder to be created"),
        (["folder", "PARENT", "--out", "PARENT/set"], "is inside RAW and would be read as part of it"),
        (["folder", "PARENT", "--out", "PARENT"], "RAW is inside the folder to be created"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [each.replace("RAW", str(pairs)).replace("PARENT", str(pairs.parent)) for each in arguments]
    if "--out" not in words:
        words += ["--out", str(tmp_path / "out")]
    assert maskvlm(["data", *words]) != 0
    line = capsys.readouterr().err
    assert message in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_columns_may_have_any_name() -> None:
    assert named_columns(["image=a b,caption=c=d", "split = x"]) == {"image": "a b", "caption": "c=d", "split": "x"}
    assert named_columns([]) == {}
    with pytest.raises(UserError):
        named_columns(["image="])


def test_help_lists_every_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert maskvlm(["data", "--help"]) == 0
    assert " ".join(SETS) in " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------------ by name


def test_make_hands_the_folder_of_sets_on(pairs: Path, tmp_path: Path) -> None:
    """In the environment or typed, with spaces and all."""
    for typed, environment in (([f"DATA_ROOT={tmp_path}/a b"], {}), ([], {"DATA_ROOT": f"{tmp_path}/c d"})):
        command = ["make", "data", "SET=csv", f"RAW={pairs}", "NAME=mine", f"PYTHON={sys.executable}", *typed]
        command.append('ARGS=--columns "image=ding,caption=spruch" --look')
        surroundings = {name: value for name, value in os.environ.items() if name != "DATA_ROOT"} | environment
        subprocess.run(command, cwd=ROOT, env=surroundings, check=True, timeout=60)
    assert (tmp_path / "a b" / "mine" / "first-look.png").is_file()
    assert (tmp_path / "c d" / "mine" / "first-look.png").is_file()


def test_a_prepared_set_needs_no_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: Callable[..., list[str]]
) -> None:
    for name in ("mine", "half", "coco"):
        (tmp_path / "s p" / name).mkdir(parents=True)
    for name in ("mine", "coco"):
        (tmp_path / "s p" / name / "manifest.json").touch()
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "s p"))
    monkeypatch.chdir(ROOT)
    assert stack(DATA="mine")[-6:] == [
        "-c", "conf/data/prepared.yaml", "-c", "conf/where/auto.yaml", "--data.source.root", f"{tmp_path}/s p/mine",
    ]  # fmt: skip
    assert "conf/data/coco.yaml" in stack(DATA="coco")
    assert "--data.source.root" not in stack(DATA="coco")
    with pytest.raises(
        UserError, match=f"data=half: no such data set. Available: .*prepared in {tmp_path}/s p: coco, mine"
    ):
        stack(DATA="half")
    (tmp_path / "s p" / "half" / "first-look.png").touch()
    with pytest.raises(UserError, match=r"data=half: was only previewed \(.*\. Prepare it: the same `maskvlm data"):
        stack(DATA="half")
    (tmp_path / "s p" / "half" / ".making").mkdir()
    with pytest.raises(UserError, match=r"data=half: is not finished\. Run the same `maskvlm data` again"):
        stack(DATA="half")


def test_the_prepared_sets_file_parses_with_the_root_that_make_gives() -> None:
    from maskvlm.cli.lightning import Parsed, run_command

    files = ["conf/base.yaml", "conf/model/tiny.yaml", "conf/pretrain.yaml", "conf/data/prepared.yaml"]
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        words: list[Any] = [word for file in files for word in ("-c", file)]
        settings = run_command(Parsed, ["fit", *words, "--data.source.root", "/d/mine"]).settings
    finally:
        os.chdir(here)
    assert settings.data.init_args.source.init_args.root == "/d/mine"
    assert settings.data.init_args.source.init_args.hold_out == 1000


def test_a_table_without_names_of_columns_is_told(tmp_path: Path) -> None:
    """Naming a column after its first value would lose the first row."""
    (tmp_path / "pairs.csv").write_text("photos/one.jpg,a red bird\nphotos/two.jpg,a blue bird\n")
    with pytest.raises(UserError, match=r"pairs.csv.*the first line is a row.* Write one above it: image,caption"):
        main(["csv", str(tmp_path / "pairs.csv"), "--out", str(tmp_path / "mine"), "--workers", "1"], [])


def test_where_no_row_can_be_used_one_is_named(tmp_path: Path) -> None:
    """A wrong folder is the usual reason: the place that was searched is told."""
    (tmp_path / "pairs.csv").write_text("image,caption\nlost.jpg,a red bird\n")
    with pytest.raises(UserError, match=r"no row can be used \(.*for example \S+:2: 'lost.jpg' is not in "):
        main(["csv", str(tmp_path / "pairs.csv"), "--out", str(tmp_path / "mine"), "--look"], [])


def test_a_broken_image_of_a_table_is_named_by_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.jpg").write_bytes(encoded(photo(1)))
    (tmp_path / "two.jpg").write_bytes(encoded(photo(2))[:300])
    (tmp_path / "pairs.csv").write_text("image,caption\none.jpg,a red bird\ntwo.jpg,a blue bird\n")
    main(["csv", str(tmp_path / "pairs.csv"), "--out", str(tmp_path / "mine"), "--workers", "1"], [])
    (line,) = (tmp_path / "mine" / "skipped.jsonl").read_text().splitlines()
    wanted = f"pairs.csv:3 ({tmp_path / 'two.jpg'}): bad image, truncated"
    assert json.loads(line)["message"].startswith(wanted)
    assert f"for example {wanted}" in capsys.readouterr().out
    main(["csv", str(tmp_path / "pairs.csv"), "--out", str(tmp_path / "look"), "--look"], [])
    assert f"for example {wanted}" in capsys.readouterr().out


def test_where_every_row_is_bad_as_a_text_its_images_are_not_blamed(tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_bytes(encoded(photo(1)))
    (tmp_path / "pairs.csv").write_text("image,caption\none.jpg,\n")
    with pytest.raises(UserError, match=r"no image can be used .*Check the rows of RAW: no image was opened"):
        main(["csv", str(tmp_path / "pairs.csv"), "--out", str(tmp_path / "mine"), "--workers", "1"], [])


def test_the_example_of_a_bad_row_names_its_place_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.jpg").write_bytes(encoded(photo(1)))
    (tmp_path / "two.jpg").write_bytes(encoded(photo(2)))
    (tmp_path / "pairs.csv").write_text("image,caption\none.jpg,a red bird\ntwo.jpg,\n")
    assert main(["csv", str(tmp_path / "pairs.csv"), "--out", str(tmp_path / "mine"), "--workers", "1"], []) == 0
    (line,) = [each for each in capsys.readouterr().out.splitlines() if each.startswith("left out:")]
    assert line.count("pairs.csv:3") == 1
