"""Pre-training that goes on from a checkpoint, on other data: it keeps the tokenizer and says what it inherited."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_examples import LABELS, Questions, bare_backbone, data_for, fit
from toy_pretrained import LINEAGE_ENTRY
from toys import SIZE

from maskvlm.checkpoint.io import load
from maskvlm.checkpoint.model_spec import ModelSpec
from maskvlm.cli.commands import COMMANDS
from maskvlm.cli.from_checkpoint import measured_on_scenes, recipe_of_another
from maskvlm.cli.lightning import LightningCommand, Parsed, run_command
from maskvlm.config.compose import PRETRAINING, pretraining, read_words
from maskvlm.data.scenes.source import Scenes
from maskvlm.data.streaming.source import Stream
from maskvlm.training.lit import LitModel
from tasks.vqa.task import Vqa

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
    assert [entry["steps"] for entry in after["lineage"]] == [2, 2]
    parts = json.loads((tmp_path / "second" / "provenance.json").read_text())
    origins = {name: (record["how"], record.get("source")) for name, record in parts["tensors"].items()}
    assert set(origins.values()) == {("loaded", str(origin))}  # the heads of the losses that are left, too
    assert any(name.startswith("task.tokens") for name in origins)
    assert not any(name.startswith("task.pixels") for name in origins)
    run_command(
        LightningCommand,
        ["validate", "--folder", str(tmp_path / "third"), "--from", str(origin), *files, *options(SMALL)],
    )
    measured = json.loads((tmp_path / "third" / "metrics.json").read_text())
    assert {"retrieval/tr_r1", "mlm/accuracy_wrong_image", "mim/mse_wrong_text"} <= set(measured)


def test_other_data_than_those_of_the_weights_are_told_where_they_are_the_default(tmp_path: Path) -> None:
    photographs = LINEAGE_ENTRY._replace(source="maskvlm.data.prepared.source.Prepared")
    for history, warned in (
        ((LINEAGE_ENTRY, photographs), True),
        ((photographs, LINEAGE_ENTRY), False),
        ((LINEAGE_ENTRY._replace(source="unknown"),), False),
        ((), False),
    ):
        line = measured_on_scenes(history, Scenes())
        assert (line is not None) == warned
        # Any other data was named.
        assert measured_on_scenes(history, Stream("x", "y")) is None
    line = measured_on_scenes((photographs,), Scenes())
    assert line is not None
    assert line.startswith(
        "this measures drawn scenes, and the weights were last trained on other data (maskvlm.data.pre"
    )


def test_another_models_recipe_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without model= it is tiny's, whatever the checkpoint is."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])

    def checkpoint(name: str, width: int | None = None) -> ModelSpec:
        image = {"name": name, "config": None if width is None else {"embed_dim": width}}
        return ModelSpec({"init_args": {"image": {"init_args": image}}}, None)

    def line(start: ModelSpec, *words: str, command: str = "pretrain") -> str | None:
        composed = pretraining(read_words(command, ["from=x.ckpt", *words], PRETRAINING))
        return recipe_of_another(start, ["fit" if command == "pretrain" else "validate", *composed])

    dino = checkpoint("vit_small_patch14_dinov2.lvd142m")
    hint = line(dino)
    assert hint == "the recipe is for model=tiny, but the checkpoint is model=compact: add model=compact to the command"
    assert line(dino, "model=compact") is None
    assert line(dino, command="evaluate") is None
    assert line(dino, "recipe=ours") is None
    assert line(checkpoint("vit_tiny_patch16_224", 96)) is None
    assert "is model=small:" in (line(checkpoint("vit_tiny_patch16_224", 128)) or "")
    # Files of the user's own: a recipe of such a name, and a model that says nothing of encoders.
    assert recipe_of_another(dino, ["fit", "-c", "mine/pretrain-mine.yaml"]) is None
    monkeypatch.setattr("maskvlm.cli.from_checkpoint.chosen", lambda kind, name: Path("conf/base.yaml"))
    assert line(dino) is None
    # One of nobody's has no recipe that could be named.
    assert line(checkpoint("vit_tiny_patch16_224", 64)) is None


def model_of(*words: str) -> Any:
    """The composed model of a command."""
    return run_command(Parsed, COMMANDS[words[0]].full(["where=cpu", "run=x", *words[1:]])).settings.model


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of VQA with other settings than the tasks' files have."""
    backbone, path = bare_backbone(), tmp_path_factory.mktemp("tuned") / "vqa.ckpt"
    task = Vqa(LABELS, head="classify", hidden=8, image_ablation=True)
    fit(LitModel(backbone, task, warmup=1), data_for(backbone, Questions()), path)
    return path


def test_a_fine_tuned_checkpoint_is_measured_at_its_own_image_size(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tasks' files say 384 for trainings."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    start, file = f"from={tuned}", tmp_path / "mine.yaml"
    file.write_text("model: {backbone: {init_args: {image: {init_args: {image_size: 48}}}}}")

    def size(*words: str) -> int:
        whole: int = model_of(*words).backbone.init_args.image.init_args.image_size
        return whole

    assert size("evaluate", "vqa", "data=vqav2", start) == SIZE
    assert size("evaluate", "vqa", "data=vqav2", start, "--model.backbone.image.image_size=64") == 64
    assert size("evaluate", "vqa", "data=vqav2", start, "-c", str(file)) == 48
    assert size("finetune", "vqa", "data=vqav2", start) == 384
    # What was learned at another task is measured as that task's file says.
    assert size("evaluate", "retrieval", "data=coco", start) == 384


def test_a_fine_tuned_checkpoint_is_measured_with_the_settings_of_its_task(
    tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's come before them, what is typed after."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])

    def settings(*words: str) -> tuple[str, int | None, bool]:
        args = model_of(words[0], "vqa", "data=vqav2", f"from={tuned}", *words[1:]).task.init_args
        return args.head, args.hidden, args.image_ablation

    assert settings("evaluate") == ("classify", 8, True)
    assert settings("evaluate", "--model.task.image_ablation=false") == ("classify", 8, False)
    assert settings("finetune") == ("generate", None, False)
