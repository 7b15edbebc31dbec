"""Where a run starts from: an earlier run's checkpoint, with its backbone, heads, tokenizer and history.

`io.py` reads and verifies the file; this module interprets its parts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from maskvlm.checkpoint import hf_folder as folder
from maskvlm.checkpoint import io as checkpoint
from maskvlm.checkpoint.content import check_content
from maskvlm.checkpoint.hub_client import folder_of_hub
from maskvlm.checkpoint.model_spec import model_spec_of
from maskvlm.config.old_names import current
from maskvlm.data.text import tokenizer_from_json
from maskvlm.utils.errors import UserError


class LineageEntry(NamedTuple):
    """Data that weights were trained on.

    Attributes:
        task, source: class paths. sha: the data's fingerprint.
        images: number of distinct images; without ids, of rows. steps: number of optimiser steps.
        ids: 63-bit hashes of the images' ids, sorted; None if the source has no ids.
        held_out: evaluation split that the data were compared with, by id and look -> number of rows left out because
            they show its images; None if there was no such split.
    """

    task: str
    source: str
    sha: str
    images: int
    steps: int
    ids: Tensor | None = None
    held_out: dict[str, int] | None = None

    def plain(self) -> dict[str, Any]:
        """The entry as stored in a checkpoint: plain types and tensors only; `images` is called "pictures" in files."""
        fields = self._asdict()
        return {"pictures" if name == "images" else name: value for name, value in fields.items()}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "LineageEntry":
        """The inverse of `plain`."""
        return cls(**{"images" if name == "pictures" else name: value for name, value in plain.items()})

    def words(self) -> dict[str, Any]:
        """The entry for display: without the ids, and without `held_out` if that is None."""
        absent = {"ids"} if self.held_out is not None else {"ids", "held_out"}
        return {name: value for name, value in self.plain().items() if name not in absent}


class Start(NamedTuple):
    """What a run takes over from a checkpoint.

    Attributes:
        path: path of the checkpoint.
        backbone, heads: tensors, by their names within the backbone and within the task.
        tokenizer: None if the checkpoint holds none.
        labels: labels that its head predicts; None before a downstream task.
        history: the data that its weights were trained on, in order.
        known_images: features of validation images (`novelty.sample_of`); None if it holds none.
        spec: class_path and init_args of its backbone; None if it does not state them.
    """

    path: str
    backbone: Mapping[str, Tensor]
    heads: Mapping[str, Tensor]
    tokenizer: PreTrainedTokenizerFast | None
    labels: tuple[str, ...] | None
    history: tuple[LineageEntry, ...]
    known_images: Tensor | None = None
    spec: Mapping[str, Any] | None = None


def read_content(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint: a file of this project, a folder written by `save_pretrained`, or one on the hub.

    Raises:
        UserError: as `checkpoint.load`, `hf_folder.read_folder` and `folder_of_hub`.
    """
    place = folder_of_hub(str(path))
    # `checkpoint.load` has already checked a file against the schema.
    return check_content(folder.read_folder(place), place) if place.is_dir() else checkpoint.load(place)


def read_start(path: str) -> Start:
    """What a run takes over from a checkpoint; raises as `read_content`."""
    content = read_content(path)
    try:
        spec = model_spec_of(content, path).backbone
    except UserError:  # such as of a backbone of another package; the tensors are all that is needed
        spec = None
    return start_of(content, path)._replace(spec=spec)


def start_of(content: Mapping[str, Any], path: str) -> Start:
    """What a run takes over from the content of a checkpoint; `path` is kept in the result, for later errors.

    Raises:
        UserError: the stored tokenizer cannot be read (65).
    """
    # `backbone.` and `task.` are the module's two parts (`lit.py`).
    state = content["state_dict"]
    tokenizer = tokenizer_from_json(content["tokenizer"]) if "tokenizer" in content else None
    labels = tuple(content["labels"]) if content.get("labels") is not None else None
    parts = part(state, "backbone."), part(state, "task.")
    return Start(path, *parts, tokenizer, labels, training_history_of(content), content.get("known_images"))


def training_history_of(content: Mapping[str, Any]) -> tuple[LineageEntry, ...]:
    """The training history in a checkpoint; an older one without it was trained on unknown data."""
    if "lineage" not in content:
        return (LineageEntry("unknown", "unknown", "", 0, content.get("global_step", 0), None),)
    # Class paths of earlier releases are mapped to today's.
    known = (LineageEntry.of(entry) for entry in content["lineage"])
    return tuple(entry._replace(task=current(entry.task), source=current(entry.source)) for entry in known)


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, with it removed."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def overlap(ids: Tensor, history: tuple[LineageEntry, ...]) -> int | None:
    """How many of these images the weights have seen; None if a part of their history has no ids."""
    if any(entry.ids is None for entry in history):
        return None
    # Without a history the weights have seen nothing.
    known = [entry.ids for entry in history if entry.ids is not None]
    return int(torch.isin(ids, torch.cat(known)).sum()) if known else 0
