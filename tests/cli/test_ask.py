"""The methods in the shell: what they print equals what the model answers, and every mistake is one line."""

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_pretrained import saved

from maskvlm.checkpoint import io as checkpoint
from maskvlm.cli.ask_model import answer_line, box_mask, lot_mask
from maskvlm.cli.main import main
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.utils.errors import ExitCode

TEXT = "a red circle on the left"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pre-training checkpoint, one of VQA, and two images."""
    folder = tmp_path_factory.mktemp("ask")
    saved(folder / "best.ckpt")
    saved(folder / "vqa.ckpt", "vqa")
    (folder / "text.png").write_text("a letter")
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> PretrainedMaskVLM:
    return PretrainedMaskVLM.from_pretrained(place / "best.ckpt")


def lines(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    """The lines of JSON that a method prints."""
    assert main([*map(str, words), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_words_and_numbers(place: Path, model: PretrainedMaskVLM, capsys: pytest.CaptureFixture[str]) -> None:
    source, one, two = ("--from", place / "best.ckpt"), place / "0.png", place / "1.png"
    (answer,) = lines(capsys, "fill", *source, one, "a [MASK] circle", "--top", 2)
    guesses: Any = model.fill_mask(one, "a [MASK] circle", 2)[0]
    asked = {"image": str(one), "text": "a [MASK] circle"}
    assert answer == {**asked, "words": {guess.word: guess.probability for guess in guesses}}
    matches = lines(capsys, "match", *source, one, TEXT, "two things")
    assert [line["match"] for line in matches] == model.match(one, [TEXT, "two things"])
    assert [(line["image"], line["text"]) for line in matches] == [(str(one), TEXT), (str(one), "two things")]
    scores = [line["score"] for line in lines(capsys, "score", *source, one, TEXT, "two things")]
    assert scores == pytest.approx([model.score(one, TEXT), model.score(one, "two things")], rel=1e-6)  # a batch of two
    assert [line["caption"] for line in lines(capsys, "caption", *source, one, two)] == model.caption([one, two])
    order: Any = model.rank(TEXT, [one, two], 1)
    ranked = lines(capsys, "rank", *source, TEXT, one, two, "--k", 1)
    assert [line["candidate"] for line in ranked] == [str((one, two)[each.place]) for each in order]
    assert [line["match"] is None for line in ranked] == [False, True]


def test_images_are_written(
    place: Path, model: PretrainedMaskVLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, one = ("--from", place / "best.ckpt"), place / "0.png"
    for method, function in (("reconstruct", model.reconstruct), ("inpaint", model.inpaint)):
        out = tmp_path / "new" / f"{method}.png"
        (answer,) = lines(capsys, method, *source, one, TEXT, "--box", "0,0,0.5,0.5", "--out", out)
        assert answer == {"image": str(one), "text": TEXT, "written": str(out), "masked": 4}
        wanted: Any = function(one, box_mask("0,0,0.5,0.5", (4, 4)), TEXT)
        assert np.array_equal(np.asarray(Image.open(out)), np.asarray(wanted))
    (answer,) = lines(capsys, "explain", *source, one, TEXT, "circle", "--out", tmp_path / "e.png")
    assert Image.open(tmp_path / "e.png").size == (50, 40)
    np.testing.assert_allclose(answer["attention"], model.explain(one, TEXT, "circle").attention, atol=1e-6)


def test_a_task_s_method(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (answer,) = lines(capsys, "answer", "--from", place / "vqa.ckpt", place / "0.png", "what colour")
    model = PretrainedMaskVLM.from_pretrained(place / "vqa.ckpt")
    asked = {"image": str(place / "0.png"), "text": "what colour", "unknown_words": ["what", "colour"]}
    assert answer == asked | model.answer(place / "0.png", "what colour")._asdict()


def test_which_patches_a_box_touches() -> None:
    assert box_mask("0,0,1,1", (2, 3)).all()
    assert box_mask("0.5,0,1,0.5", (2, 2)).tolist() == [[False, True], [False, False]]
    assert box_mask("0.4,0.4,0.6,0.6", (2, 2)).all()
    assert box_mask("0,0,0.34,0.1", (3, 3)).tolist() == [[True, True, False], [False] * 3, [False] * 3]
    assert lot_mask(0.5, 0, (3, 4)).sum() == 6
    assert (lot_mask(0.5, 0, (3, 4)) != lot_mask(0.5, 1, (3, 4))).any()


FILL, INPAINT = ["fill", "--from", "best.ckpt", "0.png"], ["inpaint", "--from", "best.ckpt", "0.png", "a"]


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        ([*FILL, "a", "[MASK]"], "3 inputs", ExitCode.USAGE),
        ([*FILL, "a dog"], "no word in it is masked", ExitCode.USAGE),
        (["fill", "--from", "best.ckpt", "no.png", "[MASK]"], "no.png: bad image, missing", ExitCode.MISSING_INPUT),
        (["fill", "--from", "no.ckpt", "0.png", "[MASK]"], "not there", ExitCode.MISSING_INPUT),
        (["rank", "--from", "best.ckpt", "0.png", "a", "--top", "3"], "--top: not an option of rank", ExitCode.USAGE),
        (["match", "--from", "best.ckpt", "a dog", "0.png"], "'a dog' is not a file, but 0.png", ExitCode.USAGE),
        (["match", "--from", "no.ckpt", "text.png", "a"], "text.png: bad image, not an image", ExitCode.BAD_DATA),
        (["match", "--from", "vqa.ckpt", "0.png", "a"], "no head for it", ExitCode.USAGE),
        (["answer", "--from", "best.ckpt", "0.png", "a"], "not a method of this checkpoint", ExitCode.USAGE),
        (["evaluate", "from=vqa.ckpt"], "was fine-tuned as Vqa", ExitCode.USAGE),
        ([*INPAINT, "--mask-ratio", "0.01"], "masks none of the 16 patches", ExitCode.USAGE),
        ([*INPAINT, "--box", "0,0,2,1"], "outside", ExitCode.USAGE),
        ([*INPAINT, "--out", "./0.png"], "would be overwritten", ExitCode.USAGE),
        (["explain", "--from", "best.ckpt", "0.png", "a dog", "cat"], "'cat' is not in the text", ExitCode.USAGE),
        (["caption", "--from", "no.ckpt", "-", "-"], "standard input gives one image", ExitCode.USAGE),
        (["convert", "best.ckpt", "0.png"], "already exists", ExitCode.CANNOT_CREATE),
    ],
)
def test_a_mistake_is_one_line(
    place: Path, words: list[str], message: str, code: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    assert main(words) == code
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error


def test_bad_images_among_several_are_told_and_the_others_answered(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    (tmp_path / "half.png").write_bytes(Path("0.png").read_bytes()[:1000])
    images = ["0.png", str(tmp_path / "half.png"), "no.png", "1.png"]
    assert main(["caption", "--from", "best.ckpt", "--json", *images]) == ExitCode.BAD_DATA  # of the first bad one
    output = capsys.readouterr()
    assert [json.loads(line)["image"] for line in output.out.splitlines()] == ["0.png", "1.png"]
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert [re.findall(r"bad image, (\w+)", line) for line in errors] == [["truncated"], ["missing"]]


def test_there_and_back(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint to a folder and to a checkpoint again: the same tensors, tokenizer, labels and history."""
    for name in ("best", "vqa"):
        folder, back = tmp_path / name, tmp_path / f"{name}.ckpt"
        assert main(["convert", str(place / f"{name}.ckpt"), str(folder)]) == 0
        assert main(["convert", str(folder), str(back)]) == 0
        ours, theirs = checkpoint.load(back), checkpoint.load(place / f"{name}.ckpt")
        assert ours["state_dict"].keys() == theirs["state_dict"].keys()
        assert all((ours["state_dict"][key] == value).all() for key, value in theirs["state_dict"].items())
        assert ours["tokenizer"] == theirs["tokenizer"]
        assert ours["lineage"][0]["ids"].tolist() == theirs["lineage"][0]["ids"].tolist()
        assert ours["global_step"] == theirs["global_step"] == 7


