"""The model for its users: what it answers equals the training code's forward, wherever it was loaded from."""

import inspect
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toy_examples import LABELS
from toy_pretrained import BACKBONE, LINEAGE_ENTRY, content_of, saved, toy_model
from toys import SIZE, toy_batch
from transformers import AutoModel, AutoProcessor

import maskvlm
from maskvlm.checkpoint import io as checkpoint
from maskvlm.checkpoint.hub_client import folder_of_hub
from maskvlm.checkpoint.model_spec import portable_yaml
from maskvlm.checkpoint.warm_start import read_start
from maskvlm.data.text import Captioner, tokenizer_hash
from maskvlm.data.transforms import eval_transform
from maskvlm.inference import embeddings
from maskvlm.inference import infill as unmask
from maskvlm.inference.pretrained import PretrainedMaskVLM, UnusedMask
from maskvlm.inference.saliency import trace
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.masking import PatchMask
from maskvlm.objectives.methods import Method
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.objectives.reconstructed_examples import fill_images, to_rgb
from maskvlm.utils.errors import ExitCode, UserError

TEXTS = ["a red circle on the left", "two things", "a small striped green star at the top left on white"]


def noise(seed: int, size: tuple[int, int] = (40, 50)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


IMAGES = [noise(0), noise(1, (32, 32)), noise(2, (90, 33))]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("run") / "best.ckpt"
    saved(file)
    (file.parent / "metrics.json").write_text('{"step": 7, "retrieval/tr_r1": 12.5, "retrieval/tr_r1_chance": 0.5}')
    (file.parent / "card.json").write_text('{"split": "val"}')
    return file


@pytest.fixture(scope="module")
def parts() -> tuple[MaskVLM, MaskedPretraining]:
    """The same model as the training code has it."""
    backbone, task, _ = toy_model("pretrain")
    assert isinstance(task, MaskedPretraining)
    return backbone, task


@pytest.fixture(scope="module")
def model(path: Path) -> PretrainedMaskVLM:
    return PretrainedMaskVLM.from_pretrained(path)


def inputs(backbone: MaskVLM, images: list[Image.Image], texts: list[str]) -> tuple[torch.Tensor, Any]:
    """As evaluation prepares them."""
    transform = eval_transform(backbone.input_spec)
    assert backbone.text.tokenizer is not None
    return torch.stack([transform(each) for each in images]), Captioner(backbone.text.tokenizer, 24)(texts)


def close(ours: Any, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(ours), theirs, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- methods equal the training code


@torch.no_grad()
def test_vectors_and_matches(model: PretrainedMaskVLM, parts: tuple[MaskVLM, MaskedPretraining]) -> None:
    backbone, task = parts
    image, text = inputs(backbone, IMAGES, TEXTS)
    image_BLD, text_BTD = backbone.image(image), backbone.text(text.token_CT, text.attention_CT)
    close(model.encode_image(IMAGES), task.projection.embed_image(image_BLD))
    close(model.encode_text(TEXTS), task.projection.embed_text(text_BTD, text.attention_CT))
    fused = backbone.fuse(image_BLD, text_BTD, text.attention_CT)
    close(model.match(IMAGES, TEXTS), task.matching(fused.product_MD).softmax(1)[:, 1])


@torch.no_grad()
def test_words_of_masked_places(model: PretrainedMaskVLM, parts: tuple[MaskVLM, MaskedPretraining]) -> None:
    backbone, task = parts
    image, text = inputs(backbone, IMAGES[:1], ["a red circle on the left"])
    token = text.token_CT.clone()
    token[0, 2], token[0, 6] = backbone.text.mask_id, backbone.text.mask_id
    context = backbone.cross_text.context(backbone.image(image))
    text_BTD = backbone.text(token, text.attention_CT)
    crossed = backbone.cross_text(text_BTD, context, text.attention_CT).full_RLD
    probability_KV = task.tokens(crossed[0, [2, 6]])
    tokenizer: Any = backbone.text.tokenizer
    # No special token is a word, nor is what the head has more of than the tokenizer.
    probability_KV[:, [0, 2, 3, 4, 1, *range(len(tokenizer), probability_KV.shape[1])]] = float("-inf")
    top = probability_KV.softmax(1).topk(4)
    guesses: Any = model.fill_mask(IMAGES[0], "a [MASK] circle on the [MASK]", 4)
    close([[guess.probability for guess in place] for place in guesses], top.values)
    assert [[guess.word for guess in place] for place in guesses] == [
        [tokenizer.decode([number]) for number in row] for row in top.indices.tolist()
    ]


@torch.no_grad()
def test_score_is_the_sum_over_words_masked_one_at_a_time(
    model: PretrainedMaskVLM, parts: tuple[MaskVLM, MaskedPretraining]
) -> None:
    backbone, task = parts
    image, text = inputs(backbone, IMAGES[:1], TEXTS[:1])
    total = 0.0
    for place in range(1, text.token_CT.shape[1] - 1):
        token = text.token_CT.clone()
        token[0, place] = backbone.text.mask_id
        context = backbone.cross_text.context(backbone.image(image))
        crossed = backbone.cross_text(backbone.text(token, text.attention_CT), context, text.attention_CT).full_RLD
        total += float(task.tokens(crossed)[0, place].log_softmax(0)[text.token_CT[0, place]])
    assert model.score(IMAGES[0], TEXTS[0]) == pytest.approx(total, abs=1e-4)


@torch.no_grad()
def test_painted_patches_are_those_of_the_training_figure(
    model: PretrainedMaskVLM, parts: tuple[MaskVLM, MaskedPretraining]
) -> None:
    backbone, task = parts
    image, text = inputs(backbone, IMAGES[:2], TEXTS[:2])
    mask = np.zeros((4, 4), dtype=bool)
    mask[1:3, 2] = mask[0, 0] = True
    index_BK = torch.tensor(mask.flatten()).nonzero().flatten().expand(2, -1)
    mask_BN = torch.tensor(mask.flatten()).expand(2, -1)
    patch = PatchMask(mask_BN, index_BK, torch.ones(2, 3))
    batch = toy_batch(2)._replace(image_BCHW=image, **text._asdict())
    wanted_BCHW = fill_images(backbone, task, batch, patch).filled_BCHW
    images: Any = model.reconstruct(IMAGES[:2], [mask, mask], TEXTS[:2])
    for painted, wanted_CHW in zip(images, wanted_BCHW, strict=True):
        painted_CHW = torch.tensor(np.asarray(painted)).permute(2, 0, 1) / 255
        torch.testing.assert_close(painted_CHW, wanted_CHW, atol=0.5 / 255 + 1e-5, rtol=0)
    whole = to_rgb(backbone, image)[0]
    visible = torch.tensor(~mask).repeat_interleave(8, 0).repeat_interleave(8, 1)
    painted_CHW = torch.tensor(np.asarray(images[0])).permute(2, 0, 1) / 255
    assert (painted_CHW - whole).abs()[:, visible].max() <= 0.5 / 255 + 1e-5  # what was not hidden stays


def test_painting_in_one_round_is_reconstruction_and_more_rounds_are_not(model: PretrainedMaskVLM) -> None:
    mask = np.zeros((4, 4), dtype=bool)
    mask[:2] = True
    at_once: Any = model.reconstruct(IMAGES[0], mask, TEXTS[0])
    one: Any = model.inpaint(IMAGES[0], mask, TEXTS[0], steps=1)
    four: Any = model.inpaint(IMAGES[0], mask, TEXTS[0], steps=4)
    assert np.array_equal(np.asarray(at_once), np.asarray(one))
    assert not np.array_equal(np.asarray(at_once), np.asarray(four))
    assert four.size == (SIZE, SIZE)


@torch.no_grad()
def test_kept_attention_changes_nothing(parts: tuple[MaskVLM, MaskedPretraining]) -> None:
    backbone, _ = parts
    image, text = inputs(backbone, IMAGES, TEXTS)
    image_BLD, text_BTD = backbone.image(image), backbone.text(text.token_CT, text.attention_CT)
    traced = trace(backbone.cross_text, text_BTD, image_BLD, text.attention_CT)
    wanted = backbone.cross_text(text_BTD, backbone.cross_text.context(image_BLD), text.attention_CT).full_RLD
    torch.testing.assert_close(traced.every_BTD, wanted, atol=1e-5, rtol=1e-5)
    assert [tuple(p.shape) for p in traced.probabilities] == [(3, 2, text.token_CT.shape[1], 17)] * 2
    torch.testing.assert_close(traced.probabilities[0].sum(-1), torch.ones(3, 2, text.token_CT.shape[1]))


def test_explain_gives_shares_of_the_patches_and_an_image_of_the_same_size(model: PretrainedMaskVLM) -> None:
    explanation = model.explain(IMAGES[0], TEXTS[0], "circle")
    assert explanation.attention.shape == explanation.gradcam.shape == (4, 4)
    assert explanation.attention.sum() == pytest.approx(1, abs=1e-5)
    assert explanation.gradcam.min() >= 0
    assert explanation.gradcam.sum() == pytest.approx(1, abs=1e-5) or explanation.gradcam.sum() == 0
    assert explanation.image.size == IMAGES[0].size
    assert not np.array_equal(np.asarray(explanation.image), np.asarray(IMAGES[0]))
    two_words = model.explain(IMAGES[0], TEXTS[0], "red circle")
    assert not np.allclose(two_words.attention, explanation.attention)


def test_captions_are_words_and_the_one_that_matches_best(model: PretrainedMaskVLM) -> None:
    text: Any = model.caption(IMAGES[0], lengths=[2, 5])
    with torch.no_grad():
        both = [one.text for one in unmask.write_captions(model, unmask.look(model, IMAGES[:1], [1]), [2, 5])[0]]
    matches: Any = model.match(IMAGES[0], both)
    assert text == both[int(np.argmax(matches))]
    assert all("[" not in one for one in both)


@torch.no_grad()
def test_the_most_certain_word_is_written_first(model: PretrainedMaskVLM) -> None:
    """By hand: one row, three masked words."""
    ((written,),) = unmask.write_captions(model, unmask.look(model, IMAGES[:1], [1]), [3])
    start, end = model.words.ends
    token, mask = torch.tensor([[start, 4, 4, 4, end]]), 4
    total = 0.0
    while (token == mask).any():
        rows = unmask.pair_rows(model, *unmask.look(model, IMAGES[:1], [1]), [token[0]])
        ((_, text_1TD),) = unmask.text_cross(model, rows)
        log_p = unmask.forbid(model, model.head("tokens", "caption")(text_1TD)).log_softmax(-1)[0]
        hidden = (token[0] == mask).nonzero().flatten().tolist()
        place = max(hidden, key=lambda at: float(log_p[at].max()))
        total += float(log_p[place].max())
        token[0, place] = log_p[place].argmax()
    assert written.text == model.words.decode(token[0, 1:-1].tolist())
    assert written.certainty == pytest.approx(total / 3, abs=1e-5)


# ---------------------------------------------------------------------- lists and forms of images


def test_lists_equal_singles(model: PretrainedMaskVLM) -> None:
    model.batch_size = 2  # three of each: a full part and a rest
    masks = [np.eye(4, dtype=bool)] * 3
    close(model.encode_image(IMAGES), torch.stack([model.encode_image(each) for each in IMAGES]))
    close(model.encode_text(TEXTS), torch.stack([model.encode_text(each) for each in TEXTS]))
    close(model.match(IMAGES, TEXTS), torch.tensor([model.match(p, t) for p, t in zip(IMAGES, TEXTS, strict=True)]))
    close(model.match(IMAGES[0], TEXTS), torch.tensor([model.match(IMAGES[0], text) for text in TEXTS]))
    close(model.score(IMAGES, TEXTS), torch.tensor([model.score(p, t) for p, t in zip(IMAGES, TEXTS, strict=True)]))
    many: Any = model.rank(IMAGES, TEXTS, 2)
    for ranked, image in zip(many, IMAGES, strict=True):
        single: Any = model.rank(image, TEXTS, 2)
        assert [one.place for one in ranked] == [one.place for one in single]
        close([one.similarity for one in ranked], torch.tensor([one.similarity for one in single]))
    captions: Any = model.caption(IMAGES, [3, 6, 4])
    assert captions == [model.caption(image, [3, 6, 4]) for image in IMAGES]
    hidden = ["a [MASK] circle", "[MASK] things on the [MASK]", "a small [MASK] star at the [MASK] left"]
    looked: list[Any] = [IMAGES[0], None, IMAGES[0]]  # one image twice, and none
    words: Any = model.fill_mask(looked, hidden, 3)
    for places, image, text in zip(words, looked, hidden, strict=True):
        one: Any = model.fill_mask(image, text, 3)
        assert [[g.word for g in place] for place in places] == [[g.word for g in place] for place in one]
        close([[g.probability for g in place] for place in places], torch.tensor([[g[1] for g in p] for p in one]))
    close(model.score(looked, TEXTS), torch.tensor([model.score(p, t) for p, t in zip(looked, TEXTS, strict=True)]))
    assert model.score([], []) == model.caption([]) == model.fill_mask([], []) == []
    painted: Any = model.reconstruct(IMAGES, masks, TEXTS)
    for batched, image, text in zip(painted, IMAGES, TEXTS, strict=True):
        single = model.reconstruct(image, masks[0], text)
        assert np.abs(np.asarray(batched).astype(int) - np.asarray(single).astype(int)).max() <= 1
    maps: Any = model.explain(IMAGES[0], TEXTS[0], ["red", "circle"])
    maps += model.explain(IMAGES[1:], TEXTS[1:], ["two", "star"])
    queries = [(0, "red"), (0, "circle"), (1, "two"), (2, "star")]
    for explained, (number, word) in zip(maps, queries, strict=True):
        single = model.explain(IMAGES[number], TEXTS[number], word)
        np.testing.assert_allclose(explained.gradcam, single.gradcam, atol=1e-5)
        assert np.array_equal(np.asarray(explained.image), np.asarray(single.image))
    assert [each.attention.shape for each in model.explain([IMAGES[0]] * 2, ["a red star"] * 2, "red")] == [(4, 4)] * 2
    model.batch_size = 64


@pytest.mark.parametrize("method", ["reconstruct", "inpaint"])
def test_batch_size_bounds_what_is_painted_at_once(
    model: PretrainedMaskVLM, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    sizes: list[int] = []
    encode = model.backbone.image.forward
    monkeypatch.setattr(model.backbone.image, "forward", lambda x, *rest: sizes.append(len(x)) or encode(x, *rest))
    monkeypatch.setattr(model, "batch_size", 2)
    assert len(getattr(model, method)(IMAGES, np.eye(4, dtype=bool), "a red star")) == 3
    assert max(sizes) == 2


def test_ranking_is_contrast_and_then_matching(model: PretrainedMaskVLM) -> None:
    ranking: Any = model.rank(IMAGES[0], TEXTS, k=2)
    cosine = (model.encode_text(TEXTS) @ model.encode_image(IMAGES[0])).tolist()
    order = sorted(range(3), key=lambda number: -cosine[number])
    likely = {number: model.match(IMAGES[0], TEXTS[number]) for number in order[:2]}
    assert [one.place for one in ranking] == [*sorted(order[:2], key=lambda number: -likely[number]), order[2]]
    assert [one.match is None for one in ranking] == [False, False, True]
    other: Any = model.rank(TEXTS[0], IMAGES, k=0)
    cosine = (model.encode_image(IMAGES) @ model.encode_text(TEXTS[0])).tolist()
    assert [one.place for one in other] == sorted(range(3), key=lambda number: -cosine[number])


def test_candidates_that_are_nothing_are_told(model: PretrainedMaskVLM) -> None:
    wrong: Any = [1, 2]
    with pytest.raises(UserError, match="image 2: int is not an image"):
        model.rank(IMAGES[0], wrong)
    with pytest.raises(UserError, match="images on both sides"):
        model.rank(IMAGES[0], IMAGES)


@pytest.mark.parametrize("share", [1.0, 1000.0])
def test_ranking_by_both_where_the_task_does(
    model: PretrainedMaskVLM, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """The sum of the log-odds of a match and of contrast's logit; with much of the latter its order is left."""
    monkeypatch.setattr(model.task, "rerank_contrast", share)
    ranking: Any = model.rank(IMAGES[0], TEXTS, k=3)
    cosine_C = model.encode_text(TEXTS) @ model.encode_image(IMAGES[0])
    match_C = torch.tensor([model.match(IMAGES[0], text) for text in TEXTS])
    score_C = match_C.logit() + share * model.task.projection.logit_scale.item() * cosine_C
    assert [one.place for one in ranking] == score_C.argsort(descending=True).tolist()
    for one in ranking:
        assert one.match == pytest.approx(float(match_C[one.place]), abs=1e-5)
    if share > 1:
        assert [one.place for one in ranking] == cosine_C.argsort(descending=True).tolist()


def test_every_form_of_an_image_is_the_same_image(model: PretrainedMaskVLM, tmp_path: Path) -> None:
    image = IMAGES[0]
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    image_CHW = torch.tensor(array).permute(2, 0, 1)
    forms = [
        tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), image, array,
        array.astype(np.float32) / 255, image_CHW, image_CHW / 255,
    ]  # fmt: skip
    wanted = model.encode_image(image)
    for form in forms:
        close(model.encode_image(form), wanted)
    close(model.encode_image(torch.stack([torch.tensor(array).permute(2, 0, 1)] * 2)), torch.stack([wanted] * 2))
    close(model.encode_image(array[..., 0]), model.encode_image(Image.fromarray(array[..., 0])))


@given(st.lists(st.sampled_from(["red", "circle", "[MASK]", "on", "the", "star"]), min_size=1, max_size=12))
def test_masked_words_stand_where_they_are_written(words: list[str]) -> None:
    backbone, _, _ = toy_model("pretrain")
    from maskvlm.data.inputs import MarkedTexts

    marked_texts = MarkedTexts(backbone.text.tokenizer, 24)
    if "[MASK]" not in words:
        with pytest.raises(UserError, match="masked"):
            marked_texts.masked(" ".join(words))
        return
    token = marked_texts.masked(" ".join(words)).tolist()
    plain = marked_texts([" ".join(words).replace("[MASK]", "red")]).token_CT[0].tolist()
    hidden = [False, *(word == "[MASK]" for word in words), False]  # each word is one token
    assert token == [4 if here else token_id for token_id, here in zip(plain, hidden, strict=True)]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m: m.encode_image("nowhere.jpg"), "nowhere.jpg: bad image, missing"),
        (lambda m: m.encode_image(b"not an image at all"), "not an image"),
        (lambda m: m.encode_image(np.zeros((4, 4, 7))), r"array of shape \[4, 4, 7\]"),
        (lambda m: m.encode_image(np.full((9, 9, 3), 3.0)), "not normalised"),
        (lambda m: m.encode_image(torch.full((3, 9, 9), float("nan"))), "not normalised"),
        (lambda m: m.encode_image(""), "image 1: its path is empty"),
        (lambda m: m.save_pretrained(""), "save_pretrained: the folder's name is empty"),
        (lambda m: m.encode_text(""), "no word"),
        (lambda m: m.match(IMAGES[0], ["red", " "]), "text 2: it has no words"),
        (lambda m: m.match(IMAGES[0], ["red", 7]), "text 2: int is not text"),
        (lambda m: m.encode_text(7), "int is not text"),
        (lambda m: m.match(IMAGES[:2], TEXTS), "2 images and 3 texts"),
        (lambda m: m.rank(IMAGES[0], IMAGES), "images on both sides"),
        (lambda m: m.rank("a", TEXTS), "texts on both sides"),
        (lambda m: m.rank(IMAGES[0], []), "no candidates"),
        (lambda m: m.fill_mask(IMAGES[0], "a red circle"), "no word in it is masked"),
        (lambda m: m.fill_mask(IMAGES[0], "red " * 40 + "[MASK]"), "beyond the 22 tokens"),
        (lambda m: m.fill_mask(IMAGES[0], "[MASK]", 0), "top_k is 0"),
        (lambda m: m.explain(IMAGES[0], "a red circle", "star"), "'star' is not in the text"),
        (lambda m: m.explain(IMAGES, TEXTS, ["a", "two"]), "2 words for 3 texts"),
        (lambda m: m.reconstruct(IMAGES[0], np.zeros((3, 3), bool), "a"), r"a mask of shape \[3, 3\]"),
        (lambda m: m.inpaint(IMAGES[0], np.zeros((4, 4), bool), "a", steps=0), "steps is 0"),
        (lambda m: m.caption(IMAGES[0], lengths=[99]), "the length is not from 1 to 22"),
        (lambda m: m.rank(IMAGES[0], TEXTS, -1), "k is -1"),
    ],
)  # fmt: skip
def test_a_wrong_input_is_one_line(model: PretrainedMaskVLM, ask: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ask(model)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- the hub's format


@pytest.fixture(scope="module")
def folder(model: PretrainedMaskVLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hub") / "model"
    model.save_pretrained(place)
    return place


def test_saved_and_loaded_is_equal_to_the_bit(model: PretrainedMaskVLM, folder: Path) -> None:
    again = PretrainedMaskVLM.from_pretrained(folder)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert model.match(IMAGES, TEXTS) == again.match(IMAGES, TEXTS)
    assert tokenizer_hash(again.words.tokenizer) == tokenizer_hash(model.words.tokenizer)
    (entry,) = again.origin.history
    assert entry[:5] == LINEAGE_ENTRY[:5]
    assert entry.ids is not None
    assert entry.ids.tolist() == [4, 5, 9]
    again.save_pretrained(folder.parent / "twice")
    for name in ("config.json", "README.md", "model.safetensors"):
        assert (folder.parent / "twice" / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_model_saved_over_another_leaves_nothing_of_it(path: Path, tmp_path: Path) -> None:
    """The images that the other one knew and had seen would be taken for its own."""
    first = PretrainedMaskVLM.from_pretrained(path)
    (entry,) = first.origin.history
    first.origin = first.origin._replace(known_images=torch.rand(100, first.backbone.image.width).half())
    first.save_pretrained(tmp_path)
    assert PretrainedMaskVLM.from_pretrained(tmp_path).known is not None
    first.origin = first.origin._replace(known_images=None, history=(entry._replace(ids=None),))
    with torch.no_grad():
        first.backbone.image.vit.cls_token += 1  # type: ignore[operator]
    first.save_pretrained(tmp_path)
    again = PretrainedMaskVLM.from_pretrained(tmp_path)
    assert again.known is None
    assert [each.ids for each in again.origin.history] == [None]
    assert torch.equal(again.encode_image(IMAGES), first.encode_image(IMAGES))


def test_an_argument_that_would_write_other_files_is_refused(model: PretrainedMaskVLM, tmp_path: Path) -> None:
    """The folder would be read by its one file of weights, which transformers leaves as it was."""
    for name, value in (("max_shard_size", "1MB"), ("variant", "fp16"), ("repoid", "a/b")):
        with pytest.raises(UserError, match=f"save_pretrained: there is no argument {name}"):
            model.save_pretrained(tmp_path / "model", **{name: value})
    assert not (tmp_path / "model").exists()


def test_a_model_without_tokenizer_is_not_half_saved(path: Path, tmp_path: Path) -> None:
    model = PretrainedMaskVLM.from_pretrained(path)
    model.backbone.text.tokenizer = None
    with pytest.raises(UserError, match="tokenizer: the checkpoint holds none"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_processor_reads_images_as_the_model_does(model: PretrainedMaskVLM, folder: Path, tmp_path: Path) -> None:
    """A photo that is stored on its side, 16 bits, a palette, transparency."""
    on_its_side, exif = noise(5, (32, 60)), Image.Exif()
    exif[0x0112] = 6
    on_its_side.save(tmp_path / "a.jpg", exif=exif, quality=95)
    deep = Image.fromarray(np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16))
    images = [
        Image.open(tmp_path / "a.jpg"),
        deep,
        noise(6).convert("P"),
        noise(7).convert("RGBA"),
        noise(8).convert("L"),
    ]
    processor = AutoProcessor.from_pretrained(folder)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, model.pixels(images), atol=1e-5, rtol=0)
    close(processor(images=images[0], return_tensors="pt")["pixel_values"], pixels[:1])


def test_the_folder_holds_no_pickle_and_a_card_with_the_numbers(folder: Path) -> None:
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "README.md"} <= names
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors", ".md"}
    card = (folder / "README.md").read_text()
    assert "| retrieval/tr_r1 | 12.5 | 0.5 |" in card
    assert "`maskvlm.data.scenes.source.Scenes`" in card
    assert "steps: 7" in card


@torch.no_grad()
def test_transformers_auto_classes_know_it(model: PretrainedMaskVLM, folder: Path) -> None:
    other, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    batch = processor(images=IMAGES, text=TEXTS, return_tensors="pt", padding=True, truncation=True)
    out = other(**batch)
    close(out.image_embeds, model.encode_image(IMAGES))
    close(out.text_embeds, model.encode_text(TEXTS))
    close(out.match_logits.sigmoid(), torch.tensor(model.match(IMAGES, TEXTS)))
    assert out.fused.shape == (3, 48)
    assert maskvlm.MaskVLM is PretrainedMaskVLM


def test_fine_tuning_starts_from_the_folder(path: Path, folder: Path) -> None:
    ours, theirs = read_start(str(folder)), read_start(str(path))
    assert ours.backbone.keys() == theirs.backbone.keys()
    assert all(torch.equal(ours.backbone[name], theirs.backbone[name]) for name in theirs.backbone)
    assert ours.heads.keys() == theirs.heads.keys()


def test_loading_warns_of_nothing(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PretrainedMaskVLM.from_pretrained(path)


def test_from_pretrained_takes_device_and_precision(path: Path) -> None:
    half = PretrainedMaskVLM.from_pretrained(path, device="cpu", dtype="bfloat16")
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    full = PretrainedMaskVLM.from_pretrained(path)
    assert half.encode_image(IMAGES[0]).dtype == torch.float32
    assert float(half.encode_image(IMAGES[0]) @ full.encode_image(IMAGES[0])) > 0.98
    assert isinstance(half.score(IMAGES[0], TEXTS[0]), float)
    assert half.explain(IMAGES[0], TEXTS[0], "red").attention.shape == (4, 4)


def test_a_device_or_precision_that_is_not_there_is_one_line(path: Path) -> None:
    for settings, message, code in (
        ({"device": "nonsense"}, "device nonsense: cannot be used here", ExitCode.UNAVAILABLE),
        ({"dtype": "nonsense"}, "dtype nonsense: is not a supported precision", ExitCode.USAGE),
        ({"dtype": "int8"}, "dtype int8: is not a supported precision", ExitCode.USAGE),
        ({"dtype": "float8_e4m3fn"}, "dtype float8_e4m3fn: is not a supported precision", ExitCode.USAGE),
        ({"device": "meta"}, "device meta: holds no numbers", ExitCode.UNAVAILABLE),
        ({"dtype": "nn"}, "dtype nn: is not a supported precision", ExitCode.USAGE),
        ({"device": "cuda:99"}, "device cuda:99: cannot be used here", ExitCode.UNAVAILABLE),
    ):
        with pytest.raises(UserError, match=message) as caught:
            PretrainedMaskVLM.from_pretrained(path, **settings)  # type: ignore[arg-type]
        assert caught.value.code == code
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "null"])
def test_damaged_metrics_beside_a_checkpoint_are_told_and_it_loads(path: Path, tmp_path: Path, content: str) -> None:
    shutil.copy(path, tmp_path)
    (tmp_path / "metrics.json").write_text(content)
    with pytest.warns(UserWarning, match=r"metrics\.json.*The model loads without it|metrics\.json.*not JSON"):
        model = PretrainedMaskVLM.from_pretrained(tmp_path / path.name)
    assert model.config.evaluation is None


