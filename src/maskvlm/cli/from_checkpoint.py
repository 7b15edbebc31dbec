"""What a command takes from the checkpoint that it starts from: the model and, on request, the task; and its warnings
about the rest."""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from maskvlm.checkpoint.model_spec import ModelSpec, backbone_yaml
from maskvlm.checkpoint.warm_start import LineageEntry
from maskvlm.config.compose import choices, chosen
from maskvlm.config.given_options import config_text, find_place, given_places, options
from maskvlm.config.old_names import current
from maskvlm.config.safe_yaml import read_yaml
from maskvlm.inference.model_card import DRAWN, UNKNOWN
from maskvlm.inference.rebuild import checked_spec_of, checked_task_of, pretraining_task_of, task_name
from maskvlm.training.lit import class_path
from maskvlm.utils.errors import UserError

RECIPE_FILE = re.compile(r"(?:^|/)pretrain-(\w+)\.yaml$")


@contextmanager
def with_start(arguments: list[str], allowed: Iterable[str]) -> Iterator[tuple[list[str], ModelSpec | None]]:
    """The arguments with the model of `--from CHECKPOINT` as their first file, which every other file overrides.
    `--task_from CHECKPOINT` is replaced by a file with its pre-training task. `--settings_from CHECKPOINT` is replaced
    by the settings that it was fine-tuned with, if its task is that of the files before it; otherwise it is dropped.

    Yields:
        the arguments, and the `ModelSpec` stored in the checkpoint of --from.
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
            # JSON: a class path or a string such as "no" is read back unchanged
            file = Path(folder, f"{option.removeprefix('--')}.yaml")
            whole[at : at + length] = ["-c", _file_of(file, json.dumps({"model": model}))] if model else []
        if start is not None:
            # Only the checked backbone is taken from what the checkpoint says.
            whole[1:1] = ["-c", _file_of(Path(folder, "model.yaml"), backbone_yaml(start))]
        yield whole, start


def _place_of(arguments: Sequence[str]) -> int | None:
    """Index of the first `--task_from CHECKPOINT`, `--task_from=CHECKPOINT` or `--settings_from`; None if absent."""
    names = ("--task_from", "--settings_from")
    places = (at for at, word in enumerate(arguments) if word.partition("=")[0] in names)
    return next((at for at in places if "=" in arguments[at] or at + 1 < len(arguments)), None)


def _file_of(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def parts_left_behind(start: ModelSpec | None, task: Namespace) -> Iterator[str]:
    """A line for each part of a checkpoint's pre-training task that a run from it does not take over.

    Args:
        start: the `ModelSpec` stored in the checkpoint.
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
    """A warning if pre-training continues with the recipe of a model other than the checkpoint's. This happens if
    `model=` is left out: the learning rates for drawn scenes are far from those for pretrained encoders.

    Args:
        start: the `ModelSpec` stored in the checkpoint.
        arguments: the subcommand, and its composed files and options.
    """
    recipe = next((match[1] for word in arguments if (match := RECIPE_FILE.search(word))), None)
    if arguments[0] != "fit" or recipe is None:
        return None
    sizes = {name: _size_in(str(chosen("model", name))) for name in choices("model")}
    own = [name for name, size in sizes.items() if size == _size_of(start.backbone)]
    # A user's own file may have such a name, too.
    if not own or recipe in own or recipe not in sizes:
        return None
    return f"the recipe is for model={recipe}, but the checkpoint is model={own[0]}: add model={own[0]} to the command"


def _size_in(file: str) -> tuple[str, int | None] | None:
    """`_size_of` a model's file; None if it sets no encoders or cannot be read, as the user did not name it."""
    try:
        return _size_of(read_yaml(config_text(file), file)["model"]["backbone"])
    except (UserError, KeyError, TypeError, AttributeError):
        return None


def _size_of(backbone: Any) -> tuple[str, int | None]:
    """Name of the ViT, and its width if that differs from the name's own."""
    image = backbone["init_args"]["image"]["init_args"]
    return image["name"], (image.get("config") or {}).get("embed_dim")


def _class_paths(part: Any) -> str:
    each = part if isinstance(part, list | tuple) else [part]
    return ", ".join(str(one["class_path"]) for one in each if isinstance(one, dict) and "class_path" in one)


def check_same_task(start: ModelSpec | None, path: str, measured: str) -> None:
    """Check that a fine-tuned checkpoint is evaluated on the task that it was fine-tuned on.

    Args:
        path: path of the checkpoint.
        measured: class path of the task to evaluate.

    Raises:
        UserError: it is another task (2).
    """
    if start is None or start.task is None or start.task["class_path"] == measured:
        return
    theirs, measured_name = (task_name(path) for path in (start.task["class_path"], measured))
    if theirs.startswith("maskvlm."):  # pre-training, which every task may start from
        return
    raise UserError(path, f"was fine-tuned as {theirs}, not as {measured_name}", f"Name its task: evaluate {theirs}")


def measured_on_scenes(history: Sequence[LineageEntry], source: object) -> str | None:
    """A warning if weights that were last trained on other data are evaluated on drawn scenes, the default of data=;
    None if they are not.

    Args:
        history: of the weights.
        source: the data that they are evaluated on.
    """
    if not history or not DRAWN.fullmatch(class_path(type(source))):
        return None
    last = history[-1].source
    if last == UNKNOWN or DRAWN.fullmatch(last):
        return None
    other = f"the weights were last trained on other data ({last})"
    return f"this measures drawn scenes, and {other}: to measure on those, name them with data= (make: DATA=)"
