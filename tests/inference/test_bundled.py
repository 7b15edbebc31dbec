"""The model that comes along: what it claims, that it is asked where none is named, what it says it does not know."""

import io
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import familiar
from maskvlm import MaskVLM
from maskvlm.cli.convert import convert
from maskvlm.cli.main import main
from maskvlm.config.bundled_models import DEFAULT, FOLDER, bundled_folder, bundled_models
from maskvlm.data.scenes.source import Scenes
from maskvlm.demo.samples import PHOTOS
from maskvlm.inference import infill
from maskvlm.inference.pretrained import PretrainedMaskVLM, TruncatedText, UnknownWords, UnusedMask
from maskvlm.inference.saliency import word_places
from maskvlm.objectives.novelty import FarFromTraining
from maskvlm.utils.errors import UserError

MOST_BYTES = 4_000_000


@pytest.fixture(scope="module")
def model() -> PretrainedMaskVLM:
    return MaskVLM.from_pretrained()


@pytest.mark.parametrize("name", bundled_models())
def test_a_model_that_comes_along_is_small_and_says_how_it_was_made(name: str) -> None:
    files = [*(FOLDER / name).iterdir()]
    assert sum(file.stat().st_size for file in files) < MOST_BYTES
    assert not [file for file in files if file.suffix in (".ckpt", ".bin", ".pt")]  # no pickle
    card = (FOLDER / name / "README.md").read_text()
    assert "- made by: `maskvlm pretrain" in card
    assert "commit " in card


def test_it_is_as_good_as_its_card_says(tmp_path: Path) -> None:
    """Every figure, over the whole validation split. Of a query the eight best are matched here, in the run 128."""
    card_metrics = json.loads((FOLDER / DEFAULT / "config.json").read_text())["evaluation"]["metrics"]
    folder = tmp_path / "measured"
    words = ["evaluate", f"from={DEFAULT}", "where=cpu", "--folder", str(folder), "--model.task.rerank_k", "8"]
    assert main(words) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    measured = {name for name, value in card_metrics.items() if isinstance(value, int | float)} - {"step"}
    assert len(measured) > 40
    # Its weights are in half precision: some near ties turn.
    near = {name: pytest.approx(card_metrics[name], rel=0.005, abs=1e-3) for name in measured}
    assert {name: metrics[name] for name in measured} == near


def test_its_card_shows_a_question_that_it_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    convert([DEFAULT, "again"])
    cards = [folder.joinpath("README.md").read_text() for folder in (FOLDER / DEFAULT, Path("again"))]
    (code,), written = (re.findall(r"```python\n(.*?)```", card, re.DOTALL) for card in cards)
    assert written == [code]  # and no other is written today
    assert main(["scene", "6"]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(code, {})


def test_it_is_asked_where_no_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT).mkdir()  # a folder of that name is ./scenes-tiny
    assert main(["scene", "6"]) == 0
    captions = capsys.readouterr().out.splitlines()
    text = "the background is white with a pink heart at the bottom and a blue star at the top"
    assert text in captions
    assert main(["fill", "scene.png", text.replace("blue", "[MASK]")]) == 0
    answer = capsys.readouterr()
    assert answer.out.startswith("blue ")
    assert answer.err == (
        "no checkpoint named: the bundled model scenes-tiny is used; it was trained on drawn scenes only\n"
    )  # and no warning: such scenes are what it knows
    assert main(["match", "scene.png", text, text.replace("at the top", "in the middle")]) == 0
    right, wrong = (float(line.split()[0]) for line in capsys.readouterr().out.splitlines())
    assert right > 0.9
    assert wrong < 0.1


def test_training_and_search_start_from_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from maskvlm.config.compose import embed_command, evaluate_command, finetune_command, index_command, read_words

    words = read_words("finetune", ["vqa", "run=a"], ("run", "from"), 1)
    for command in (finetune_command, evaluate_command, index_command, embed_command):
        full = command(words)
        assert full[full.index("--from") + 1] == DEFAULT
        assert capsys.readouterr().err.startswith("no checkpoint named: the bundled model scenes-tiny is ")
        monkeypatch.setenv("RANK", "1")  # one process of several tells
        command(words)
        assert capsys.readouterr().err == ""
        monkeypatch.delenv("RANK")


@pytest.mark.parametrize("number", [-1, 500])
def test_a_scene_that_is_not_there(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scene", "--", str(number)]) == 2
    assert "Give a number from 0 to 499" in capsys.readouterr().err


def test_a_scene_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    for name, code in {"scene.nothing": 2, "scene.psd": 2, "folder.png": 73, "file/scene.png": 73}.items():
        assert main(["scene", "--out", str(tmp_path / name)]) == code
        error = capsys.readouterr().err
        assert f"{tmp_path / name}: cannot be written (" in error
        assert error.count("\n") == 1
    assert main(["scene", "--out", str(tmp_path / "new" / "scene.png")]) == 0


def test_a_wrong_name_lists_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "first").mkdir(parents=True)
    (tmp_path / "checkpoints" / "first" / "best.ckpt").touch()
    assert main(["scene"]) == 0
    assert main(["caption", "--from", "checkpoints/RUN/best.ckpt", "scene.png"]) == 66
    assert "there are: checkpoints/first/best.ckpt, scenes-tiny" in capsys.readouterr().err
    assert bundled_folder("scenes-large") is None


