"""Weights that are not on this machine: named together, at once, and never replaced by random ones."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import COMMIT, FakeHub
from safetensors.torch import load_file

from maskvlm.checkpoint import hub_client as hub
from maskvlm.checkpoint.hub_client import Unreachable
from maskvlm.checkpoint.weights import load_pretrained
from maskvlm.model.encoders import ImageEncoder, TextEncoder
from maskvlm.utils.errors import ExitCode
from tests.formats import BERT, VIT, save_bert, save_vit

VIT_NAME = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither an earlier answer about the hub nor a developer's own downloads."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.hub_reachable.cache_clear()


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client asks this hub."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


def cached(cache: Path, repository: str, commit: str = "0" * 40) -> Path:
    """An empty snapshot of a repository in the layout of the hub's cache."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def save_pickled_bert(folder: Path) -> None:
    """As `save_bert`, with weights as torch pickles them."""
    save_bert(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("offline", [True, False])
def test_unreachable_weights_are_named_together(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    image, text = ImageEncoder(VIT_NAME, 64, config=VIT), TextEncoder("roberta-base", config=BERT)
    with pytest.raises(Unreachable, match=rf"{VIT_NAME} \(timm\) and roberta-base") as caught:
        load_pretrained(image, text)
    assert caught.value.code is ExitCode.MISSING_INPUT


@pytest.mark.parametrize("save", [save_bert, save_pickled_bert])
def test_what_was_downloaded_before_needs_no_hub(
    save: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskvlm.checkpoint.hub_client.hub_reachable", lambda: pytest.fail("asked the hub"))
    image = ImageEncoder(VIT_NAME, 96, config=VIT)
    snapshot = cached(tmp_path, image.vit.pretrained_cfg["hf_hub_id"])
    save_vit(tmp_path, 64).rename(snapshot / "model.safetensors")
    save(cached(tmp_path, "some/model"))
    text = TextEncoder("some/model", 12)
    provenance = load_pretrained(image, text)
    assert provenance.tensors["image.vit.pos_embed"].was == (1, 17, 32)
    assert provenance.tensors["text.model.encoder.layer.1.output.dense.bias"].source == "some/model"
    assert len(text.tokenizer) == text.vocab_size


def test_what_is_not_on_this_machine_of_a_model_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration alone was downloaded before, by a client that keeps no list of what there is."""
    save_bert(tmp_path)
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    shutil.copy(tmp_path / "config.json", cached(tmp_path, "some/model", COMMIT))
    with FakeHub() as server:
        server.files["some/model"] = {name: (tmp_path / name).read_bytes() for name in names}
        point_to(server.address, monkeypatch)
        text = TextEncoder("some/model", 12)
        provenance = text.load_pretrained()
    assert provenance.tensors["model.encoder.layer.1.output.dense.bias"].source == "some/model"
    assert len(text.tokenizer) == text.vocab_size
