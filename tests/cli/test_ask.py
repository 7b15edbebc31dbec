"""The methods in the shell: what they print equals what the model answers, and every mistake is one line."""

import argparse
import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_pretrained import saved

from maskvlm.checkpoint import io as checkpoint
from maskvlm.cli.ask_model import ASKS, answer_line, ask_fill, box_mask, inputs_of, lot_mask, warn_afterwards
from maskvlm.cli.commands import ASK, REGISTRY
from maskvlm.cli.convert import convert
from maskvlm.cli.main import main
from maskvlm.cli.shell_methods import METHODS
from maskvlm.inference.infill import Guess
from maskvlm.inference.pretrained import PretrainedMaskVLM, unknown_line
from maskvlm.utils.errors import ExitCode, UserError

TEXT = "a red circle on the left"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pre-training checkpoint, one of VQA, and two images."""
    folder = tmp_path_factory.mktemp("ask")
    saved(folder / "best.ckpt")
    saved(folder / "vqa.ckpt", "vqa")
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


def test_without_json_answers_are_for_reading(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["match", "--from", str(place / "best.ckpt"), str(place / "0.png"), TEXT]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"  {TEXT}\n")
    assert 0 <= float(out.split()[0]) <= 1


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
    assert main(["explain", *map(str, source), str(one), TEXT, "circle", "--out", str(tmp_path / "f.png")]) == 0
    assert "'circle' is seen most strongly in row" in capsys.readouterr().out


def test_a_name_that_is_no_utf8_is_escaped(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = os.fsdecode(os.fsencode(place) + b"/\xff \xc3\xa4.png")  # half of a letter, and a whole one
    shutil.copy(place / "0.png", named)
    assert main(["caption", "--from", str(place / "best.ckpt"), named, "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["image"] == named
    assert "\\udcff \u00e4.png" in out


def test_a_task_s_method(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (answer,) = lines(capsys, "answer", "--from", place / "vqa.ckpt", place / "0.png", "what colour")
    model = PretrainedMaskVLM.from_pretrained(place / "vqa.ckpt")
    asked = {"image": str(place / "0.png"), "text": "what colour"}
    assert answer == {
        **asked,
        **model.answer(place / "0.png", "what colour")._asdict(),
        "unknown_words": ["what", "colour"],
    }


def test_several_inputs_of_one_answer_are_named() -> None:
    assert inputs_of(["a.png", "b.png"], ["same?"]) == {"images": ["a.png", "b.png"], "text": "same?"}
    assert inputs_of(["a.png"], []) == {"image": "a.png"}


def test_which_patches_a_box_touches() -> None:
    assert box_mask("0,0,1,1", (2, 3)).all()
    assert box_mask("0.5,0,1,0.5", (2, 2)).tolist() == [[False, True], [False, False]]
    assert box_mask("0.4,0.4,0.6,0.6", (2, 2)).all()
    assert box_mask("0,0,0.34,0.1", (3, 3)).tolist() == [[True, True, False], [False] * 3, [False] * 3]
    assert lot_mask(0.5, 0, (3, 4)).sum() == 6
    assert (lot_mask(0.5, 0, (3, 4)) != lot_mask(0.5, 1, (3, 4))).any()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.png", b"a letter", "text.png: bad image, not an image"),
        ("empty.jpg", b"", "empty.jpg: bad image, empty"),
        ("folder", None, "folder: bad image, a folder"),
    ],
)
def test_a_bad_image_is_told_before_a_model_is_loaded(
    place: Path, tmp_path: Path, name: str, content: bytes | None, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if content is None:
        Path(name).mkdir()
    else:
        Path(name).write_bytes(content)
    for words in (["caption", name], ["match", name, "a dog"]):
        assert main([*words, "--from", "no.ckpt"]) in (ExitCode.BAD_DATA, ExitCode.MISSING_INPUT)
        error = capsys.readouterr().err
        assert message in error
        assert "no.ckpt" not in error


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["fill", "--from", "best.ckpt", "0.png"], "1 input. Give IMAGE", ExitCode.USAGE),
        (
            ["fill", "--from", "best.ckpt", "0.png", "a", "[MASK]"],
            '3 inputs. Give IMAGE "a [MASK] on the [MASK]", a text of several words in quotes (maskvlm fill',
            ExitCode.USAGE,
        ),
        (
            ["rank", "--from", "best.ckpt", "0.png", "a", "--top", "3"],
            "--top: not an option of rank, only of fill",
            ExitCode.USAGE,
        ),
        (
            ["answer", "--from", "vqa.ckpt", "0.png", "a", "--hide=1"],
            "not an option of answer, only of reconstruct, inpaint",
            ExitCode.USAGE,
        ),
        (["rank", "--from", "best.ckpt", "0.png", "a", "--k", "-1"], "--k: -1 is too few", ExitCode.USAGE),
        (
            ["match", "--from", "best.ckpt", "a dog " * 80, "0.png"],
            "is not a file, but 0.png after it is one",
            ExitCode.USAGE,
        ),
        (["fill", "--from", "best.ckpt", "0.png", "--", "--out"], "no word in it is masked", ExitCode.USAGE),
        (["caption", "--from", "best.ckpt", "no.png"], "no.png: bad image, missing", ExitCode.MISSING_INPUT),
        (
            ["inpaint", "--from", "best.ckpt", "0.png", "a", "--out", "x"],
            "x: cannot be written (it has no extension)",
            ExitCode.USAGE,
        ),
        (["fill", "--from", "best.ckpt", "no.png", "[MASK]"], "no.png: bad image, missing", ExitCode.MISSING_INPUT),
        (["fill", "--from", "no.ckpt", "0.png", "[MASK]"], "not there", ExitCode.MISSING_INPUT),
        (["fill", "--form", "best.ckpt", "0.png"], "--form", ExitCode.USAGE),
        (["match", "--from", "best.ckpt", "a dog", "0.png"], "match: 'a dog' is not a file, but 0.png", ExitCode.USAGE),
        (["answer", "--from", "best.ckpt", "0.png", "a"], "not a method of this checkpoint", ExitCode.USAGE),
        (["match", "--from", "vqa.ckpt", "0.png", "a"], "no head for it", ExitCode.USAGE),
        (["answer", "--from", "vqa.ckpt", "0.png"], "Give 1 image and a question", ExitCode.USAGE),
        (
            ["reconstruct", "--from", "best.ckpt", "0.png", "a", "--mask-ratio", "7"],
            "7.0 is out of range",
            ExitCode.USAGE,
        ),
        (
            ["inpaint", "--from", "best.ckpt", "0.png", "a", "--mask-ratio", "0.01"],
            "--mask-ratio: 0.01 masks none of the 16 patches",
            ExitCode.USAGE,
        ),
        (["reconstruct", "--from", "best.ckpt", "0.png", "a", "--box", "1,2"], "'1,2' is not a box", ExitCode.USAGE),
        (["inpaint", "--from", "best.ckpt", "0.png", "a", "--box", "0,0,2,1"], "outside", ExitCode.USAGE),
        (
            ["inpaint", "--from", "best.ckpt", "0.png", "a", "--box", "0,0,1,1", "--seed", "5"],
            "--seed: has no effect with --box",
            ExitCode.USAGE,
        ),
        (
            ["explain", "--from", "best.ckpt", "0.png", TEXT, "red", "--out", "x.psd"],
            "cannot be written",
            ExitCode.USAGE,
        ),
        (["inpaint", "--from", "best.ckpt", "0.png", "a", "--out", "x.nope"], "cannot be written", ExitCode.USAGE),
        (
            ["inpaint", "--from", "best.ckpt", "0.png", "a", "--out", "0.png"],
            "0.png: is the input image",
            ExitCode.USAGE,
        ),
        (
            ["explain", "--from", "best.ckpt", "0.png", TEXT, "circle", "--out", "./0.png"],
            "would be overwritten",
            ExitCode.USAGE,
        ),
        (["explain", "--from", "best.ckpt", "0.png", "a dog", "cat"], "'cat' is not in the text", ExitCode.USAGE),
        (["fill", "--from", "", "0.png", "[MASK]"], "--from: its value is empty", ExitCode.USAGE),
        (["answer", "--from=", "0.png", "a"], "--from: its value is empty", ExitCode.USAGE),
        (["caption", "--from", "best.ckpt", "0.png", ""], "caption: the name of image 2 is empty", ExitCode.USAGE),
        (["match", "--from", "best.ckpt", "0.png", "a", " "], "text 2: it has no words", ExitCode.USAGE),
        (["reconstruct", "--from", "best.ckpt", "0.png", ""], "text: it has no words", ExitCode.USAGE),
        (["explain", "--from", "best.ckpt", "0.png", "a", "\x00"], "word: it has no words", ExitCode.USAGE),
        (["fill", "--from", "best.ckpt", "0.png", "a dog"], "text 'a dog': no word in it is masked", ExitCode.USAGE),
        (["fot", "--from", "best.ckpt"], "did you mean fit?", ExitCode.USAGE),
        (["convert", "best.ckpt"], "required: target. See maskvlm convert --help", ExitCode.USAGE),
        (["convert", "best.ckpt", "0.png"], "already exists", ExitCode.CANNOT_CREATE),
    ],
)
def test_a_mistake_is_one_line(
    place: Path, words: list[str], message: str, code: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    assert main(words) == code
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("method", ["caption", "rank"])
def test_bad_images_among_several_are_told_and_the_others_answered(
    method: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("0.png", "1.png"):
        shutil.copy(place / name, name)
    Path("half.png").write_bytes(Path("0.png").read_bytes()[:1000])
    words = [method, "--from", str(place / "best.ckpt"), "--json", *([TEXT] if method == "rank" else [])]
    assert main([*words, "0.png", "half.png", "no.png", "1.png"]) == ExitCode.BAD_DATA  # of the first bad one
    output = capsys.readouterr()
    assert sorted(json.loads(line)["image"] for line in output.out.splitlines()) == ["0.png", "1.png"]
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert [line.partition(":")[2].partition(" (")[0] for line in errors] == [
        " half.png: bad image, truncated",
        " no.png: bad image, missing",
    ]
    assert main([*words, "half.png", "half.png"]) == ExitCode.BAD_DATA
    assert capsys.readouterr().out == ""


def test_warnings_of_many_texts_are_one_line_of_each_kind(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = PretrainedMaskVLM.from_pretrained(place / "best.ckpt")
    with warn_afterwards(model):
        for number in range(15):
            model.encode_text([f"xyzzy{number} " * 60, f"a [MASK] circle, the {number}"])
    words, long, masked = capsys.readouterr().err.splitlines()
    assert "xyzzy0, " in words
    assert long.startswith(f"warning: {model.truncated_warnings[0]}; the same for 14 other texts")
    assert masked == f"warning: {model.mask_warnings[0]}; the same for 14 other texts"
    assert unknown_line([*"abcdefghijklmnopqrstuvw"]).endswith("s, t and 3 more; take the answers with care")


def test_the_earlier_name_of_an_option_works_and_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    words = ["reconstruct", "--from", "best.ckpt", "0.png", "a dog", "--out", "out.png", "--json"]
    hidden = []
    for option in ("--hide", "--mask-ratio"):
        assert main([*words, option, "0.25"]) == 0
        captured = capsys.readouterr()
        hidden.append(json.loads(captured.out)["masked"])
        assert ("--hide is called --mask-ratio now" in captured.err) == (option == "--hide")
    assert hidden[0] == hidden[1]


def test_a_fine_tuned_checkpoint_is_measured_by_its_task(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert main(["evaluate", "from=vqa.ckpt"]) == ExitCode.USAGE
    stderr = capsys.readouterr().err
    assert stderr == "error: vqa.ckpt: was fine-tuned as Vqa. Name its task: evaluate vqa.\n"


def test_help_of_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fill", "--help"]) == 0
    assert "maskvlm fill [--from CHECKPOINT] IMAGE" in capsys.readouterr().out


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
        assert ours.get("labels") == theirs.get("labels")
        assert ours["lineage"][0]["ids"].tolist() == theirs["lineage"][0]["ids"].tolist()
        assert ours["global_step"] == theirs["global_step"] == 7
        first = PretrainedMaskVLM.from_pretrained(back).state_dict()
        assert first.keys() == PretrainedMaskVLM.from_pretrained(folder).state_dict().keys()
    assert "from=" in capsys.readouterr().out
    with pytest.raises(UserError, match="already exists"):
        convert([str(place / "best.ckpt"), str(tmp_path / "best")])


def test_the_front_door_knows_the_methods_that_there_are() -> None:
    """The registry keeps their names, so that none of the core is imported to know a command."""
    assert [command.name for command in REGISTRY if command.group == ASK and command.named] == [*METHODS] == [*ASKS]


def test_what_a_named_model_knows_is_told_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, image = str(place / "best.ckpt"), str(place / "0.png")
    assert main(["match", "--from", source, image, TEXT, "a blue star"]) == 0
    messages = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert messages == [f"{source}: {PretrainedMaskVLM.from_pretrained(source).knows}"]


def test_what_moves_the_cursor_is_not_printed() -> None:
    """Texts of an index may be anybody's."""
    assert answer_line({"origin": "x\x1b[31my", "rank": 1}) == "x\ufffd[31my  1"
    assert answer_line({"words": {"\x1b[31mred": 0.5}}) == "\ufffd[31mred 0.500"


