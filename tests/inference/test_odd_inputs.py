"""What people hand to the methods by mistake, and what they hand to them that is unusual but means something."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_pretrained import saved
from toys import SIZE
from transformers import AutoProcessor

from maskvlm.data.inputs import MarkedTexts
from maskvlm.data.text import train_tokenizer
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.utils.errors import ExitCode, UserError

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
TEXT = "a red circle on the left"
MASK = np.eye(4, dtype=bool)


class Column:
    """Like a pandas Series: values one after another that are compared one by one, and no list."""

    ndim = 1

    def __init__(self, *values: object) -> None:
        self.values = values

    def __iter__(self) -> Iterator[object]:
        return iter(self.values)

    def __eq__(self, other: object) -> Any:
        return np.array([value == other for value in self.values])

    __hash__ = None  # type: ignore[assignment]


def closed() -> io.BytesIO:
    file = io.BytesIO(b"x")
    file.close()
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    saved(folder / "best.ckpt")
    PretrainedMaskVLM.from_pretrained(folder / "best.ckpt").save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> PretrainedMaskVLM:
    return PretrainedMaskVLM.from_pretrained(place / "best.ckpt")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m: m.rank(IMAGE, ["a"], k=None), "rank: k is None. Give a whole number, 0 or more"),
        (lambda m: m.rank(IMAGE, ["a"], k="3"), "rank: k is '3'"),
        (lambda m: m.rank(IMAGE, ["a"], k=1.5), "rank: k is 1.5"),
        (lambda m: m.fill_mask(IMAGE, "[MASK]", True), "fill_mask: top_k is True"),
        (lambda m: m.inpaint(IMAGE, MASK, "a", steps=1.5), "inpaint: steps is 1.5"),
        (lambda m: m.caption(IMAGE, lengths=None), "caption: a length is None"),
        (lambda m: m.caption(IMAGE, lengths="a"), "caption: a length is 'a'"),
        (lambda m: m.caption(IMAGE, lengths=[2.5]), "caption: a length is 2.5"),
        (lambda m: m.rank(IMAGE, "a blue star"), "rank: str as candidates"),
        (lambda m: m.rank(IMAGE, None), "rank: NoneType as candidates"),
        (lambda m: m.rank("missing.png", ["a"]), "missing.png: no such file"),
        (lambda m: m.explain(IMAGE, TEXT, None), "text: NoneType is not text"),
        (lambda m: m.explain(IMAGE, "red " * 30 + "star", "star"), "of which 22 tokens are read"),
        (lambda m: m.score(IMAGE, "\ud800"), "holds nothing that the tokenizer knows"),
        (lambda m: m.match(None, "a"), "image 1: NoneType is not an image"),
        (lambda m: m.caption(io.StringIO("a")), "image 1: a file opened in text mode. Open it with 'rb'"),
        (lambda m: m.caption(None), "image 1: NoneType is not an image"),
        (lambda m: m.caption([IMAGE, None]), "image 2: NoneType is not an image"),
        (lambda m: m.match([IMAGE, {}], ["a", "b"]), "image 2: dict is not an image"),
        (lambda m: m.reconstruct(IMAGE, None, "a"), "mask: NoneType is not a mask"),
        (lambda m: m.reconstruct([IMAGE] * 2, [[[True]], [[True, False]]], "a"), r"mask: a mask of shape \[1, 1\]"),
        (lambda m: m.reconstruct(IMAGE, np.full(m.grid, np.nan), "a"), "mask: contains non-numbers"),
        (lambda m: m.reconstruct(IMAGE, np.zeros(m.grid, bool), "a"), "mask: masks no patch"),
        (lambda m: m.inpaint([IMAGE] * 2, [MASK, 0 * MASK], "a"), "mask: masks no patch"),
        (lambda m: m.reconstruct(IMAGE, np.full(m.grid, 0.5), "a"), "mask: contains values other than true and false"),
        (lambda m: m.inpaint(IMAGE, 255 * torch.tensor(MASK), "a"), "mask: contains values other than true and false"),
        (lambda m: m.encode_image(np.array([["a", "b"]], dtype=object)), "image 1: array of object"),
        (lambda m: m.encode_image(np.array(["a.png"])), r"array of <U5\. .*; give several as list\(\.\.\.\)"),
        (lambda m: m.encode_image(Column("a.png", "b.png")), r"(?m)Column is not.*; give several as list.{5}\.$"),
        (lambda m: m.caption(Column("a.png", "b.png")), r"image 1: Column is not .* several as list"),
        (lambda m: m.far(Column("a.png", "b.png")), r"image 1: Column is not .* several as list"),
        (lambda m: m.match(Column("a.png", "b.png"), ["a", "b"]), r"image 1: Column is not .* several as list"),
        (lambda m: m.encode_image(each for each in ["a.png"]), "image 1: generator is not .* several as list"),
        (lambda m: m.encode_text(Column("a", "b")), r"text: Column is not text.* strings; give several as list"),
        (lambda m: m.score(IMAGE, np.array(["a", "b"])), "text: ndarray is not text.* several as list"),
        (lambda m: m.match(IMAGE, (each for each in "ab")), "text: generator is not text.* several as list"),
        (lambda m: m.explain(IMAGE, TEXT, {"red", "circle"}), "text: set is not text.* several as list"),
        (lambda m: m.rank(IMAGE, {"a", "b"}), "rank: set as candidates. Give a list of texts or of images; give sev"),
        (lambda m: m.rank(IMAGE, (each for each in "ab")), "rank: generator as candidates"),
        (lambda m: m.rank(IMAGE, {"a": 1}), r"(?m)rank: dict as candidates. Give a list of texts or of images\.$"),
        (lambda m: m.encode_image(closed()), r"image 1: bad image, unreadable \(I/O operation on closed file\)"),
        (lambda m: m.caption([IMAGE, closed()]), "image 2: bad image, unreadable .* Open it with 'rb', and close it l"),
        (lambda m: m.encode_text(closed()), "text: BytesIO is not text"),
        (lambda m: m.caption(np.zeros((0, 0, 3), np.uint8)), r"image 1: array of shape \[0, 0, 3\] has no pixels"),
        (lambda m: m.caption(torch.zeros(3, 0, 9)), r"image 1: tensor of shape \[3, 0, 9\] has no pixels"),
        (lambda m: m.save_pretrained(None), "save_pretrained: NoneType is not the name of a folder. Name a folder"),
        (lambda m: m.encode_image(np.ones((4, 4, 3), complex)), "image 1: array of complex128"),
        (lambda m: m.reconstruct([IMAGE] * 2, [MASK] * 3, "a"), "2 images, 3 masks and 1 texts"),
        (lambda m: m.encode_image([IMAGE] * 69 + [b"x"]), "image 70: "),
        (lambda m: m.fill_mask([IMAGE, IMAGE, b"x"], "[MASK]"), "image 3: "),
        (lambda m: m.reconstruct([IMAGE] * 65 + [b"x"], MASK, "a"), "image 66: "),
        (lambda m: m.rank("a" * 300 + ".png", ["a"]), "no such file"),
        (lambda m: setattr(m, "batch_size", 0), "batch_size: it is 0. Give a whole number, 1 or more"),
        (lambda m: m(torch.zeros(1, 3, 7, 7)), r"pixel_values: \[1, 3, 7, 7\] where \[B, 3, \d+, \d+\] is read"),
        (lambda m: m(torch.zeros(3, 16)), r"pixel_values: \[3, 16\] where"),
        (lambda m: m(input_ids=torch.zeros(1, 4)), r"input_ids: torch.float32 \[1, 4\] where whole numbers"),
        (lambda m: m(input_ids=torch.zeros(4).long()), r"input_ids: torch.int64 \[4\]"),
        (lambda m: m(None, torch.ones(1, 4).long(), torch.ones(1, 3)), r"attention_mask: \[1, 3\] beside input_ids"),
        (lambda m: m(None, torch.ones(1, 4).bool()), r"input_ids: torch.bool \[1, 4\] where whole numbers"),
        (lambda m: m(None, torch.ones(1, 600).long()), "input_ids: 600 tokens, the model reads 24"),
        (lambda m: m(None, torch.tensor([[2, 10**6]])), "input_ids: ids 2 to 1000000, the model has 0 to"),
        (lambda m: m(torch.zeros(1, 3, SIZE, SIZE).byte()), "pixel_values: torch.uint8, the model's weights"),
        (lambda m: m(torch.zeros(1, 3, SIZE, SIZE).double()), "pixel_values: torch.float64, the model's weights"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(model: PretrainedMaskVLM, ask: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ask(model)
    assert "\n" not in str(caught.value)


def test_true_is_white_and_false_black(model: PretrainedMaskVLM) -> None:
    """As Pillow has images of one bit."""
    bits = np.eye(40, dtype=bool)
    wanted = model.pixels([Image.fromarray(bits).convert("1")])
    for image in (bits, torch.tensor(bits), np.repeat(bits[..., None], 3, 2)):
        assert torch.equal(model.pixels([image]), wanted)


def test_nothing_asked_is_nothing_answered(model: PretrainedMaskVLM) -> None:
    assert model.encode_image([]).shape == model.encode_text([]).shape == (0, 8)
    for answer in (
        model.match([], []), model.match([IMAGE], []), model.match([], "a"), model.score(IMAGE, []),
        model.fill_mask(IMAGE, []), model.explain(IMAGE, TEXT, []), model.caption([]),
        model.reconstruct([], [], []), model.inpaint([], MASK, "a"), model.reconstruct(IMAGE, MASK, []),
    ):  # fmt: skip
        assert answer == []


def test_a_text_may_be_longer_than_a_name_of_a_file(model: PretrainedMaskVLM) -> None:
    long = "a red star " * 40
    assert {one.place for one in model.rank(IMAGE, [long, "a"])} == {0, 1}
    assert model.rank(long, [IMAGE])[0].place == 0
    assert model.rank("a \0 star", [IMAGE])[0].place == 0


def test_masks_are_tensors_of_any_kind(model: PretrainedMaskVLM) -> None:
    """With a gradient, too; those of a card are read like these."""
    one = torch.zeros(model.grid)
    one[0, 0] = 1
    both = model.reconstruct([IMAGE] * 2, [one.requires_grad_(), one.bool()], "a")
    assert [list(each.getdata()) for each in both] == [list(model.reconstruct(IMAGE, one, "a").getdata())] * 2
    with pytest.raises(UserError, match="masks"):
        model.reconstruct([IMAGE] * 2, [torch.zeros(1, 1), torch.zeros(1, 2)][:1] * 3, "a")


def test_open_files_and_bytes_in_any_wrapping_are_images(model: PretrainedMaskVLM) -> None:
    buffer = io.BytesIO()
    IMAGE.save(buffer, format="PNG")
    wanted = model.encode_image(IMAGE)
    for image in (io.BytesIO(buffer.getvalue()), bytearray(buffer.getvalue()), memoryview(buffer.getvalue())):
        assert torch.equal(model.encode_image(image), wanted)
    for ask in (model.caption, lambda file: model.score(file, TEXT), lambda file: model.match(file, TEXT)):
        assert ask(io.BytesIO(buffer.getvalue())) == ask(IMAGE)  # read once


def test_one_mask_serves_several_images(model: PretrainedMaskVLM) -> None:
    for mask in (MASK, MASK.tolist(), torch.tensor(MASK)):
        many: Any = model.reconstruct([IMAGE, IMAGE], mask, "a")
        assert len(many) == 2
        assert np.array_equal(np.asarray(many[0]), np.asarray(model.reconstruct(IMAGE, MASK, "a")))


def test_a_single_image_or_text_is_one(model: PretrainedMaskVLM) -> None:
    """A tensor [3, H, W] is no three images, a text no letters."""
    one = torch.from_numpy(np.asarray(IMAGE)).permute(2, 0, 1)
    torch.testing.assert_close(model.pixels(one), model.pixels([IMAGE]), rtol=0, atol=0)
    assert torch.equal(model.tokens("a star").token_CT, model.tokens(["a star"]).token_CT)


def test_one_image_goes_with_several_texts_and_masks(model: PretrainedMaskVLM) -> None:
    other = np.roll(MASK, 1, axis=0)
    by_text: Any = model.reconstruct(IMAGE, MASK, ["a red star", "a blue star"])
    by_mask: Any = model.inpaint([IMAGE], [MASK, other], "a red star", steps=1)
    alone = [model.reconstruct(IMAGE, mask, text) for mask, text in ((MASK, "a red star"), (MASK, "a blue star"))]
    assert [one.tobytes() for one in by_text] == [one.tobytes() for one in alone]  # type: ignore[union-attr]
    wanted = model.inpaint(IMAGE, other, "a red star", steps=1)
    assert len(by_mask) == 2
    assert by_mask[1].tobytes() == wanted.tobytes()  # type: ignore[union-attr]
    assert len(model.reconstruct(IMAGE, MASK, ["a red star"])) == 1  # type: ignore[arg-type]


def test_one_length_and_one_word_serve_several_images(model: PretrainedMaskVLM) -> None:
    assert model.caption(IMAGE, 5) == model.caption(IMAGE, [5])  # type: ignore[arg-type]
    for word in ("red", ["red"]):
        two: Any = model.explain([IMAGE] * 2, ["a red star"] * 2, word)
        assert [each.attention.shape for each in two] == [(4, 4)] * 2


def test_punctuation_follows_its_word() -> None:
    text = "white background, a red circle: a star"
    words = MarkedTexts(train_tokenizer([text] * 20, 256), 24)
    assert words.decode(words([text]).token_CT[0].tolist()) == text


def test_a_verb_that_is_not_there_names_those_that_are(model: PretrainedMaskVLM) -> None:
    assert not hasattr(model, "answer")
    brings = "MaskedPretraining, brings no method of its own; fine-tuned models have "
    with pytest.raises(AttributeError, match=f"{brings}it: maskvlm finetune vqa$"):
        model.answer(IMAGE, "what")
    with pytest.raises(AttributeError, match=f"{brings}more: maskvlm finetune TASK$"):
        model.generate(IMAGE)
    for wrong, right in {"fill": "fill_mask", "embed_text": "encode_text", "matches": "match"}.items():
        with pytest.raises(AttributeError, match=rf"^no attribute '{wrong}' \(did you mean {right}\?\)"):
            getattr(model, wrong)


def test_an_image_in_the_place_of_a_text_is_told_and_the_reverse(model: PretrainedMaskVLM, tmp_path: Path) -> None:
    """Fails, too, where the answer depends on whether there is such a file: the page's visitors would learn it."""
    file = str(tmp_path / "photo.png")
    IMAGE.save(file)
    for text in (file, "no-such-photo.png"):
        with pytest.raises(
            UserError, match=rf"^text: '{text}' is the name of an image, not a text\. Give it as the im"
        ):
            model.encode_text(text)
    for ask in (model.encode_text, lambda text: model.score(IMAGE, text), lambda text: model.match(IMAGE, text)):
        with pytest.raises(UserError, match=r"photo\.png' is the name of an image"):
            ask(file)
    # Captions of a set may be anything.
    assert len(model.encode_text(["a star", file])) == 2
    assert model.encode_text("a photo, star.png, of it").ndim == 1
    for ask in (model.encode_image, model.caption):
        with pytest.raises(UserError, match=r"no file a dog on grass.*It looks like a text"):
            ask("a dog on grass")
    # These may well be misspelt paths.
    for name in ("my photo.jpg", "dog", "photos/my dog"):
        with pytest.raises(UserError, match="Check the path"):
            model.encode_image(name)


