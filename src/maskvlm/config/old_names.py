"""Names of classes and options in earlier versions, so that checkpoints, hub folders, indices, YAML files and commands
that use them keep working."""

from typing import Any

MOVED = {
    "maskvlm.checkpoint": "maskvlm.training.checkpoint_io",
    "maskvlm.checkpoint.io": "maskvlm.training.checkpoint_io",
    "maskvlm.classification": "maskvlm.objectives.classification",
    "maskvlm.data.prepared": "maskvlm.data.prepared.source",
    "maskvlm.data.scene_examples": "maskvlm.data.scenes.examples",
    "maskvlm.data.scenes": "maskvlm.data.scenes.source",
    "maskvlm.data.streaming": "maskvlm.data.streaming.source",
    "maskvlm.encoders": "maskvlm.model.encoders",
    "maskvlm.guard": "maskvlm.training.step_guard",
    "maskvlm.model": "maskvlm.model.maskvlm",
    "maskvlm.predictions": "maskvlm.reporting.predictions",
    "maskvlm.pretrain": "maskvlm.objectives.pretraining",
    "maskvlm.progress": "maskvlm.reporting.progress",
    "maskvlm.report": "maskvlm.reporting.callbacks",
    "maskvlm.resume": "maskvlm.training.checkpointing",
    "maskvlm.run": "maskvlm.training.run_record",
    "maskvlm.runlog": "maskvlm.training.csv_log",
    "maskvlm.task": "maskvlm.objectives.task",
    "maskvlm.training.resume": "maskvlm.training.checkpointing",
    "maskvlm.training.watch": "maskvlm.training.process_watch",
    "maskvlm.watch": "maskvlm.training.process_watch",
}
"""Module of an earlier version -> where its classes are now."""


OPTIONS = {
    "model.task": {
        "text_draws": "masks_per_text",
        "image_draws": "masked_image_share",
        "image_mask_all": "fully_masked_share",
        "whole_image_share": "fully_masked_share",
        "blind": "image_ablation",
        "pictures": "images_per_example",
    },
    "model.backbone.image": {"kept_features": "feature_cache"},
    "data": {"leaks": "contamination"},
}
"""Parent key of an option -> its name in an earlier version -> its current name."""
CLASSES = {"maskvlm.model.encoders.ImageEncoder": "model.backbone.image", "maskvlm.data.module.PairData": "data"}
"""Classes other than tasks that appear on their own in files, and the parent key of their options."""


def current(path: str) -> str:
    """The current path of a class; any other text is returned as is."""
    module, _, name = path.rpartition(".")
    # the whole module must match: `maskvlm.model` is an old name, `maskvlm.model.heads` is not
    return f"{MOVED[module]}.{name}" if module in MOVED else path


def current_key(key: str) -> str:
    """The current form of a dotted key: `model.task.init_args.text_draws` -> `model.task.init_args.masks_per_text`."""
    parent, _, last = key.rpartition(".")
    # `init_args` only separates the keys of a named class
    place = ".".join(part for part in parent.split(".") if part != "init_args")
    new = OPTIONS.get(place, {}).get(last, last)
    return f"{parent}.{new}" if parent else new


def renamed(value: Any, place: str = "") -> Any:
    """Plain values, with every class path and option in them under its current name.

    Args:
        place: the dotted key of these values; "" for a whole file, or for a class on its own.
    """
    if isinstance(value, list):
        return [renamed(part, place) for part in value]
    if not isinstance(value, dict):
        return value
    path = value.get("class_path")
    if isinstance(path, str):
        # a copy, so that the caller's value is not changed
        value = {**value, "class_path": current(path)}
        # a class below a key has its options under that key
        place = place or _place_of(value["class_path"])
    # keys of a file may also be numbers
    inside = f"{place}." if place else ""
    keys = {key: current_key(inside + key).removeprefix(inside) if isinstance(key, str) else key for key in value}
    return {
        # the content of `init_args` are options of the same place
        keys[key]: renamed(part, place if key == "init_args" else f"{place}.{key}".strip("."))
        for key, part in value.items()
    }


def _place_of(path: str) -> str:
    """Parent key of the options of a class on its own. Checkpoints store tasks this way, from any package."""
    return CLASSES.get(path, "model.task")
