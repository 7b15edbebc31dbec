"""What a checkpoint hands on to the next run, and one line for each that cannot."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from toy_examples import LABELS, Questions, bare_backbone, data_for, fit, trainer_in
from toy_pretrained import BACKBONE, PRETRAINING
from toys import PATCH, SIZE, WIDTH, toy_backbone

from maskvlm.checkpoint import io as checkpoint
from maskvlm.checkpoint.model_spec import model_spec_of
from maskvlm.checkpoint.warm_start import LineageEntry, overlap, read_content, read_start
from maskvlm.data.caption_text import stable_id
from maskvlm.data.scenes.source import Scenes
from maskvlm.data.text import tokenizer_hash
from maskvlm.model.encoders import ImageEncoder, TextEncoder
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.training.lit import LitModel
from maskvlm.utils.errors import ExitCode, UserError
from tasks.entailment.task import Entailment
from tasks.nlvr.task import Nlvr
from tasks.retrieval.task import Retrieval


def scenes() -> Scenes:
    return Scenes(train=24, val=6, test=5, size=SIZE)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two steps of pre-training on scenes."""
    path = tmp_path_factory.mktemp("pretrained") / "last.ckpt"
    backbone = bare_backbone()
    model = LitModel(backbone, MaskedPretraining(**PRETRAINING))
    model.model_yaml = yaml.safe_dump({"model": {"random_init": True, "backbone": BACKBONE}})
    fit(model, data_for(backbone, scenes()), path)
    return path


