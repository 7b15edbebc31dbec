"""Weights that are not on this machine: named together, at once, and never replaced by random ones."""

import pickle
import shutil
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from fake_hub import COMMIT, FakeHub
from safetensors.torch import load_file

from maskvlm.checkpoint import hub_client as hub
from maskvlm.checkpoint.hub_client import Unreachable
from maskvlm.checkpoint.weights import load_pretrained
from maskvlm.model.encoders import ImageEncoder, TextEncoder
from maskvlm.utils.errors import ExitCode, UserError
from tests.formats import BERT, VIT, image_encoder, save_bert, save_vit


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither an earlier answer about the hub nor a developer's own downloads."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub.hub_reachable.cache_clear()


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("offline", [True, False])
def test_unreachable_weights_are_named_together(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    image = ImageEncoder("vit_base_patch16_224", 64, config=VIT)
    text = TextEncoder("roberta-base", config=BERT)
    start = time.monotonic()
    with pytest.raises(Unreachable) as caught:
        load_pretrained(image, text)
    assert time.monotonic() - start < 5
    assert str(caught.value) == (
        "model.backbone: no weights for vit_base_patch16_224 (timm) and roberta-base (Hugging Face): "
        "not on this machine, and the hub cannot be reached. "
        "Name local ones (encoders=FOLDER, or --model.backbone.image.weights FILE and "
        "--model.backbone.text.name FOLDER), "
        "or start from random ones with --model.random_init true."
    )
    assert caught.value.code is ExitCode.MISSING_INPUT
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.usefixtures("no_cache")
def test_only_what_is_missing_is_named(tmp_path: Path) -> None:
    save_bert(tmp_path)
    image, text = image_encoder(save_vit(tmp_path)), TextEncoder("roberta-base", config=BERT)
    with pytest.raises(Unreachable, match="no weights for roberta-base"):
        load_pretrained(image, text)
    text = TextEncoder(str(tmp_path), 12)
    with pytest.raises(Unreachable, match=r"no weights for vit_tiny_patch16_224 \(timm\): not"):
        load_pretrained(ImageEncoder("vit_tiny_patch16_224", 64, config=VIT), text)


@pytest.mark.usefixtures("no_cache")
def test_random_weights_need_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("maskvlm.checkpoint.hub_client.from_cache_or_hub", refuse)
    monkeypatch.setattr("maskvlm.checkpoint.text_files.from_cache_or_hub", refuse)
    image = ImageEncoder("vit_base_patch16_224", 64, random_init=True, config=VIT)
    text = TextEncoder("roberta-base", random_init=True, config=BERT)
    assert load_pretrained(image, text).tensors == {}


def cached(cache: Path, repository: str, commit: str = "0" * 40) -> Path:
    """An empty snapshot of a repository in the layout of the hub's cache."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.mark.usefixtures("no_cache")
def test_what_was_downloaded_before_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("maskvlm.checkpoint.hub_client.hub_reachable", lambda: pytest.fail("asked the hub"))
    image = ImageEncoder("vit_tiny_patch16_224", 96, config=VIT)
    snapshot = cached(tmp_path, image.vit.pretrained_cfg["hf_hub_id"])
    save_vit(tmp_path, 64).rename(snapshot / "model.safetensors")
    save_bert(cached(tmp_path, "some/model"))
    text = TextEncoder("some/model", 12)
    provenance = load_pretrained(image, text)
    assert provenance.tensors["image.vit.pos_embed"].was == (1, 17, 32)
    assert provenance.tensors["text.model.encoder.layer.1.output.dense.bias"].source == "some/model"
    assert len(text.tokenizer) == text.vocab_size


def save_pickled_bert(folder: Path) -> None:
    """As `save_bert`, with weights as torch pickles them."""
    save_bert(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.usefixtures("no_cache")
def test_pickled_weights_that_were_downloaded_before_need_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskvlm.checkpoint.hub_client.hub_reachable", lambda: pytest.fail("asked the hub"))
    save_pickled_bert(cached(tmp_path, "some/model"))
    assert TextEncoder("some/model", 12).load_pretrained().tensors


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("save", [save_bert, save_pickled_bert])
def test_what_is_not_on_this_machine_of_a_model_is_fetched(
    save: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration alone was downloaded before, by a client that keeps no list of what there is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    save(tmp_path)
    names = ("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json")
    shutil.copy(tmp_path / "config.json", cached(tmp_path, "some/model", COMMIT))
    with FakeHub() as server:
        server.files["some/model"] = {n: (tmp_path / n).read_bytes() for n in names if (tmp_path / n).is_file()}
        point_to(server.address, monkeypatch)
        text = TextEncoder("some/model", 12)
        provenance = text.load_pretrained()
    assert provenance.tensors["model.encoder.layer.1.output.dense.bias"].source == "some/model"
    assert len(text.tokenizer) == text.vocab_size


@pytest.mark.usefixtures("no_cache")
def test_a_model_without_weights_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    save_bert(tmp_path)
    with FakeHub() as server:
        server.files["some/model"] = {"config.json": (tmp_path / "config.json").read_bytes()}
        point_to(server.address, monkeypatch)
        with pytest.raises(
            UserError, match=r"some/model \(Hugging Face\) cannot be used \(some/model holds none of \*"
        ):
            TextEncoder("some/model", 12).load_pretrained()


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client asks this hub."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


class Hub(BaseHTTPRequestHandler):
    """A hub that knows no repository."""

    def do_HEAD(self) -> None:
        self.send_response(200 if self.path == "/" else 404)
        if self.path != "/":
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.usefixtures("no_cache")
def test_a_name_that_the_hub_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    point_to(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    try:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(Unreachable):  # whoever sets it does not want the hub to be asked
            TextEncoder("some/model")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        hub.hub_reachable.cache_clear()
        with pytest.raises(UserError, match=r"the hub has no some/model \(Hugging Face\)"):
            TextEncoder("some/model")
        with pytest.raises(UserError, match=r"the hub has no vit_tiny_patch16_224 \(timm\)"):
            ImageEncoder("vit_tiny_patch16_224", 64, config=VIT).load_pretrained()
    finally:
        server.shutdown()
        server.server_close()