def test_a_folder_or_file_of_another_kind_is_one_line(folder: Path, path: Path, tmp_path: Path) -> None:
    def refused(place: Path, message: str, code: ExitCode) -> None:
        with pytest.raises(UserError, match=message) as caught:
            PretrainedMaskVLM.from_pretrained(place)
        assert caught.value.code == code
        assert "\n" not in str(caught.value)

    refused(tmp_path, "without config.json", ExitCode.MISSING_INPUT)
    refused(path.parent, "best.ckpt", ExitCode.MISSING_INPUT)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    refused(tmp_path, "expected maskvlm, found 'clip'", ExitCode.BAD_DATA)
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "not JSON", ExitCode.BAD_DATA)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    refused(tmp_path, "no model.safetensors", ExitCode.MISSING_INPUT)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    refused(tmp_path, "truncated or damaged", ExitCode.BAD_DATA)
    evil = json.loads((folder / "config.json").read_text())
    evil["task"]["class_path"] = "subprocess.Popen"
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(evil))
    refused(tmp_path, "is not a task of this project", ExitCode.REFUSED)
    refused(tmp_path / "absent.ckpt", "not there", ExitCode.MISSING_INPUT)


def test_a_checkpoint_without_a_task_needs_the_configuration_of_its_run(tmp_path: Path) -> None:
    backbone, task, spec = toy_model("pretrain")
    file = tmp_path / "last.ckpt"
    checkpoint.save(content_of(backbone, task, None), file)
    with pytest.raises(UserError, match="which task"):
        PretrainedMaskVLM.from_pretrained(file)
    (tmp_path / "config-fit.yaml").write_text(json.dumps({"model": {"backbone": BACKBONE, "task": spec}}))
    assert PretrainedMaskVLM.from_pretrained(file).match(IMAGES[0], "a") >= 0  # type: ignore[operator]