def test_photographs_are_strange_to_it_and_scenes_are_not(model: PretrainedMaskVLM) -> None:
    """A few of each; `bench/familiar.py` asks about 1,000 photographs and 500 scenes."""
    photos = sorted(PHOTOS.glob("*.jpg"))
    assert all(model.far(photos))
    test = Scenes().split("test")
    assert sum(line is not None for line in model.far([test[row]["image"] for row in range(60)])) <= 3


def test_the_bench_holds_images_against_the_checkpoint_s_own_range(
    model: PretrainedMaskVLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["familiar.py", DEFAULT, "--asked", "photos", "unseen-scenes", "--most", "60"])
    familiar.main()
    lines = capsys.readouterr().out.splitlines()
    assert model.known is not None
    assert lines[1] == f"the checkpoint's own range: far is beyond {model.known.most:.3f}"
    assert lines[2].split()[:2] == ["photos", "100.0"]
    test = Scenes().split("test")
    far = sum(line is not None for line in model.far([test[row]["image"] for row in range(60)]))
    assert lines[3].split()[:2] == ["unseen-scenes", f"{100 * far / 60:.1f}"]


def test_words_that_it_does_not_know_are_named_once() -> None:
    model = MaskVLM.from_pretrained()
    image = Scenes().split("val")[3]["image"]
    with pytest.warns(UnknownWords, match="does not know: giraffe, '&', Zebra, '!'; take"):
        model.match(image, "a giraffe & a Zebra on the left!")
    with pytest.warns(UnknownWords, match="does not know: horse;"):
        model.fill_mask(image, "a [MASK] horse and a giraffe")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownWords)
        model.score(image, "a giraffe, a blue star and a red square")
    assert [*model.warned_words] == ["giraffe", "&", "Zebra", "!", "horse"]
    # A full stop lowers a score by more than a wrong colour does.
    with pytest.warns(UnknownWords, match=r"does not know: '\.'; take"):
        model.score(image, "a blue star.")


def test_words_beyond_what_is_read_are_not_named() -> None:
    model = MaskVLM.from_pretrained()
    words = model.words
    room = words.text_length - 2
    assert model.unknown_words(["red " * (room - 1) + "zebra horse"]) == ["zebra"]
    masked = "[MASK] " * (room - len(words.captioner.inner("zebra")))
    assert model.unknown_words([f"{masked}zebra horse"]) == ["zebra"]
    assert words.masked(f"{masked}zebra horse").tolist() == words.masked(f"{masked}zebra").tolist()
    assert model.unknown_words([f"horse {masked}zebra", "[MASK]", ""]) == ["horse"]


def test_a_single_text_is_looked_at_as_a_whole(model: PretrainedMaskVLM) -> None:
    """Not letter by letter."""
    text = "a zebra eats a [MASK]" + " red" * 30
    assert model.unknown_words(text) == model.unknown_words([text]) == ["zebra", "eats"]
    for lines in (model.truncated, model.unused_masks):
        assert lines(text) == lines([text])
        assert len(lines(text)) == 1
    assert model.unknown_words([7, None, "zebra"]) == ["zebra"]  # no texts: reported when encoded