def test_a_text_behind_the_dashes_is_a_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, image = str(place / "best.ckpt"), str(place / "0.png")
    assert main(["match", "--from", source, image, "--", "from=left to right", TEXT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[2] for line in lines] == ["from=left to right", TEXT]


def test_of_tokens_that_read_alike_the_likeliest_counts() -> None:
    guesses = [Guess("dog", 0.6), Guess("cat", 0.2), Guess("dog", 0.1)]
    model: Any = SimpleNamespace(fill_mask=lambda *_: [guesses])
    (asked,) = ask_fill(model, ["x.png", "a [MASK]"], argparse.Namespace(top=3))
    assert asked == ({"words": {"dog": 0.6, "cat": 0.2}}, ["x.png"], ["a [MASK]"])


def test_of_several_figures_each_is_named() -> None:
    ranked = {"rank": 1, "match": 0.9876, "similarity": None, "candidate": "a dog"}
    assert answer_line(ranked) == "rank 1  match 0.988  a dog"
    assert answer_line({"match": 0.5, "text": "a dog"}) == "0.500  a dog"
    assert answer_line({"words": {"red": 0.00031}}) == "red 0.000"
    assert [answer_line({"match": x}) for x in (0.0, 0.00031, 0.0005, 0.9999)] == ["0.000", "3.1e-04", "0.001", "1.000"]


# ---------------------------------------------------------------------- an image from standard input


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes, terminal: bool = False) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: terminal))


