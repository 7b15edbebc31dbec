"""Names of earlier versions, of classes and of options: checkpoints, hub folders, indices, YAML files and commands that
say them keep working."""

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
"""Where an option is -> its name in an earlier version -> its name now."""
CLASSES = {"maskvlm.model.encoders.ImageEncoder": "model.backbone.image", "maskvlm.data.module.PairData": "data"}
"""Classes beside tasks that stand alone in files, and where their options are."""


def current(path: str) -> str:
    """The class path by which a class is known now; any other text as it is."""
    module, _, name = path.rpartition(".")
    # the module must fit whole: `maskvlm.model` is an old one, `maskvlm.model.heads` is not
    return f"{MOVED[module]}.{name}" if module in MOVED else path


def current_key(key: str) -> str:
    """A dotted key as it is now: `model.task.init_args.text_draws` -> `model.task.init_args.masks_per_text`."""
    parent, _, last = key.rpartition(".")
    # `init_args` stands between the keys where a class is named, and tells nothing
    place = ".".join(part for part in parent.split(".") if part != "init_args")
    new = OPTIONS.get(place, {}).get(last, last)
    return f"{parent}.{new}" if parent else new


def renamed(value: Any, place: str = "") -> Any:
    """Plain values with every class path and every option in them as it is now.

    Args:
        place: the dotted key under which they stand; "" for a whole file, or for a class that stands alone.
    """
    if isinstance(value, list):
        return [renamed(part, place) for part in value]
    if not isinstance(value, dict):
        return value
    path = value.get("class_path")
    if isinstance(path, str):
        # a copy: the caller's value stays as it is
        value = {**value, "class_path": current(path)}
        # a class below a key has its options under that key
        place = place or _place_of(value["class_path"])
    # keys of a file may be numbers, too
    inside = f"{place}." if place else ""
    keys = {key: current_key(inside + key).removeprefix(inside) if isinstance(key, str) else key for key in value}
    return {
        # what `init_args` holds are options of the same place
        keys[key]: renamed(part, place if key == "init_args" else f"{place}.{key}".strip("."))
        for key, part in value.items()
    }


def _place_of(path: str) -> str:
    """Where the options of a class are that stands alone. Checkpoints have tasks so, of any package."""
    return CLASSES.get(path, "model.task")
