"""Class paths of earlier versions: checkpoints, hub folders, indices and YAML files that name them keep working."""

from typing import Any

MOVED = {
    "maskvlm.checkpoint": "maskvlm.checkpoint.io",
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
    "maskvlm.resume": "maskvlm.training.resume",
    "maskvlm.run": "maskvlm.training.run_record",
    "maskvlm.runlog": "maskvlm.training.csv_log",
    "maskvlm.task": "maskvlm.objectives.task",
    "maskvlm.watch": "maskvlm.training.watch",
}
"""Module of an earlier version -> where its classes are now."""


def current(path: str) -> str:
    """The class path by which a class is known now; any other text as it is."""
    module, _, name = path.rpartition(".")
    return f"{MOVED[module]}.{name}" if module in MOVED else path


def renamed(value: Any) -> Any:
    """Plain values with every `class_path` in them as it is now."""
    if isinstance(value, dict):
        return {
            key: current(part) if key == "class_path" and isinstance(part, str) else renamed(part)
            for key, part in value.items()
        }
    return [renamed(part) for part in value] if isinstance(value, list) else value