def test_a_checkpoint_with_other_heads_than_it_says_is_refused(tmp_path: Path) -> None:
    backbone, task, spec = toy_model("pretrain")
    content = content_of(backbone, task, spec)
    del content["state_dict"]["task.matching.classify.weight"]
    checkpoint.save(content, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="matching"):
        PretrainedMaskVLM.from_pretrained(tmp_path / "last.ckpt")


@pytest.mark.parametrize("name", ["checkpoints/fist/best.ckpt", "scene-tiny", "checkpoints/first"])
def test_a_wrong_name_lists_what_there_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskvlm.checkpoint.hub_client.hub_reachable", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "first").mkdir(parents=True)
    (tmp_path / "checkpoints" / "first" / "best.ckpt").touch()
    near = "scenes-tiny" if "scene" in name else "checkpoints/first/best.ckpt"
    with pytest.raises(UserError) as caught:
        PretrainedMaskVLM.from_pretrained(name)
    assert near in str(caught.value)


def test_a_name_on_the_hub_that_is_not_here_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskvlm.checkpoint.hub_client.hub_reachable", lambda: False)
    with pytest.raises(UserError, match="the hub cannot be reached"):
        PretrainedMaskVLM.from_pretrained("acme/no-such-model")


def test_a_name_on_the_hub_is_found_in_its_cache(folder: Path, tmp_path: Path) -> None:
    """The cache's own layout, as a download leaves it."""
    place = tmp_path / "models--acme--maskvlm-toy"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    for file in folder.iterdir():
        (place / "snapshots" / ("0" * 40) / file.name).write_bytes(file.read_bytes())
    snapshot = folder_of_hub("acme/maskvlm-toy", {"cache_dir": str(tmp_path), "local_files_only": True})
    assert snapshot.samefile(place / "snapshots" / ("0" * 40))
    other = PretrainedMaskVLM.from_pretrained("acme/maskvlm-toy", cache_dir=str(tmp_path), local_files_only=True)
    assert other.config.step == 7


