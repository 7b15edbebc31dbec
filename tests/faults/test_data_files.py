"""Files that are none (pipes, sockets, devices), links that lead out, names that nothing can have: one line each, with
its exit status, and no waiting; rows of a set that name such files are bad rows, counted.

How to break the code so that these fail: open files with `open` instead of `opening.opened`; leave `Inside.holds` or
`check_path` out.
"""

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from guards import Build
from raw_toys import IMAGES, TOYS, write

from maskvlm.cli.main import main
from maskvlm.data.files import load_json, opened
from maskvlm.data.raw import SETS, BadRow, RawRow, open_raw
from maskvlm.utils.errors import ExitCode, UserError
from tasks.entailment.data import SnliVe
from tasks.nlvr.data import Nlvr2
from tasks.vqa import score, vocabulary
from tasks.vqa.data import VqaV2

Captured = pytest.CaptureFixture[str]


def line(capsys: Captured) -> str:
    """The one line on stderr."""
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert "This is a bug" not in stderr
    return stderr


# ------------------------------------------------------------------ pipes, sockets, devices


@pytest.mark.guard("maskvlm.data.safe_open:check_plain")
@pytest.mark.parametrize("name", SETS)
def test_a_set_that_is_no_file_is_one_line(name: str, tmp_path: Path, capsys: Captured, build: Build) -> None:
    os.mkfifo(tmp_path / "pipe")
    address = socket.socket(socket.AF_UNIX)
    address.bind(str(tmp_path / "socket"))
    for place, kind in (
        ("pipe", "a pipe"),
        ("socket", "a socket"),
        ("/dev/null", "a device"),
        ("/dev/zero", "a device"),
    ):
        words = ["data", name, str(tmp_path / place), "--out", str(tmp_path / "out"), "--workers", "1"]
        assert main(words) == ExitCode.MISSING_INPUT
        assert f"is {kind}, not a file" in line(capsys)
    address.close()


def test_a_substituted_process_is_one_line(tmp_path: Path, build: Build) -> None:
    """`make data SET=csv RAW=<(..)`, by a real shell."""
    command = " ".join(build.command("data", "csv", "<(echo image,caption)", "--out", tmp_path / "out"))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == ExitCode.MISSING_INPUT
    assert "is a pipe, not a file" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("toy", TOYS)
def test_a_pipe_in_the_place_of_any_file_of_a_set_is_not_waited_for(toy: str, tmp_path: Path) -> None:
    content = TOYS[toy][1]()
    started = time.monotonic()
    for number, gone in enumerate(content):
        folder = write(tmp_path / str(number), {name: data for name, data in content.items() if name != gone})
        (folder / gone).parent.mkdir(exist_ok=True)
        os.mkfifo(folder / gone)
        try:
            rows = [*open_raw(TOYS[toy][0], str(folder)).rows()]
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
            continue
        assert len([row for row in rows if isinstance(row, RawRow)]) <= 3
    assert time.monotonic() - started < 20


@pytest.mark.guard("maskvlm.data.safe_open:check_plain")
def test_no_file_of_a_task_is_a_pipe(tmp_path: Path, build: Build) -> None:
    os.mkfifo(tmp_path / "a.json")
    reads = (
        lambda: score.read_results(tmp_path / "a.json"),
        lambda: [*vocabulary.read_annotations(tmp_path / "a.json")],
        lambda: Nlvr2(str(tmp_path), train="a.json", cache=str(tmp_path)).split("train"),
    )
    for read in reads:
        with pytest.raises(UserError, match="is a pipe, not a file"):
            read()