def test_the_processor_takes_every_mode_of_an_image(place: Path) -> None:
    processor = AutoProcessor.from_pretrained(place / "model")
    wanted = processor(images=IMAGE, text=TEXT, return_tensors="pt")["pixel_values"]
    for mode in ("RGBA", "P", "L", "CMYK"):
        pixels = processor(images=IMAGE.convert(mode), text=TEXT, return_tensors="pt")["pixel_values"]
        assert pixels.shape == wanted.shape
    assert torch.equal(processor(images=IMAGE.convert("RGBA"), return_tensors="pt")["pixel_values"], wanted)


def test_precision_by_its_older_name(place: Path) -> None:
    half = PretrainedMaskVLM.from_pretrained(place / "best.ckpt", torch_dtype="bfloat16")
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match="no name"):
        PretrainedMaskVLM.from_pretrained("")


def test_a_device_by_its_older_name(place: Path) -> None:
    assert PretrainedMaskVLM.from_pretrained(place / "best.ckpt", device_map="cpu").device.type == "cpu"
    with pytest.raises(UserError, match=r"no argument devise \(did you mean device\?\)"):
        PretrainedMaskVLM.from_pretrained(place / "best.ckpt", devise="cpu")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": np.zeros((1, 3, SIZE, SIZE))}, "pixel_values: ndarray is not a tensor"),
        ({"input_ids": [[2, 3]]}, "input_ids: list is not a tensor. Give .*return_tensors='pt'"),
        ({"input_ids": torch.zeros(1, 2, dtype=torch.uint8)}, "input_ids: torch.uint8"),
    ],
)
def test_forward_reads_tensors(model: PretrainedMaskVLM, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model(**inputs)


def test_a_model_without_matching_ranks_by_contrast_alone(place: Path) -> None:
    model = PretrainedMaskVLM.from_pretrained(place / "best.ckpt")
    del model.task.matching
    with pytest.raises(UserError, match=r"rank: this model has no matching, .* Give k=0"):
        model.rank(IMAGE, ["a", "b"])
    assert sorted(each.place for each in model.rank(IMAGE, ["a", "b"], k=0)) == [0, 1]


def test_an_explanation_in_inference_mode(model: PretrainedMaskVLM) -> None:
    """As in a service that answers everything in it; Grad-CAM needs gradients all the same."""
    wanted = model.explain(IMAGE, TEXT, "red")
    with torch.inference_mode():
        found = model.explain(IMAGE, TEXT, "red")
    assert np.array_equal(found.gradcam, wanted.gradcam)


def test_an_explanation_by_a_model_that_was_loaded_in_inference_mode(place: Path, model: PretrainedMaskVLM) -> None:
    for name in ("best.ckpt", "model"):
        with torch.inference_mode():
            loaded = PretrainedMaskVLM.from_pretrained(place / name)
            loaded.match(IMAGE, TEXT)
        found = loaded.explain(IMAGE, TEXT, "red")
        assert np.array_equal(found.gradcam, model.explain(IMAGE, TEXT, "red").gradcam)


def test_a_task_s_inputs_may_be_given_by_their_names(tmp_path: Path) -> None:
    saved(tmp_path / "vqa.ckpt", "vqa")
    model = PretrainedMaskVLM.from_pretrained(tmp_path / "vqa.ckpt")
    wanted = model.answer(IMAGE, "what")
    assert model.answer(question="what", image=IMAGE) == model.answer(IMAGE, question="what") == wanted
    for names, what in (
        ({"picture": IMAGE, "question": "what"}, "missing a required argument: 'image'"),
        ({"image": IMAGE, "question": "what", "k": 3}, "got an unexpected keyword argument 'k'"),
        ({"image": IMAGE}, "missing a required argument: 'question'"),
    ):
        with pytest.raises(UserError, match=rf"(?m)^answer: {what}\. Give image, question\.$"):
            model.answer(**names)
    with pytest.raises(UserError, match="answer: multiple values for argument 'image'"):
        model.answer(IMAGE, image=IMAGE)


def test_unit_vectors_are_float32_in_every_precision(place: Path) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = PretrainedMaskVLM.from_pretrained(place / "best.ckpt", dtype=dtype)
        vectors = (model.encode_image(IMAGE), model.encode_text([TEXT]), model.encode_image([]), model.encode_text([]))
        assert {vector.dtype for vector in vectors} == {torch.float32}


def test_a_folder_that_cannot_be_made_is_named(model: PretrainedMaskVLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file" / "below", tmp_path / ("a" * 300)):
        with pytest.raises(UserError) as caught:
            model.save_pretrained(folder)
        assert str(folder) in str(caught.value)
        assert caught.value.code == ExitCode.CANNOT_CREATE
    with pytest.raises(UserError, match="a zero byte"):
        model.save_pretrained("a\0b")


def damaged(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "model", tmp_path / "copy"))


def refused(folder: Path, message: str, code: ExitCode) -> None:
    with pytest.raises(UserError, match=message) as caught:
        PretrainedMaskVLM.from_pretrained(folder)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "lineage.safetensors"])