@pytest.mark.parametrize(
    ("name", "settings", "expected_revision"),
    [
        ("acme/toy", {}, "main"),
        ("acme/toy", {"revision": None}, "main"),
        ("acme/toy@v1", {}, "v1"),
        ("acme/toy@v1", {"revision": None}, "v1"),
        ("acme/toy", {"revision": "v1"}, "v1"),
        ("acme/toy@v1", {"revision": "main"}, "main"),
    ],
)
def test_the_revision_of_a_name_on_the_hub(
    name: str, settings: dict[str, Any], expected_revision: str, tmp_path: Path
) -> None:
    place = tmp_path / "models--acme--toy"
    (place / "refs").mkdir(parents=True)
    for revision, commit in (("main", "0" * 40), ("v1", "1" * 40)):
        (place / "refs" / revision).write_text(commit)
        (place / "snapshots" / commit).mkdir(parents=True)
    folder = folder_of_hub(name, {"cache_dir": str(tmp_path), "local_files_only": True, **settings})
    assert folder.name == (place / "refs" / expected_revision).read_text()


def test_a_model_that_began_from_a_folder_needs_it_no_more(tmp_path: Path) -> None:
    """Of a text encoder out of a folder or the hub its shape is written out, whatever differs from the type's own."""
    backbone, task, spec = toy_model("pretrain")
    place = tmp_path / "text"
    backbone.text.model.save_pretrained(place)
    assert backbone.text.tokenizer is not None
    backbone.text.tokenizer.save_pretrained(place)
    own = json.loads(json.dumps(BACKBONE))
    own["init_args"]["text"]["init_args"] = {"name": str(place), "text_length": 24}
    own["init_args"]["image"]["init_args"]["weights"] = str(tmp_path / "vit.safetensors")
    config = {"model": {"random_init": False, "backbone": own}}
    content = {**content_of(backbone, task, spec), "model": portable_yaml(config, backbone.text.config)}
    shutil.rmtree(place)
    checkpoint.save(content, tmp_path / "last.ckpt")
    model = PretrainedMaskVLM.from_pretrained(tmp_path / "last.ckpt")
    close(model.encode_text(TEXTS), PretrainedMaskVLM.from_pretrained(tmp_path / "last.ckpt").encode_text(TEXTS))
    model.save_pretrained(tmp_path / "model")
    again = PretrainedMaskVLM.from_pretrained(tmp_path / "model")
    assert again.backbone.text.config.hidden_size == 16
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()


