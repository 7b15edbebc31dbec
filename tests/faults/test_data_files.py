"""Files that are none (pipes, sockets, devices), links that lead out, names that nothing can have: one line each, with
its exit status, and no waiting; rows of a set that name such files are bad rows, counted.
"""

import os
import socket
from pathlib import Path

import pytest
from raw_toys import IMAGES, TOYS, write

from maskvlm.cli.main import main
from maskvlm.data.raw import SETS, BadRow, RawRow, open_raw
from maskvlm.utils.errors import ExitCode, UserError
from tasks.entailment.data import SnliVe
from tasks.nlvr.data import Nlvr2
from tasks.vqa.data import VqaV2

Captured = pytest.CaptureFixture[str]


def ended(capsys: Captured, name: str, raw: Path | str, out: Path, *more: str) -> int:
    """The exit status of `maskvlm data`, which says one line."""
    code = main(["data", name, str(raw), "--out", str(out), "--workers", "1", *more])
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert len(stderr) < 1000
    return code


def good_rows(toy: str, raw: Path) -> list[RawRow]:
    return [row for row in open_raw(TOYS[toy][0], str(raw)).rows() if isinstance(row, RawRow)]


@pytest.mark.parametrize("name", SETS)
def test_a_set_that_is_no_file_is_one_line(name: str, tmp_path: Path, capsys: Captured) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as address:
        address.bind(str(tmp_path / "socket"))
        for place in (tmp_path / "pipe", tmp_path / "socket", "/dev/zero"):
            assert ended(capsys, name, place, tmp_path / "out") == ExitCode.MISSING_INPUT


# ------------------------------------------------------------------ links


LINKED: list[tuple[str, str, str]] = [
    ("folder", "0.txt", "secret.txt"),
    ("folder", "0.jpg", "0.jpg"),
    ("csv", "0.jpg", "0.jpg"),
    ("webdataset", "1.tar", "0.tar"),
    ("webdataset files", "0.json", "secret.txt"),
    ("flickr8k", "images/11.jpg", "0.jpg"),
    ("vg", "VG_100K/0.jpg", "0.jpg"),
]
"""A set, the name of a link in it, and what it leads to in a folder that nobody named."""


@pytest.mark.parametrize(("toy", "name", "target"), LINKED)
def test_what_a_link_leads_to_outside_is_no_row(toy: str, name: str, target: str, tmp_path: Path) -> None:
    outside = {"secret.txt": b"a secret", "0.tar": TOYS["webdataset"][1]()["00000.tar"], "0.jpg": IMAGES[0]}
    write(tmp_path / "outside", {**outside, "deep/0.jpg": IMAGES[0], "deep/0.txt": b"secret"})
    link = write(tmp_path / "raw", TOYS[toy][1]()) / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "outside" / target)
    rows = [*open_raw(TOYS[toy][0], str(tmp_path / "raw")).rows()]
    assert {"link leads out", "missing image"} & {row.reason for row in rows if isinstance(row, BadRow)}
    for row in rows:
        if isinstance(row, RawRow):
            assert "secret" not in " ".join(row.captions)
            assert isinstance(row.image, bytes) or "outside" not in os.path.realpath(row.image)


@pytest.mark.parametrize(
    ("toy", "name"),
    [
        ("csv", "pairs.csv"),
        ("flickr8k", "dataset_flickr8k.json"),
        ("vqav2", "v2_mscoco_val2014_annotations.json"),
        ("hf", "train/data-00000-of-00001.arrow"),
    ],
)
def test_a_list_that_lies_outside_is_refused(toy: str, name: str, tmp_path: Path) -> None:
    """By `make data`, and by the task that reads the same files."""
    raw = write(tmp_path / "raw", TOYS[toy][1]())
    (raw / name).rename(tmp_path / "moved")
    (raw / name).symlink_to(tmp_path / "moved")
    sources = {"nlvr2": Nlvr2, "snli_ve": SnliVe, "vqav2": VqaV2}
    reads = [lambda: good_rows(toy, raw)] if toy != "snli_ve" else []
    if toy in sources:
        reads.append(lambda: sources[toy](str(raw), cache=str(raw)).split("val"))
    for read in reads:
        with pytest.raises(UserError, match="leads out of") as raised:
            read()
        assert raised.value.code == ExitCode.REFUSED


# ------------------------------------------------------------------ names


def test_names_in_a_set_that_nothing_can_have_are_bad_rows(tmp_path: Path) -> None:
    names = ["x" * 300 + ".jpg", "a\\u0000b.jpg", "\\ud800.jpg", "../x.jpg", "/etc/passwd", "a\\nb.jpg", "./0.jpg"]
    rows = "".join(f'{{"image": "{name}", "caption": "a"}}\n' for name in names)
    raw = write(tmp_path, {"pairs.jsonl": rows.encode(), "0.jpg": IMAGES[0]})
    assert len([row for row in open_raw("jsonl", str(raw)).rows() if isinstance(row, BadRow)]) == 6
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(IMAGES[0])
    reasons = [row.reason for row in open_raw("folder", str(raw)).rows() if isinstance(row, BadRow)]
    assert "name is not text" in reasons


@pytest.mark.parametrize("named", ["http://127.0.0.1:9/x.parquet", "/etc/x.parquet", "../../x.parquet"])
def test_the_card_of_a_local_set_names_no_other_place(tmp_path: Path, named: str) -> None:
    head = f'configs:\n- config_name: default\n  data_files: "{named}"\n'
    write(tmp_path / "set", {"README.md": f"---\n{head}---\n# A set\n".encode()})
    with pytest.raises(UserError, match="which is not in this folder") as caught:
        list(open_raw("hf", str(tmp_path / "set")).rows())
    assert caught.value.code == ExitCode.REFUSED
