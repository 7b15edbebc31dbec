"""Weights in the formats of timm and transformers, written here, loaded through the code under test.

The references are timm's own loading (`pretrained_cfg_overlay`) and `AutoModel.from_pretrained`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from maskvlm.checkpoint.provenance import Origin
from maskvlm.checkpoint.weights import load_state, read_state
from maskvlm.data.text import Captioner, train_tokenizer
from maskvlm.model.encoders import ImageEncoder, TextEncoder
from maskvlm.utils.errors import ExitCode, UserError
from tests.formats import CAPTIONS, VIT, image_encoder, make_vit, save_bert


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save_bert(folder)
    return folder


def text_features(model: nn.Module, token_BT: Tensor, attention_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_BT, attention_mask=attention_BT.long()).last_hidden_state


# ---------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("form", "size"), [("vit.safetensors", 224), ("vit.pth", 384), ("model.safetensors", 256), ("trainer.pth", 256)]
)
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


# ---------------------------------------------------------------------- what does not fit


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


def short_safetensors(path: Path) -> None:
    save_file({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])


BROKEN: list[tuple[Callable[[Path], object], ExitCode, str]] = [
    (lambda path: path.write_text("<!DOCTYPE html><html>Sign in</html>"), ExitCode.BAD_DATA, "HTML page"),
    (short_safetensors, ExitCode.BAD_DATA, "truncated or damaged"),
    (lambda path: torch.save({"a": Marker(path.parent / "ran")}, path), ExitCode.REFUSED, "run code"),
    (lambda path: torch.save([torch.zeros(2)], path), ExitCode.BAD_DATA, "not a state dict|weights cannot be read"),
]


@pytest.mark.parametrize(("spoil", "status", "words"), BROKEN)
@pytest.mark.parametrize("kind", ["image", "text"])
def test_files_that_are_no_weights(
    tmp_path: Path, bert_folder: Path, kind: str, spoil: Any, status: ExitCode, words: str
) -> None:
    if kind == "image":
        path = tmp_path / "weights.bin"
        encoder: ImageEncoder | TextEncoder = image_encoder(path)
    else:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((bert_folder / name).read_bytes())
        path = tmp_path / ("model.safetensors" if spoil is short_safetensors else "pytorch_model.bin")
        encoder = TextEncoder(str(tmp_path), 12)
    spoil(path)
    with pytest.raises(UserError, match=words) as caught:
        encoder.load_pretrained()
    assert caught.value.code is status
    assert not (tmp_path / "ran").exists()
    assert not encoder.ready


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
    for words in ("1 of another shape (0.bias", "2 missing of the model's 4 (1.weight, 1.bias)", "1 left over"):
        assert words in str(caught.value)
    with pytest.raises(UserError, match=r"not finite: 1 tensors \(0.bias\)"):
        load_state(model, state | {"0.bias": torch.tensor([torch.nan])}, "f", new=("1.",), unused=("head.",))