@pytest.mark.parametrize("words", ["match - TEXT", "caption - TWO", "caption -", "rank TEXT TWO -", "rank - TEXT"])
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


def test_a_fine_tuned_model_is_asked_about_a_piped_image(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, (place / "0.png").read_bytes())
    (answer,) = lines(capsys, "answer", "--from", place / "vqa.ckpt", "-", "what colour")
    pipe(monkeypatch, (place / "0.png").read_bytes())
    (named,) = lines(capsys, "answer", "--from", place / "vqa.ckpt", place / "0.png", "what colour")
    assert answer == {**named, "image": "-"}


@pytest.mark.parametrize(
    ("content", "terminal", "words", "message", "code"),
    [
        (b"", False, ["-", TEXT], "standard input: bad image, empty (0 bytes).", ExitCode.BAD_DATA),
        (b"<html>", False, ["-", TEXT], "standard input: bad image, not an image (text/html).", ExitCode.BAD_DATA),
        (b"x" * 101, False, ["-", TEXT], "standard input: bad image, too large (more than 100 ", ExitCode.BAD_DATA),
        (b"", True, ["-", TEXT], "-: standard input is a terminal and gives no image. Pipe one", ExitCode.USAGE),
    ],
)  # fmt: skip
def test_what_is_piped_and_no_image_is_one_line(
    content: bytes, terminal: bool, words: list[str], message: str, code: ExitCode,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("maskvlm.data.images.MAX_FILE_BYTES", 100)
    pipe(monkeypatch, content, terminal)
    assert main(["match", "--from", "no.ckpt", *words]) == code  # before the model is looked for
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.parametrize("closed", [True, False])
def test_standard_input_that_cannot_be_read_is_one_line(
    closed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Closed before the command began, or opened to be written."""
    written = SimpleNamespace(isatty=lambda: False, buffer=SimpleNamespace(read=unreadable))
    monkeypatch.setattr("sys.stdin", None if closed else written)
    assert main(["caption", "--from", "no.ckpt", "-"]) == ExitCode.IO_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: -: standard input cannot be read (")


def unreadable(_: int) -> bytes:
    raise OSError(9, "Bad file descriptor")


@pytest.mark.parametrize("words", [["match", "0.png", "-"], ["rank", "0.png", "a star", "-"], ["score", "0.png", "-"]])
def test_a_text_that_is_a_dash_stays_a_text(
    words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", None)
    assert "-" in [answer["text"] for answer in lines(capsys, *words, "--from", "best.ckpt")]


def test_the_warning_of_a_piped_image_names_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, (place / "0.png").read_bytes())
    assert main(["caption", "-", str(place / "1.png")]) == 0  # the bundled model, of drawn scenes
    warned = [line for line in capsys.readouterr().err.splitlines() if "unlike" in line]
    assert [line.split(": this image")[0] for line in warned] == ["warning: -", f"warning: {place / '1.png'}"]


def test_an_image_after_the_text_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["match", "a star", "-"]) == ExitCode.USAGE
    assert "'a star' is not a file, but - after it is an image" in capsys.readouterr().err


def test_standard_input_gives_one_image(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", "--from", "no.ckpt", "-", "-"]) == ExitCode.USAGE
    assert capsys.readouterr().err == "error: -: standard input gives one image. Name the others.\n"