@pytest.fixture(scope="module")
def tuned(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three steps of entailment that began from it."""
    path = tmp_path_factory.mktemp("tuned") / "last.ckpt"
    backbone = bare_backbone(pretrained)
    fit(LitModel(backbone, Entailment(LABELS)), data_for(backbone, Questions(), steps=3), path)
    return path


# ---------------------------------------------------------------------- what is handed on


def test_backbone_heads_tokenizer_and_history_are_handed_on(pretrained: Path) -> None:
    content, start = checkpoint.load(pretrained), read_start(str(pretrained))
    assert {f"backbone.{name}" for name in start.backbone} | {f"task.{name}" for name in start.heads} == set(
        content["state_dict"]
    )
    assert torch.equal(start.heads["matching.classify.weight"], content["state_dict"]["task.matching.classify.weight"])
    assert start.labels is None
    ids = sorted({stable_id(name) for name in scenes().split("train").image_ids()})
    (entry,) = start.history
    assert entry.words() == {
        "task": "maskvlm.objectives.pretraining.MaskedPretraining",
        "source": "maskvlm.data.scenes.source.Scenes",
        "sha": scenes().split("train").fingerprint,
        "pictures": len(ids),
        "steps": 2,
    }
    assert entry.ids is not None
    assert entry.ids.tolist() == ids
    backbone = bare_backbone(pretrained, seed=9)  # other random weights
    for name, value in start.backbone.items():
        assert torch.equal(backbone.state_dict()[name], value), name
    assert start.tokenizer is not None
    assert tokenizer_hash(backbone.text.tokenizer) == tokenizer_hash(start.tokenizer)
    assert backbone.input_spec.tokenizer is backbone.text.tokenizer  # the data trains no other
    assert {origin.source for origin in backbone.provenance.tensors.values()} == {str(pretrained)}
    assert set(backbone.provenance.tensors) == set(backbone.state_dict())


def test_heads_that_fit_are_taken_over_and_counted(pretrained: Path, tuned: Path) -> None:
    model = LitModel(bare_backbone(tuned), Entailment(LABELS))
    heads = read_start(str(tuned)).heads
    assert model.warm_started == set(heads) == set(model.task.state_dict())
    for name, value in model.task.state_dict().items():
        assert torch.equal(value, heads[name])
    assert all(origin.how == "loaded" for origin in model.provenance.tensors.values())
    retrieval = LitModel(bare_backbone(pretrained), Retrieval(rerank_k=3))
    assert retrieval.warm_started == set(retrieval.task.state_dict())
    fresh = LitModel(bare_backbone(pretrained), Nlvr(LABELS, images_per_example=1))
    assert fresh.warm_started == set()
    assert {n for n, o in fresh.provenance.tensors.items() if o.how == "random"} == {
        f"task.{name}" for name in fresh.task.state_dict()
    }


def test_heads_that_decide_among_other_labels_are_not(tuned: Path) -> None:
    """As many labels, so the shapes would fit."""
    assert LitModel(bare_backbone(tuned), Entailment(("red", "blue", "green"))).warm_started == set()
    assert LitModel(bare_backbone(tuned), Entailment(LABELS)).warm_started != set()


# ---------------------------------------------------------------------- history


def test_overlap_counts_images_that_any_part_of_the_history_saw() -> None:
    def entry(ids: list[int] | None) -> LineageEntry:
        return LineageEntry("t", "s", "sha", 3, 1, None if ids is None else torch.tensor(ids))

    image_ids = torch.tensor([2, 3, 5, 7])
    assert overlap(image_ids, ()) == 0
    assert overlap(image_ids, (entry([1, 2]), entry([2, 7, 9]))) == 2
    assert overlap(image_ids, (entry([1, 4]),)) == 0
    assert overlap(image_ids, (entry([2]), entry(None))) is None
    assert overlap(torch.tensor([], dtype=torch.long), (entry([2]),)) == 0


class Saving(L.Callback):
    """Leaves a checkpoint of the second step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def test_a_run_that_goes_on_states_its_own_part_once(pretrained: Path, tmp_path: Path) -> None:
    half, whole = tmp_path / "half.ckpt", tmp_path / "whole.ckpt"
    for settings in ({}, {"ckpt_path": half, "weights_only": True}):
        backbone = bare_backbone(pretrained)
        model = LitModel(backbone, Entailment(LABELS))
        fit(model, data_for(backbone, Questions(), steps=5), whole, Saving(half), **settings)
        for path, steps in ((half, 2), (whole, 5)):
            history = [(entry.task.rpartition(".")[2], entry.steps) for entry in read_start(str(path)).history]
            assert history == [("MaskedPretraining", 2), ("Entailment", steps)]


# ---------------------------------------------------------------------- older checkpoints


def older(path: Path, content: dict[str, Any], config: dict[str, Any] | None = None) -> str:
    """A checkpoint file with this content, and perhaps its run's configuration beside it."""
    checkpoint.save({"state_dict": {}, **content}, path)
    if config is not None:
        path.with_name("config-fit.yaml").write_text(yaml.safe_dump(config))
    return str(path)


def test_an_older_checkpoint_takes_the_configuration_beside_it(tmp_path: Path) -> None:
    task = {
        "class_path": "maskvlm.objectives.pretraining.MaskedPretraining",
        "init_args": {"mask_block": 16, "labels": None},
    }
    config = {
        "model": {"lr": 3.0, "random_init": True, "backbone": BACKBONE, "task": task},
        "trainer": {"any": "thing"},
    }
    path = older(tmp_path / "x.ckpt", {}, config)
    spec = model_spec_of(read_content(path), path)
    args = spec.backbone["init_args"]
    assert (args["cross_layers"], args["image"]["init_args"]["name"]) == (2, "vit_tiny_patch16_224")
    assert spec.task == {
        "class_path": "maskvlm.objectives.pretraining.MaskedPretraining",
        "init_args": {"mask_block": 16},
    }


def test_an_older_checkpoint_has_seen_unknown_data(tmp_path: Path) -> None:
    start = read_start(older(tmp_path / "x.ckpt", {"global_step": 7}))
    assert (start.tokenizer, start.labels) == (None, None)
    assert [(entry.task, entry.steps, entry.ids) for entry in start.history] == [("unknown", 7, None)]
    assert overlap(torch.tensor([1]), start.history) is None


# ---------------------------------------------------------------------- measuring what cannot be measured


@pytest.mark.parametrize("fitted", [False, True])
def test_other_labels_of_the_same_number_are_refused_where_a_checkpoint_is_loaded(
    fitted: bool, tuned: Path, tmp_path: Path
) -> None:
    """All its tensors fit. Its figures would be those of other words."""
    names = ("red", "blue", "green")
    model, trainer = LitModel(bare_backbone(tuned), Entailment(names)), trainer_in(tmp_path)
    data = data_for(model.backbone, Questions(names=names))
    with pytest.raises(UserError) as caught:
        (trainer.fit if fitted else trainer.validate)(model, data, ckpt_path=str(tuned), weights_only=True)
    assert "label 2 is 'green' in the checkpoint and 'blue' in the data" in caught.value.what
    assert caught.value.code == ExitCode.BAD_DATA


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ({}, ""),
        ({"cross_heads": 4}, "cross_heads 4 instead of 2"),
        ({"normalisation": "clip"}, "normalisation clip instead of model"),
        ({"image_heads": 4}, "heads of the image encoder 4 instead of 2"),
        ({"text_heads": 4}, "heads of the text encoder 4 instead of 2"),
    ],
)
def test_settings_that_no_tensor_tells_are_compared(
    pretrained: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], other: str
) -> None:
    """All of these load every tensor, and compute something else."""
    vit = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": 1, "num_heads": change.get("image_heads", 2)}
    bert = {
        "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": change.get("text_heads", 2),
        "intermediate_size": 2 * WIDTH,
    }  # fmt: skip
    image = ImageEncoder(
        "vit_tiny_patch16_224", SIZE, random_init=True, config=vit, normalisation=change.get("normalisation", "model")
    )
    text = TextEncoder("bert", 24, random_init=True, vocab_size=150, config=bert)
    MaskVLM(image, text, cross_layers=2, cross_heads=change.get("cross_heads", 2), start=str(pretrained))
    warned = [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]
    assert [other in line for line in warned] == ([True] if other else [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 32}, r"last.ckpt: does not fit MaskVLM: \d+ of another shape \("),
        ({"vocab": 90}, r"last.ckpt: tokenizer: 150 entries, but the model has rows for 90"),
        ({"vocab": 180}, r"last.ckpt: does not fit .* of another shape \(text.model.embeddings.word_embeddings.weight"),
    ],
)
def test_another_model_is_one_line(pretrained: Path, settings: dict[str, int], message: str) -> None:
    whole = {"length": 24, "vocab": 150, **settings}
    with pytest.raises(UserError, match=message) as caught:
        toy_backbone(start=str(pretrained), **whole)
    assert caught.value.code == ExitCode.BAD_DATA
