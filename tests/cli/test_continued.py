"""Pre-training that goes on from a checkpoint, on other data: it keeps the tokenizer and says what it inherited."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from maskvlm.checkpoint.io import load
from maskvlm.cli.lightning import LightningCommand, run_command

SMALL = {
    "data.steps": 2,
    "data.batch_size": 4,
    "data.eval_batch_size": 6,
    "data.source.train": 24,
    "data.source.val": 6,
    "model.task.weight_words": 0,
    "model.task.rerank_k": 2,
    "trainer.limit_val_batches": 1,
}
SHAPES = {
    "model.backbone.image.config": "{patch_size: 16, embed_dim: 32, depth: 1, num_heads: 2}",
    "model.backbone.text.config": "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 64}",
}


def options(settings: dict[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def test_a_run_from_a_checkpoint_keeps_its_words_and_names_its_origin(
    stack: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    first = ["fit", "--folder", str(tmp_path / "first"), *stack(WHERE="cpu"), *options(SMALL | SHAPES)]
    run_command(LightningCommand, first)
    origin = tmp_path / "first" / "last.ckpt"
    files = [
        word for pair in zip(*[iter(stack(WHERE="cpu"))] * 2, strict=True) if "model/" not in pair[1] for word in pair
    ]
    other = {**SMALL, "data.source.seed": 5, "model.task.weight_mim": 0}
    run_command(
        LightningCommand, ["fit", "--folder", str(tmp_path / "second"), "--from", str(origin), *files, *options(other)]
    )
    before, after = load(origin), load(tmp_path / "second" / "last.ckpt")
    assert after["tokenizer"] == before["tokenizer"]
    assert [seen["steps"] for seen in after["lineage"]] == [2, 2]
    parts = json.loads((tmp_path / "second" / "provenance.json").read_text())
    origins = {name: (told["how"], told.get("source")) for name, told in parts["tensors"].items()}
    assert set(origins.values()) == {("loaded", str(origin))}  # the heads of the losses that are left, too
    assert any(name.startswith("task.tokens") for name in origins)
    assert not any(name.startswith("task.pixels") for name in origins)
    run_command(
        LightningCommand,
        ["validate", "--folder", str(tmp_path / "third"), "--from", str(origin), *files, *options(SMALL)],
    )
    measured = json.loads((tmp_path / "third" / "metrics.json").read_text())
    assert {"retrieval/tr_r1", "mlm/accuracy_wrong_image", "mim/mse_wrong_text"} <= set(measured)