# ---------------------------------------------------------------------- methods of tasks


@pytest.mark.parametrize(
    ("kind", "method", "images", "settings"),
    [
        ("vqa", "answer", 1, {}),
        ("vqa", "answer", 1, {"decode": "free"}),
        ("vqa", "answer", 1, {"head": "classify"}),
        ("nlvr", "compare", 2, {}),
        ("nlvr", "compare", 3, {"images_per_example": 3}),
        ("entailment", "entail", 1, {}),
    ],
)
def test_a_task_brings_its_method(
    kind: str, method: str, images: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    backbone, task = saved(tmp_path / "last.ckpt", kind, **settings)
    model = PretrainedMaskVLM.from_pretrained(tmp_path / "last.ckpt")
    assert method in dir(model)
    columns = [IMAGES[:images], IMAGES[::-1][:images]]
    answers = getattr(model, method)(*(list(each) for each in zip(*columns, strict=True)), TEXTS[:2])
    single = getattr(model, method)(*columns[0], TEXTS[0])
    assert [*inspect.signature(getattr(model, method)).parameters][-1] == task.methods[method].text.replace(" ", "_")
    assert len(inspect.signature(getattr(model, method)).parameters) == images + 1
    assert task.methods[method].description[1:] in inspect.getdoc(getattr(model, method))  # type: ignore[operator]
    assert single.answer == answers[0].answer
    assert single.probability == pytest.approx(answers[0].probability, abs=1e-5)
    assert 0 <= single.probability <= 1
    if settings.get("decode") != "free":
        assert set(single.likeliest) == set(LABELS)
    if kind in ("nlvr", "entailment"):
        image, text = inputs(backbone, columns[0], [TEXTS[0]])
        from maskvlm.objectives.classification import encode_and_fuse

        with torch.no_grad():
            met = encode_and_fuse(backbone, image[None], text.token_CT, text.attention_CT)
            wanted = task.head(met.fused_BX).softmax(1)[0]  # type: ignore[operator]
        close([single.likeliest[label] for label in LABELS], wanted)
    with pytest.raises(UserError, match=f"{method}: 1 inputs"):
        getattr(model, method)(TEXTS[0])
    with pytest.raises(UserError, match="no head for it"):
        model.match(IMAGES[0], TEXTS[0])
    with pytest.raises(AttributeError):
        model.no_such_verb  # noqa: B018


def test_a_method_may_take_images_alone(tmp_path: Path) -> None:
    saved(tmp_path / "last.ckpt")
    model = PretrainedMaskVLM.from_pretrained(tmp_path / "last.ckpt")

    def counted(task: Any, model: Any, examples: list[tuple[Any, ...]]) -> list[tuple[int]]:
        return [(len(example),) for example in examples]

    model.task.methods = {"sides": Method(counted, 1, "", "how many parts an example has")}
    assert model.sides(IMAGES[0]) == (1,)
    assert model.sides(IMAGES[:2]) == [(1,), (1,)]
    assert [*inspect.signature(model.sides).parameters] == ["image"]
    with pytest.raises(UserError, match="sides: 2 inputs"):
        model.sides(IMAGES[0], TEXTS[0])


def test_labels_and_verbs_survive_the_folder(tmp_path: Path) -> None:
    saved(tmp_path / "last.ckpt", "vqa")
    model = PretrainedMaskVLM.from_pretrained(tmp_path / "last.ckpt")
    model.save_pretrained(tmp_path / "model")
    again = PretrainedMaskVLM.from_pretrained(tmp_path / "model")
    assert again.config.labels == list(LABELS)
    assert again.answer(IMAGES[0], TEXTS[0]) == model.answer(IMAGES[0], TEXTS[0])
    assert "3 labels" in (tmp_path / "model" / "README.md").read_text()


def test_the_processor_reads_special_tokens_in_texts_as_the_model_does(folder: Path) -> None:
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    texts = ["a [MASK] dog", "a dog [SEP] a [MASK]"]
    with pytest.warns(UnusedMask):
        token_CT = model.tokens(texts).token_CT
    assert torch.equal(processor(text=texts, return_tensors="pt", padding=True)["input_ids"], token_CT)
    assert model.backbone.text.mask_id not in token_CT


def test_an_unknown_argument_is_told_and_those_of_transformers_pass(path: Path) -> None:
    """`AutoModel` hands on what is transformers' own."""
    for wrong, right in {"devise": "device", "dtyp": "dtype", "allow_imports": "allow_import"}.items():
        with pytest.raises(UserError, match=rf"no argument {wrong} \(did you mean {right}\?\)"):
            PretrainedMaskVLM.from_pretrained(path, **{wrong: None})
    # Unlike any argument, or one of transformers' that would change the model.
    for wrong in ("foo", "quantization_config"):
        with pytest.raises(UserError, match=rf"no argument {wrong}\. .*available: device, dtype, "):
            PretrainedMaskVLM.from_pretrained(path, **{wrong: 1})
    PretrainedMaskVLM.from_pretrained(path, torch_dtype=None, subfolder="", trust_remote_code=False)


# ---------------------------------------------------------------------- what a call costs


def test_the_tokenizer_is_copied_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of one with 30,000 words takes a tenth of a second."""
    count, before = 0, Captioner.__init__

    def counted(self: Captioner, *args: Any) -> None:
        nonlocal count
        count += 1
        before(self, *args)

    model = PretrainedMaskVLM.from_pretrained(path)
    monkeypatch.setattr(Captioner, "__init__", counted)
    model.fill_mask(IMAGES[0], "a [MASK] circle on the [MASK]")
    model.score(IMAGES[0], TEXTS)
    assert count == 1


@torch.no_grad()
def test_features_are_kept_of_one_batch_alone(path: Path) -> None:
    """In a base model a photograph's take 1.8 MB. What is ranked is the same."""
    model = PretrainedMaskVLM.from_pretrained(path)
    whole, ranked = embeddings.encode(model, IMAGES, True), model.rank(TEXTS[0], IMAGES, 2)
    assert len(whole.features) == 3
    model.batch_size = 2
    parts = embeddings.encode(model, IMAGES, True)
    assert parts.features == []
    assert embeddings.encode(model, TEXTS, False).features == []
    close(parts.vector_XE, whole.vector_XE)
    for ours, theirs in zip(
        embeddings.features_of(model, parts, [2, 0]), [whole.features[2], whole.features[0]], strict=True
    ):
        close(ours, theirs)
    again: Any = model.rank(TEXTS[0], IMAGES, 2)
    assert [each.place for each in again] == [each.place for each in ranked]  # type: ignore[union-attr]
    assert [each.match for each in again] == pytest.approx([each.match for each in ranked], abs=1e-5)  # type: ignore[union-attr]


def test_a_bad_image_has_its_number_among_all(path: Path) -> None:
    model = PretrainedMaskVLM.from_pretrained(path)
    model.batch_size = 2
    images, texts = [IMAGES[0]] * 4 + [b"x"] + [IMAGES[0]] * 20, ["a [MASK]"] * 25
    # One image for all of these would have the number 1.
    for ask in (
        lambda: model.fill_mask(images, texts),
        lambda: model.score(images, texts),
        lambda: model.caption(images, lengths=[3]),
        lambda: model.explain(images, ["a red circle"] * 25, "red"),
        lambda: model.match(images, texts),
        lambda: model.rank("a circle", images),
        lambda: model.reconstruct(images, np.eye(4, dtype=bool), "a circle"),
    ):
        with pytest.raises(UserError, match=r"^image 5: "):
            ask()


@pytest.mark.parametrize("form", [np.asarray, lambda image: torch.tensor(np.asarray(image)).permute(2, 0, 1)])
def test_one_image_is_no_list_of_candidates(model: PretrainedMaskVLM, form: Any) -> None:
    """Its rows of pixels would be ranked."""
    with pytest.raises(UserError, match=r"rank: .* as candidates"):
        model.rank("a red circle", form(IMAGES[0]))
    assert len(model.rank("a red circle", np.stack([np.asarray(IMAGES[0])] * 3))) == 3  # type: ignore[arg-type]


def test_inpainting_ends_when_all_is_painted(model: PretrainedMaskVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    count, before = 0, unmask.patches

    def counted(*args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return before(*args)

    monkeypatch.setattr(unmask, "patches", counted)
    mask = np.zeros((4, 4), dtype=bool)
    mask[1, 2] = True
    model.inpaint(IMAGES[0], mask, TEXTS[0], steps=100)
    assert count == 4  # a prediction, and three to tell how certain it is


def test_a_word_that_is_not_known_is_not_explained(model: PretrainedMaskVLM) -> None:
    """All unknown words are one token."""
    with pytest.raises(UserError, match="does not know"):
        model.explain(IMAGES[0], "a \u72ac circle", "\u732b")


@pytest.mark.parametrize(("part", "named"), [("backbone", "does not fit MaskVLM"), ("heads", "does not fit")])
def test_whole_numbers_are_no_weights(path: Path, tmp_path: Path, part: str, named: str) -> None:
    content = checkpoint.load(path)
    for name, value in content["state_dict"].items():
        if value.is_floating_point() and name.startswith("task.") == (part == "heads"):
            content["state_dict"][name] = value.to(torch.int8)
    checkpoint.save(content, tmp_path / "best.ckpt")
    with pytest.raises(UserError, match=f"{named}.*of another kind of number") as caught:
        PretrainedMaskVLM.from_pretrained(tmp_path / "best.ckpt")
    assert caught.value.code == ExitCode.BAD_DATA


def test_heads_that_are_no_numbers_are_refused(path: Path, tmp_path: Path) -> None:
    content = checkpoint.load(path)
    name = next(n for n, v in content["state_dict"].items() if n.startswith("task.") and v.is_floating_point())
    content["state_dict"][name] = content["state_dict"][name] * math.nan
    checkpoint.save(content, tmp_path / "best.ckpt")
    with pytest.raises(UserError, match="not finite") as caught:
        PretrainedMaskVLM.from_pretrained(tmp_path / "best.ckpt")
    assert caught.value.code == ExitCode.BAD_DATA