def test_an_answer_for_reading() -> None:
    """Of several figures each is named; texts of an index may be anybody's, and move no cursor."""
    ranked = {"rank": 1, "match": 0.9876, "similarity": None, "candidate": "a dog"}
    assert answer_line(ranked) == "rank 1  match 0.988  a dog"
    assert answer_line({"match": 0.00031, "text": "a dog"}) == "3.1e-04  a dog"
    assert answer_line({"origin": "x\x1b[31my", "rank": 1}) == "x\ufffd[31my  1"


# ---------------------------------------------------------------------- an image from standard input


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes, terminal: bool = False) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: terminal))


@pytest.mark.parametrize("words", ["match - TEXT", "rank TEXT TWO -"])
def test_an_image_can_be_piped(
    words: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is answered as its file is, and called by what was typed."""
    one = place / "0.png"
    spelt = {"TEXT": TEXT, "TWO": place / "1.png"}
    typed = [spelt.get(word, word) for word in words.split()]
    source = ("--from", place / "best.ckpt")
    pipe(monkeypatch, one.read_bytes())
    piped = lines(capsys, *typed, *source)
    named = lines(capsys, *(one if word == "-" else word for word in typed), *source)
    assert json.loads(json.dumps(named).replace(json.dumps(str(one)), '"-"')) == piped


@pytest.mark.parametrize(
    ("content", "terminal", "message", "code"),
    [
        (b"", False, "bad image, empty", ExitCode.BAD_DATA),
        (b"<html>", False, "bad image, not an image", ExitCode.BAD_DATA),
        (b"x" * 101, False, "bad image, too large", ExitCode.BAD_DATA),
        (b"", True, "standard input is a terminal", ExitCode.USAGE),
        (None, False, "standard input cannot be read", ExitCode.IO_ERROR),
    ],
)
def test_what_is_piped_and_no_image_is_one_line(
    content: bytes | None, terminal: bool, message: str, code: ExitCode,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("maskvlm.data.images.MAX_FILE_BYTES", 100)
    if content is None:
        monkeypatch.setattr("sys.stdin", None)
    else:
        pipe(monkeypatch, content, terminal)
    assert main(["match", "--from", "no.ckpt", "-", TEXT]) == code  # before the model is looked for
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