def test_a_text_longer_than_is_read_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MaskVLM.from_pretrained()
    image, room = Scenes().split("val")[3]["image"], model.words.text_length - 2
    long = "red " * (room + 1)
    line = f"text '{long[:50]}"
    with pytest.warns(TruncatedText, match=f"only the first {room} of its {room + 1} tokens are read") as told:
        model.score(image, [long, "a red square"])
    assert str(told[0].message).startswith(line)
    assert model.words.count("red " * 500) == 502
    with warnings.catch_warnings():
        warnings.simplefilter("error", TruncatedText)
        model.match(image, long)
        model.match(image, "red " * room)
        model.fill_mask(image, "[MASK] " * room)  # each is one token
        model.score(image, "a" * 20)  # spelt in letters
    assert len(model.truncated_warnings) == 1
    assert len(model.truncated(["[MASK] " * (room + 1), "ü", "", 7])) == 1
    (very_long,) = model.truncated("red " * 3000)  # cleaning leaves 4,096 bytes of it
    assert f"only the first {room} of more than 1,024 tokens are read" in very_long
    image.save(tmp_path / "scene.png")
    assert main(["score", "--from", DEFAULT, str(tmp_path / "scene.png"), long, "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["truncated"] == [*model.truncated_warnings]
    assert f"warning: {model.truncated_warnings[0]}" in output.err.splitlines()


def test_a_mask_where_none_is_filled_in_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MaskVLM.from_pretrained()
    image, text = Scenes().split("val")[3]["image"], "a [MASK] star and a red square"
    line = f"text '{text}': [MASK] is read as plain text; only fill_mask (maskvlm fill) fills it in"
    with pytest.warns(UnusedMask, match=re.escape(line)) as told:
        model.score(image, text)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedMask)
        model.match(image, text)
        model.fill_mask(image, ["the [MASK] star", "a star at the [MASK]"])
    assert [*model.mask_warnings] == [line]
    methods = (
        lambda text: model.match(image, text),
        lambda text: model.rank(image, [text]),
        lambda text: model.explain(image, text, "star"),
        lambda text: model.reconstruct(image, np.eye(3, dtype=bool), text),
        model.encode_text,
        model.tokens,
    )
    for number, method in enumerate(methods):
        with pytest.warns(UnusedMask, match=f"'{number} "):
            method(f"{number} [MASK] star")
    image.save(tmp_path / "scene.png")
    for method, masks in (("match", [line]), ("fill", [])):
        assert main([method, "--from", DEFAULT, str(tmp_path / "scene.png"), text, "--json"]) == 0
        output = capsys.readouterr()
        assert json.loads(output.out).get("unused_masks", []) == masks
        assert [row for row in output.err.splitlines() if "[MASK]" in row] == [f"warning: {each}" for each in masks]


def test_the_shell_tells_what_is_strange_after_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = str(PHOTOS / "coffee.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FarFromTraining)  # a line, not Python's warning
        assert main(["match", "--from", DEFAULT, photo, "a horse"]) == 0
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith(f"warning: {photo}: this image is unlike those that the model was trained on: ")
    assert main(["match", "--from", DEFAULT, photo, "a horse", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["far"] == [first.removeprefix("warning: ")]
    assert answer["unknown_words"] == ["horse"]
    assert main(["scene", "3", "--out", str(tmp_path / "scene.png")]) == 0
    capsys.readouterr()
    assert main(["match", "--from", DEFAULT, str(tmp_path / "scene.png"), "a red square", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"image", "match", "text"}
    assert second == "warning: words that the model's tokenizer does not know: horse; take the answers with care"
    assert third.startswith(f"{DEFAULT}: It knows drawn scenes alone (at most ")


def test_a_folder_of_half_precision_is_half_as_large_and_loads(tmp_path: Path, model: PretrainedMaskVLM) -> None:
    output = convert([DEFAULT, str(tmp_path / "whole")])
    assert str(tmp_path / "whole") in output
    convert([DEFAULT, str(tmp_path / "half"), "--dtype", "bfloat16"])
    whole, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half"))
    assert half < 0.52 * whole
    loaded = MaskVLM.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.float32
    scene = Scenes().split("val")[0]["image"]
    torch.testing.assert_close(loaded.encode_image([scene]), model.encode_image([scene]), atol=0.02, rtol=0)


# ---------------------------------------------------------------------- what an answer does not depend on


def test_a_part_of_a_word_is_not_the_word(model: PretrainedMaskVLM) -> None:
    token_T, at_K = word_places(model, "two circles and a circle", "circle")
    assert at_K.tolist() == [len(token_T) - 2]  # before the end token
    with pytest.raises(UserError, match="'circle' is not in the text 'two circles'"):
        word_places(model, "two circles", "circle")


def test_an_image_is_painted_as_it_is_alone(model: PretrainedMaskVLM) -> None:
    rows = Scenes().split("val")
    images, texts = [rows[n]["image"] for n in range(3)], [str(rows[n]["captions"][0]) for n in range(3)]
    mask = np.ones(model.grid, bool)
    together = model.inpaint(images, mask, texts, steps=3)
    for image, text, painted in zip(images, texts, together, strict=True):  # type: ignore[arg-type]
        alone = np.asarray(model.inpaint(image, mask, text, steps=3), int)
        assert np.abs(alone - np.asarray(painted, int)).max() <= 2  # rounding


def test_an_open_file_is_read_once_for_all_that_is_asked(model: PretrainedMaskVLM) -> None:
    buffer = io.BytesIO()
    Scenes().split("val")[3]["image"].save(buffer, "PNG")
    buffer.seek(0)
    assert len(model.explain(buffer, "a blue star", ["blue", "star"])) == 2  # type: ignore[arg-type]


def test_where_no_word_is_found_the_caption_is_empty(model: PretrainedMaskVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Scenes().split("val")[3]["image"]
    empty = infill.Written("", -1.0)
    monkeypatch.setattr(infill, "write_captions", lambda *_: [[empty, empty]])
    assert model.caption(image) == ""
    some = infill.Written("blue star", -3.0)
    monkeypatch.setattr(infill, "write_captions", lambda *_: [[empty], [empty, some]])
    assert model.caption([image, image]) == ["", "blue star"]


def test_python_says_once_what_a_model_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("maskvlm.inference.pretrained.DESCRIBED_MODELS", set())
    monkeypatch.chdir(tmp_path)
    assert main(["scene", "6"]) == 0
    assert main(["caption", "scene.png"]) == 0  # a command says it by itself
    assert caplog.messages == []
    monkeypatch.setattr("maskvlm.inference.pretrained.DESCRIBED_MODELS", set())
    for _ in range(2):
        model = MaskVLM.from_pretrained()
    assert caplog.messages == [f"scenes-tiny: {model.knows}"]
    assert "It knows drawn scenes alone" in model.knows
