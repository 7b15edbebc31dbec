"""Checkpoints for the tests of inference: toy models with weights that matter, as a run would leave them."""

from pathlib import Path
from typing import Any

import torch
import yaml
from toy_examples import LABELS, matters
from toys import SIZE, toy_backbone

from maskvlm.checkpoint import io as checkpoint
from maskvlm.checkpoint.warm_start import LineageEntry
from maskvlm.data.scenes.source import vocabulary
from maskvlm.data.text import tokenizer_json, train_tokenizer
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.objectives.task import Task
from tasks.captioning.task import Captioning
from tasks.entailment.task import Entailment
from tasks.nlvr.task import Nlvr
from tasks.vqa.task import Vqa

ENCODER = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BACKBONE = {
    "class_path": "maskvlm.model.maskvlm.MaskVLM",
    "init_args": {
        "image": {
            "class_path": "maskvlm.model.encoders.ImageEncoder",
            "init_args": {"name": "vit_tiny_patch16_224", "image_size": SIZE, "config": ENCODER},
        },
        "text": {
            "class_path": "maskvlm.model.encoders.TextEncoder",
            "init_args": {"name": "bert", "text_length": 24, "vocab_size": 256, "config": BERT},
        },
        "cross_layers": 2,
        "cross_heads": 2,
    },
}
PRETRAINING = {
    "mask_block": 16,
    "decoder_layers": 1,
    "contrast_dim": 8,
    "rerank_k": 3,
    "contrast_reads": "class_and_mean",
}
LINEAGE_ENTRY = LineageEntry(
    "maskvlm.objectives.pretraining.MaskedPretraining",
    "maskvlm.data.scenes.source.Scenes",
    "abc",
    3,
    7,
    torch.tensor([4, 5, 9]),
)


def toy_model(kind: str, **settings: Any) -> tuple[MaskVLM, Task, dict[str, Any]]:
    """Backbone, task with heads, and the recipe of the task: `pretrain` or the name of a downstream one."""
    backbone = toy_backbone(length=24, vocab=256)
    backbone.text.tokenizer = None
    backbone.text.set_tokenizer(train_tokenizer(vocabulary() * 2, 256))  # each word of the world is one token
    task: Task
    if kind == "pretrain":
        settings = {**PRETRAINING, **settings}
        task = MaskedPretraining(**settings)
    elif kind == "captioning":
        task = Captioning(**settings)
    else:
        task = {"vqa": Vqa, "nlvr": Nlvr, "entailment": Entailment}[kind](LABELS, **settings)
    task.build(backbone)
    matters(backbone, task)
    path = f"{type(task).__module__}.{type(task).__qualname__}"
    return backbone.eval(), task.eval(), {"class_path": path, "init_args": settings}


def content_of(backbone: MaskVLM, task: Task, spec: dict[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint of them holds; without a recipe it is an older one."""
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    state |= {f"task.{name}": value for name, value in task.state_dict().items()}
    assert backbone.text.tokenizer is not None
    content: dict[str, Any] = {
        "state_dict": state,
        "tokenizer": tokenizer_json(backbone.text.tokenizer),
        "model": yaml.safe_dump({"model": {"random_init": True, "backbone": BACKBONE}}),
        "lineage": [LINEAGE_ENTRY.plain()],
        "global_step": 7,
    }
    if spec is not None:
        content["task"] = yaml.safe_dump(spec)
    if getattr(task, "labels", None) is not None:
        content["labels"] = list(task.labels)  # type: ignore[arg-type]
    return content


def saved(path: Path, kind: str = "pretrain", **settings: Any) -> tuple[MaskVLM, Task]:
    """Write a checkpoint; returns what it is of."""
    backbone, task, spec = toy_model(kind, **settings)
    checkpoint.save(content_of(backbone, task, spec), path)
    return backbone, task
