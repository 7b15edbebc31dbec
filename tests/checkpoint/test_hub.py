"""Weights that are not on this machine: named together, at once, and never replaced by random ones."""

import pickle
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

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
        "Name local ones (--model.backbone.image.weights FILE, --model.backbone.text.name FOLDER), "
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


def cached(cache: Path, repository: str) -> Path:
    """An empty snapshot of a repository in the layout of the hub's cache."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
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
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
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
