"""What a command takes from the checkpoint that it starts from: the model, on request the task; and what it says of the
rest."""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from maskvlm.checkpoint.model_spec import ModelSpec, backbone_yaml
from maskvlm.config.compose import choices, chosen
from maskvlm.config.given_options import config_text, find_place, given_places, options
from maskvlm.config.old_names import current
from maskvlm.config.safe_yaml import read_yaml
from maskvlm.inference.rebuild import checked_spec_of, checked_task_of, pretraining_task_of, task_name
from maskvlm.utils.errors import UserError

RECIPE_FILE = re.compile(r"(?:^|/)pretrain-(\w+)\.yaml$")


@contextmanager
def with_start(arguments: list[str], allowed: Iterable[str]) -> Iterator[tuple[list[str], ModelSpec | None]]:
    """The arguments with the model of `--from CHECKPOINT` as their first file, which every other one overrides. In the
    place of `--task_from CHECKPOINT` stands its pre-training task as a file. In that of `--settings_from CHECKPOINT`
    stands what it was fine-tuned with, if that was the task of the files before: else nothing.

    Yields:
        the arguments, and what the checkpoint of --from says of itself.
    """
    starts = [option.value for option in options(arguments) if option.key == "from"]
    whole = list(arguments)
    with tempfile.TemporaryDirectory() as folder:
        start = None if not starts or starts[-1] in ("", "null") else checked_spec_of(starts[-1])
        while (at := _place_of(whole)) is not None:
            option, _, value = whole[at].partition("=")
            source, length = (value, 1) if "=" in whole[at] else (whole[at + 1], 2)
            spec = start if start is not None and source == starts[-1] else checked_spec_of(source)
            if option == "--task_from":
                model = {"task": pretraining_task_of(spec, source, allowed)}
            else:
                named = find_place("model.task.class_path", given_places(whole[1:at]))
                same = spec.task is not None and named is not None and spec.task["class_path"] == current(named.value)
                model = {"backbone": spec.backbone, "task": checked_task_of(spec, source, allowed)} if same else {}
            # JSON: a class path or a text such as "no" comes back as it was written
            file = Path(folder, f"{option.removeprefix('--')}.yaml")
            whole[at : at + length] = ["-c", _file_of(file, json.dumps({"model": model}))] if model else []
        if start is not None:
            # Of all that the checkpoint says only its backbone comes through, checked.
            whole[1:1] = ["-c", _file_of(Path(folder, "model.yaml"), backbone_yaml(start))]
        yield whole, start


def _place_of(arguments: Sequence[str]) -> int | None:
    """Index of the first `--task_from CHECKPOINT` or `--task_from=CHECKPOINT`, or `--settings_from`; None without."""
    names = ("--task_from", "--settings_from")
    places = (at for at, word in enumerate(arguments) if word.partition("=")[0] in names)
    return next((at for at in places if "=" in arguments[at] or at + 1 < len(arguments)), None)


def _file_of(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def parts_left_behind(start: ModelSpec | None, task: Namespace) -> Iterator[str]:
    """A line for each part of the pre-training that made a checkpoint which a run from it does not take over.

    Args:
        start: what the checkpoint says of itself.
        task: class_path and init_args of the run's task.
    """
    before = {} if start is None or start.task is None else start.task["init_args"]
    if start is None or start.task is None or start.task["class_path"] != task.get("class_path"):
        return
    args = task.get("init_args")
    now = args.as_dict() if args else {}
    for name in ("image_masking", "text_masking", "losses"):
        if (before.get(name) or None) != (now.get(name) or None):
            was, here = (_class_paths(arguments.get(name)) or "the default" for arguments in (before, now))
            other = f"the checkpoint's was {was}" if was != here else "the checkpoint's has other settings"
            way = "right for data of another kind; --task_from CHECKPOINT takes the checkpoint's whole task"
            yield f"model.task.{name}: {here}; {other} ({way})"


def recipe_of_another(start: ModelSpec, arguments: Sequence[str]) -> str | None:
    """A line where pre-training goes on by the recipe of another model than the checkpoint's, as it does where `model=`
    is left out: the rates of one that learns drawn scenes are far from those of pretrained encoders.

    Args:
        start: what the checkpoint says of itself.
        arguments: the subcommand, and the files and options that it is composed of.
    """
    recipe = next((match[1] for word in arguments if (match := RECIPE_FILE.search(word))), None)
    if arguments[0] != "fit" or recipe is None:
        return None
    sizes = {name: _size_in(str(chosen("model", name))) for name in choices("model")}
    own = [name for name, size in sizes.items() if size == _size_of(start.backbone)]
    # A file of the user's own may have such a name, too.
    if not own or recipe in own or recipe not in sizes:
        return None
    return f"the recipe is that of model={recipe}, the checkpoint a model={own[0]}: give model={own[0]} beside from="


def _size_in(file: str) -> tuple[str, int | None] | None:
    """The same in a model's file; None for one that says nothing of encoders, or cannot be read: nobody named it."""
    try:
        return _size_of(read_yaml(config_text(file), file)["model"]["backbone"])
    except (UserError, KeyError, TypeError, AttributeError):
        return None


def _size_of(backbone: Any) -> tuple[str, int | None]:
    """Name of the ViT, and its width where that is not the name's."""
    image = backbone["init_args"]["image"]["init_args"]
    return image["name"], (image.get("config") or {}).get("embed_dim")


def _class_paths(part: Any) -> str:
    each = part if isinstance(part, list | tuple) else [part]
    return ", ".join(str(one["class_path"]) for one in each if isinstance(one, dict) and "class_path" in one)


def check_same_task(start: ModelSpec | None, path: str, measured: str) -> None:
    """Whether a fine-tuned checkpoint is measured as what it was fine-tuned as.

    Args:
        path: of the checkpoint.
        measured: class path of the task.

    Raises:
        UserError: it is not (2).
    """
    if start is None or start.task is None or start.task["class_path"] == measured:
        return
    theirs, measured_name = (task_name(path) for path in (start.task["class_path"], measured))
    if theirs.startswith("maskvlm."):  # pre-training, which every task may begin from
        return
    raise UserError(path, f"was fine-tuned as {theirs}, not as {measured_name}", f"Name its task: evaluate {theirs}")
