"""What a checkpoint is made of beside its tensors: the backbone's and the task's classes with their settings, as plain
data, and the way back from them to modules.

A recipe out of a checkpoint names classes; as in configuration files only those of trusted packages are imported.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from maskvlm.errors import ExitCode, UserError
from maskvlm.huggingface import is_type
from maskvlm.model import MaskVLM
from maskvlm.parser import Complaint, Parser, prepare
from maskvlm.start import Start, model_yaml
from maskvlm.task import Task
from maskvlm.verify import first_line

NOT_KEPT = {"model_type", "transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype"}
"""Of a Hugging Face configuration: what names its origin, not its shape."""


class Recipe(NamedTuple):
    """class_path and init_args of both; task is None where a checkpoint does not tell it."""

    backbone: dict[str, Any]
    task: dict[str, Any] | None


def recipe_of(content: Mapping[str, Any], path: str | Path) -> Recipe:
    """The recipe in a checkpoint's content, or in the `config-fit.yaml` beside an older one.

    Raises:
        UserError: neither says which model it is (66).
    """
    told = {key: yaml.safe_load(content[key]) for key in ("model", "task") if key in content}
    beside = Path(path).parent / "config-fit.yaml"
    if "task" not in told and beside.is_file():
        whole = yaml.safe_load(beside.read_text(encoding="utf-8"))["model"]
        return Recipe(whole["backbone"], whole["task"])
    if "model" not in told:
        what = f"does not say which model it is, and there is no {beside.name} beside it"
        raise UserError(path, what, "Put that file of its run beside it", ExitCode.MISSING_INPUT)
    return Recipe(told["model"]["model"]["backbone"], told.get("task"))


def portable(recipe: Recipe, text_config: Any) -> Recipe:
    """The same recipe without names of folders or hub models: with the shape of the text encoder written out.

    Args:
        text_config: the text encoder's Hugging Face configuration.
    """
    whole = without_weights(recipe)
    text = whole.backbone["init_args"]["text"]
    text["init_args"] |= {"tokenizer": None}
    if not is_type(text["init_args"].get("name", "")):
        known = type(text_config)().to_dict().keys() - NOT_KEPT
        shape = {key: value for key, value in text_config.to_dict().items() if key in known}
        text["init_args"] |= {"name": text_config.model_type, "config": shape, "vocab_size": None}
    return whole


def portable_yaml(config: Mapping[str, Any], text_config: Any) -> str:
    """`model_yaml` of a composed configuration, without names that mean nothing on another machine."""
    written = yaml.safe_load(model_yaml(config))
    backbone = written["model"]["backbone"]
    if is_type(backbone["init_args"]["text"]["init_args"].get("name", "")):
        return model_yaml(config)
    whole = portable(Recipe(backbone, None), text_config).backbone
    return yaml.safe_dump({"model": {"random_init": True, "backbone": whole}}, sort_keys=False)


def build(recipe: Recipe, origin: Start, allowed: Iterable[str] = ()) -> tuple[MaskVLM, Task]:
    """Modules with the weights, tokenizer and heads of a checkpoint, in evaluation mode.

    Args:
        recipe: of the checkpoint.
        origin: its tensors.
        allowed: packages beside this project's that its classes may come from.

    Raises:
        UserError: a class that may not be imported (77) or does not take these settings, weights that do not fit, or
            heads that are missing (65).
    """
    backbone, task = instantiate(without_weights(recipe), origin, allowed)
    backbone.take_over(origin)
    task.build(backbone)
    found = task.inherit(origin.heads)
    missing = [name for name in task.state_dict() if name not in found]
    if missing:
        what = f"holds no {missing[0]}" + (f" and {len(missing) - 1} other tensors" if len(missing) > 1 else "")
        todo = f"Give a checkpoint that {type(task).__name__} wrote"
        raise UserError(origin.path, f"{what} of {type(task).__name__}", todo, ExitCode.BAD_DATA)
    return backbone.eval(), task.eval()


def without_weights(recipe: Recipe) -> Recipe:
    """A copy for one whose tensors a checkpoint brings, so that no encoder looks for its own."""
    args = dict(recipe.backbone["init_args"])
    for name in ("image", "text"):
        args[name] = {**args[name], "init_args": {**args[name]["init_args"], "random_init": True}}
    args["image"]["init_args"]["weights"] = None
    return recipe._replace(backbone={**recipe.backbone, "init_args": {**args, "start": None}})


def instantiate(recipe: Recipe, origin: Start, allowed: Iterable[str]) -> tuple[MaskVLM, Task]:
    """Both with random weights; raises as `build`."""
    if recipe.task is None:
        what = "does not say which task it was trained for"
        raise UserError(origin.path, what, "Put the config-fit.yaml of its run beside it", ExitCode.MISSING_INPUT)
    prepare([], allowed)
    parser = Parser(exit_on_error=False)
    parser.add_subclass_arguments(MaskVLM, "backbone")
    parser.add_subclass_arguments(Task, "task")
    task = {**recipe.task, "init_args": dict(recipe.task.get("init_args") or {})}
    if origin.labels is not None:
        task["init_args"]["labels"] = list(origin.labels)
    try:
        made = parser.instantiate_classes(parser.parse_object({"backbone": recipe.backbone, "task": task}))
    except UserError:
        raise
    except Complaint as error:
        denied = "is not allowed" in error.message
        what = f"cannot be built ({first_line(Exception(' '.join(error.message.split())))})"
        todo = "Allow its package if you trust it (--allow-import)" if denied else "Take the version that wrote it"
        raise UserError(origin.path, what, todo, ExitCode.REFUSED if denied else ExitCode.BAD_DATA) from None
    return made.backbone, made.task