def test_a_changed_byte_in_a_folder_is_seen(place: Path, tmp_path: Path, name: str) -> None:
    folder = damaged(place, tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[-5] ^= 0xFF
    (folder / name).write_bytes(content)
    refused(folder, f"{name}: damaged", ExitCode.BAD_DATA)
    (folder / "checksums.json").unlink()  # of an older version: nothing to compare with
    PretrainedMaskVLM.from_pretrained(folder)
    (folder / "checksums.json").write_text("[")
    refused(folder, "checksums.json:1: not JSON", ExitCode.BAD_DATA)


def test_a_folder_in_parts_is_one_line(place: Path, tmp_path: Path) -> None:
    folder = damaged(place, tmp_path)
    whole = (folder / "lineage.safetensors").read_bytes()
    (folder / "lineage.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(folder, "lineage.safetensors: truncated or damaged", ExitCode.BAD_DATA)
    (folder / "lineage.safetensors").unlink()
    PretrainedMaskVLM.from_pretrained(folder)  # what it has seen is not needed to ask it
    (folder / "tokenizer.json").unlink()
    refused(folder, "holds no tokenizer.json", ExitCode.MISSING_INPUT)
    config = json.loads((folder / "config.json").read_text())
    del config["backbone"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "the key backbone is missing", ExitCode.BAD_DATA)