def test_a_set_in_the_place_of_a_file_and_the_other_way_round(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("x")
    for name, raw in (("csv", "folder.csv"), ("folder", "file"), ("webdataset", "file"), ("flickr8k", "file")):
        words = ["data", name, str(tmp_path / raw), "--out", str(tmp_path / "out"), "--workers", "1"]
        assert main(words) == ExitCode.MISSING_INPUT
        line(capsys)
    with pytest.raises(UserError) as raised, opened(tmp_path / "folder.csv"):
        pass
    assert raised.value.code == ExitCode.MISSING_INPUT


# ------------------------------------------------------------------ links


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that nobody named: a secret, an image, a table, a tar."""
    tar = TOYS["webdataset"][1]()["00000.tar"]
    texts = {"secret.txt": b"a secret", "pairs.csv": b"image,caption\n0.jpg,a secret\n", "0.tar": tar}
    return write(tmp_path / "outside", {**texts, "0.jpg": IMAGES[0], "deep/0.jpg": IMAGES[0], "deep/0.txt": b"secret"})


def link(raw: Path, outside: Path, **links: str) -> Path:
    for name, target in links.items():
        path = raw / name.replace("__", ".").replace("_in_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(outside / target)
    return raw


LINKED: list[tuple[str, dict[str, str]]] = [
    ("folder", {"0__txt": "secret.txt"}),
    ("folder", {"0__jpg": "0.jpg"}),
    ("folder", {"more": "deep"}),
    ("csv", {"0__jpg": "0.jpg"}),
    ("jsonl", {"images": "deep"}),
    ("webdataset", {"1__tar": "0.tar"}),
    ("webdataset files", {"0__txt": "secret.txt"}),
    ("webdataset files", {"0__json": "secret.txt"}),
    ("flickr8k", {"images_in_11__jpg": "0.jpg"}),
    ("cc3m", {"images_in_0__jpg": "0.jpg"}),
    ("vg", {"VG_100K_in_0__jpg": "0.jpg"}),
    ("sbu", {"images_in_0__jpg": "0.jpg"}),
    ("nlvr2", {"dev-1-0-img0__png": "0.jpg"}),
    ("snli_ve", {"images_in_11__jpg": "0.jpg"}),
    ("vqav2", {"images_in_COCO_000000000001__jpg": "0.jpg"}),
]


@pytest.mark.guard("maskvlm.data.safe_open:Inside.holds", gives="True")
@pytest.mark.parametrize(("toy", "links"), LINKED, ids=[f"{toy} {next(iter(links))}" for toy, links in LINKED])
def test_what_a_link_leads_to_outside_is_no_row(
    toy: str, links: dict[str, str], tmp_path: Path, outside: Path, build: Build
) -> None:
    raw = link(write(tmp_path / "raw", TOYS[toy][1]()), outside, **links)
    if links == {"images": "deep"}:
        (raw / "0.jpg").unlink()
    rows = [*open_raw(TOYS[toy][0], str(raw)).rows()]
    bad = [row.reason for row in rows if isinstance(row, BadRow)]
    assert {"link leads out", "missing image"} & {*bad}
    for row in rows:
        if isinstance(row, RawRow):
            assert "secret" not in " ".join(row.captions)
            assert isinstance(row.image, bytes) or str(outside) not in os.path.realpath(row.image)


@pytest.mark.guard("maskvlm.data.safe_open:Inside.holds", gives="True")
@pytest.mark.parametrize(
    ("toy", "name"),
    [
        ("csv", "pairs.csv"),
        ("flickr8k", "dataset_flickr8k.json"),
        ("vg", "image_data.json"),
        ("sbu", "sbu-captions-all.json"),
        ("cc3m", "Train_GCC-training.tsv"),
        ("vqav2", "v2_mscoco_val2014_annotations.json"),
        ("nlvr2", "dev.json"),
        ("hf", "train/data-00000-of-00001.arrow"),
    ],
)
def test_a_list_that_lies_outside_is_refused(toy: str, name: str, tmp_path: Path, build: Build) -> None:
    raw = write(tmp_path / "raw", TOYS[toy][1]())
    (raw / name).rename(tmp_path / "moved")
    (raw / name).symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="leads out of") as raised:
        [*open_raw(TOYS[toy][0], str(raw)).rows()]
    assert raised.value.code == ExitCode.REFUSED


@pytest.mark.guard("maskvlm.data.safe_open:Inside.holds", gives="True")
def test_tasks_and_prepared_sets_follow_no_link_outside(tmp_path: Path, build: Build) -> None:
    for toy, name, source in (
        ("nlvr2", "dev.json", lambda raw: Nlvr2(raw, cache=raw)),
        ("snli_ve", "snli_ve_dev.jsonl", lambda raw: SnliVe(raw, cache=raw)),
        ("vqav2", "v2_mscoco_val2014_annotations.json", lambda raw: VqaV2(raw, cache=raw)),
    ):
        raw = write(tmp_path / toy, TOYS[toy][1]())
        (raw / name).rename(tmp_path / f"moved {toy}")
        (raw / name).symlink_to(tmp_path / f"moved {toy}")
        with pytest.raises(UserError, match="leads out of") as raised:
            source(str(raw)).split("val")
        assert raised.value.code == ExitCode.REFUSED


def test_links_within_a_set_and_to_a_set_are_followed(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw", TOYS["folder"][1]())
    (raw / "0.jpg").rename(raw / "1.dat")
    (raw / "0.jpg").symlink_to("1.dat")
    (tmp_path / "name").symlink_to(raw)
    assert len([row for row in open_raw("folder", str(tmp_path / "name")).rows() if isinstance(row, RawRow)]) == 3


# ------------------------------------------------------------------ names


@pytest.mark.guard("maskvlm.data.prepared.manifest:check_set_path")
@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a\x00b", "y" * 256])
def test_names_that_nothing_can_have_are_one_line(name: str, tmp_path: Path, capsys: Captured, build: Build) -> None:
    raw = write(tmp_path / "raw", TOYS["csv"][1]())
    for option in ([], ["--look"]):
        words = ["data", "csv", str(raw), "--out", str(tmp_path / name), "--workers", "1", *option]
        assert main(words) == ExitCode.CANNOT_CREATE
        assert len(line(capsys)) < 1000
    assert main(["data", "csv", str(raw / name), "--out", str(tmp_path / "out")]) == ExitCode.MISSING_INPUT
    assert len(line(capsys)) < 1000


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[2J", "two  spaces", "-x"])
def test_a_set_is_called_by_a_plain_name(name: str, tmp_path: Path, capsys: Captured) -> None:
    raw = write(tmp_path / "raw", TOYS["csv"][1]())
    assert main(["data", "csv", str(raw), "--out", str(tmp_path / name)]) == ExitCode.CANNOT_CREATE
    assert "is not a plain name" in line(capsys)


def test_the_json_of_a_set_is_no_list_of_rows(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "captions_val2014.json"
    file.write_text('{"images": [], "annotations": []}')
    assert main(["data", "jsonl", str(file), "--out", str(tmp_path / "out")]) == ExitCode.BAD_DATA
    assert line(capsys).endswith("one to a line in a .jsonl; if it is a set's own file, name that set, such as coco.\n")


def test_a_name_that_is_no_text_is_one_line(tmp_path: Path, capsys: Captured) -> None:
    raw = write(tmp_path / "raw", TOYS["csv"][1]())
    assert main(["data", "csv", str(raw), "--out", str(tmp_path / "\udcff")]) == ExitCode.CANNOT_CREATE
    assert len(line(capsys)) < 1000


def test_an_output_that_is_a_file_or_behind_one_is_one_line(tmp_path: Path, capsys: Captured) -> None:
    raw = write(tmp_path / "raw", TOYS["csv"][1]())
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/set"):
        for option in ([], ["--look"]):
            words = ["data", "csv", str(raw), "--out", str(tmp_path / out), "--workers", "1", *option]
            assert main(words) == ExitCode.CANNOT_CREATE
            line(capsys)


def test_names_in_a_set_that_nothing_can_have_are_bad_rows(tmp_path: Path) -> None:
    names = ["x" * 300 + ".jpg", "a\\u0000b.jpg", "\\ud800.jpg", "../x.jpg", "/etc/passwd", "a\\nb.jpg", "./0.jpg"]
    rows = "".join(f'{{"image": "{name}", "caption": "a"}}\n' for name in names)
    raw = write(tmp_path, {"pairs.jsonl": rows.encode(), "0.jpg": IMAGES[0]})
    raw_rows = [*open_raw("jsonl", str(raw)).rows()]
    assert len([row for row in raw_rows if isinstance(row, BadRow)]) == 6
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(IMAGES[0])
    raw_rows = [*open_raw("folder", str(raw)).rows()]
    assert ("name is not text", ".jpg") in [
        (row.reason, row.origin[-4:]) for row in raw_rows if isinstance(row, BadRow)
    ]


def test_a_damaged_plan_of_an_unfinished_set_is_one_line(tmp_path: Path, capsys: Captured) -> None:
    raw = write(tmp_path / "raw", TOYS["csv"][1]())
    write(tmp_path / "out", {"train/data-00000.arrow": b"x", ".making/plan.json": b""})
    contents: list[bytes | None] = [b"{", b"[]", b"\xff", b"[" * 5000, b'{"set": 1, "set": 2}', None]
    for content in contents:
        if content is None:
            (tmp_path / "out/.making/plan.json").unlink()
            os.mkfifo(tmp_path / "out/.making/plan.json")
        else:
            (tmp_path / "out/.making/plan.json").write_bytes(content)
        assert main(["data", "csv", str(raw), "--out", str(tmp_path / "out"), "--workers", "1"]) != ExitCode.OUR_BUG
        line(capsys)


def test_a_document_is_not_read_from_what_has_no_end() -> None:
    for read in (lambda: load_json(b"", Path("x")), lambda: [*vocabulary.read_annotations(Path("/dev/zero"))]):
        with pytest.raises(UserError):
            read()


@pytest.mark.guard("maskvlm.data.raw.hub:check_card")
@pytest.mark.parametrize("named", ["http://127.0.0.1:9/x.parquet", "/etc/x.parquet", "../../x.parquet"])
def test_the_card_of_a_local_set_names_no_other_place(build: Build, tmp_path: Path, named: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    head = f'configs:\n- config_name: default\n  data_files: "{named}"\n'
    (folder / "README.md").write_text(f"---\n{head}---\n# A set\n")
    with pytest.raises(UserError, match="which is not in this folder") as caught:
        list(open_raw("hf", str(folder)).rows())
    assert caught.value.code == ExitCode.REFUSED
