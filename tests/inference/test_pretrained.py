"""The model for its users: what it answers equals the training code's forward, wherever it was loaded from."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_examples import LABELS
from toy_pretrained import BACKBONE, LINEAGE_ENTRY, content_of, saved, toy_model
from toys import SIZE, toy_batch
from transformers import AutoModel, AutoProcessor

import maskvlm
from maskvlm.checkpoint import io as checkpoint
from maskvlm.data.text import Captioner, tokenizer_hash
from maskvlm.data.transforms import eval_transform
from maskvlm.inference import infill as unmask
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.masking import PatchMask
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


def test_explain_gives_shares_of_the_patches_and_an_image_of_the_same_size(model: PretrainedMaskVLM) -> None:
    explanation = model.explain(IMAGES[0], TEXTS[0], "circle")
    assert explanation.attention.shape == explanation.gradcam.shape == (4, 4)
    assert explanation.attention.sum() == pytest.approx(1, abs=1e-5)
    assert explanation.gradcam.min() >= 0
    assert explanation.gradcam.sum() == pytest.approx(1, abs=1e-5) or explanation.gradcam.sum() == 0
    assert explanation.image.size == IMAGES[0].size
    assert not np.array_equal(np.asarray(explanation.image), np.asarray(IMAGES[0]))


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
    close(model.encode_image(IMAGES), torch.stack([model.encode_image(each) for each in IMAGES]))
    close(model.encode_text(TEXTS), torch.stack([model.encode_text(each) for each in TEXTS]))
    close(model.match(IMAGES, TEXTS), torch.tensor([model.match(p, t) for p, t in zip(IMAGES, TEXTS, strict=True)]))
    close(model.match(IMAGES[0], TEXTS), torch.tensor([model.match(IMAGES[0], text) for text in TEXTS]))
    close(model.score(IMAGES, TEXTS), torch.tensor([model.score(p, t) for p, t in zip(IMAGES, TEXTS, strict=True)]))
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
    model.batch_size = 64


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


def test_ranking_by_both_where_the_task_does(model: PretrainedMaskVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of the log-odds of a match and of contrast's logit."""
    monkeypatch.setattr(model.task, "rerank_contrast", 1.0)
    ranking: Any = model.rank(IMAGES[0], TEXTS, k=3)
    cosine_C = model.encode_text(TEXTS) @ model.encode_image(IMAGES[0])
    match_C = torch.tensor([model.match(IMAGES[0], text) for text in TEXTS])
    score_C = match_C.logit() + model.task.projection.logit_scale.item() * cosine_C
    assert [one.place for one in ranking] == score_C.argsort(descending=True).tolist()
    for one in ranking:
        assert one.match == pytest.approx(float(match_C[one.place]), abs=1e-5)


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
    bits = array > 128  # true is white
    close(model.encode_image(bits), model.encode_image((bits * 255).astype(np.uint8)))
    close(model.encode_image(array[..., 0]), model.encode_image(Image.fromarray(array[..., 0])))


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
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors", ".md"}  # no pickle
    assert model.match(IMAGES, TEXTS) == again.match(IMAGES, TEXTS)
    assert tokenizer_hash(again.words.tokenizer) == tokenizer_hash(model.words.tokenizer)
    (entry,) = again.origin.history
    assert entry[:5] == LINEAGE_ENTRY[:5]
    assert entry.ids is not None
    assert entry.ids.tolist() == [4, 5, 9]


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


def test_a_folder_or_file_of_another_kind_is_one_line(folder: Path, tmp_path: Path) -> None:
    def refused(place: Path, message: str, code: ExitCode) -> None:
        with pytest.raises(UserError, match=message) as caught:
            PretrainedMaskVLM.from_pretrained(place)
        assert caught.value.code == code
        assert "\n" not in str(caught.value)

    refused(tmp_path, "without config.json", ExitCode.MISSING_INPUT)
    refused(tmp_path / "absent.ckpt", "not there", ExitCode.MISSING_INPUT)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    refused(tmp_path, "expected maskvlm, found 'clip'", ExitCode.BAD_DATA)
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(folder / name, tmp_path)
    evil = json.loads((folder / "config.json").read_text())
    evil["task"]["class_path"] = "subprocess.Popen"
    (tmp_path / "config.json").write_text(json.dumps(evil))
    refused(tmp_path, "is not a task of this project", ExitCode.REFUSED)


def test_a_checkpoint_without_a_task_needs_the_configuration_of_its_run(tmp_path: Path) -> None:
    backbone, task, spec = toy_model("pretrain")
    file = tmp_path / "last.ckpt"
    checkpoint.save(content_of(backbone, task, None), file)
    with pytest.raises(UserError, match="which task"):
        PretrainedMaskVLM.from_pretrained(file)
    (tmp_path / "config-fit.yaml").write_text(json.dumps({"model": {"backbone": BACKBONE, "task": spec}}))
    assert PretrainedMaskVLM.from_pretrained(file).match(IMAGES[0], "a") >= 0  # type: ignore[operator]


def test_from_pretrained_takes_device_and_precision(path: Path) -> None:
    half = PretrainedMaskVLM.from_pretrained(path, device="cpu", dtype="bfloat16")
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    full = PretrainedMaskVLM.from_pretrained(path)
    assert half.encode_image(IMAGES[0]).dtype == half.encode_text(TEXTS).dtype == torch.float32
    assert float(half.encode_image(IMAGES[0]) @ full.encode_image(IMAGES[0])) > 0.98
    assert isinstance(half.score(IMAGES[0], TEXTS[0]), float)
    for settings in ({"device": "nonsense"}, {"dtype": "int8"}, {"devise": "cpu"}):
        with pytest.raises(UserError, match=next(iter(settings))):
            PretrainedMaskVLM.from_pretrained(path, **settings)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- methods of tasks


@pytest.mark.parametrize(
    ("kind", "method", "images", "settings"),
    [
        ("vqa", "answer", 1, {}),
        ("vqa", "answer", 1, {"decode": "free"}),
        ("vqa", "answer", 1, {"head": "classify"}),
        ("nlvr", "compare", 2, {}),
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
    assert len(inspect.signature(getattr(model, method)).parameters) == images + 1
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
    with pytest.raises(UserError, match="no head for it"):
        model.match(IMAGES[0], TEXTS[0])
    with pytest.raises(AttributeError):
        model.no_such_verb  # noqa: B018
