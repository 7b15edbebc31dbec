"""Rebuild modules from a checkpoint's model spec and tensors.

The spec is untrusted (see `model_spec.py`). The model is first built without memory, on torch's meta device, and
compared with the tensors by name and shape: a model that does not fit them is never allocated.
"""

import importlib
import importlib.util
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from maskvlm.checkpoint.integrity import first_line
from maskvlm.checkpoint.model_spec import SPEC_TODO, TODO, ModelSpec, model_spec_of
from maskvlm.checkpoint.warm_start import Start, read_content, start_of
from maskvlm.checkpoint.weights import check_finite_weights, check_fit
from maskvlm.config.compose import find_tasks
from maskvlm.config.plain_schema import (
    NOTHING,
    AnyOf,
    Entries,
    Flag,
    Kind,
    Listed,
    OneOf,
    Real,
    Record,
    Text,
    Tree,
    Whole,
    describe_value,
    maybe,
)
from maskvlm.model.encoders import ImageEncoder, TextEncoder
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.masking import ImageMasking, TextMasking
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.objectives.pretraining_losses import PretrainingLoss
from maskvlm.objectives.task import Task
from maskvlm.utils.errors import ExitCode, UserError

OURS = (r"maskvlm\.objectives\.pretraining\.[A-Z]\w*", r"tasks\.[a-z]\w*\.task\.[A-Z]\w*")
"""Tasks of this project: pre-training, and one per folder."""
PARTS: tuple[type, ...] = (PretrainingLoss, ImageMasking, TextMasking)
"""What a task's settings may contain besides plain values."""
OUR_PARTS = (r"maskvlm\.objectives\.(masking|pretraining_losses)\.[A-Z]\w*",)
SIMPLE: dict[Any, Kind] = {bool: Flag(), int: Whole(-(10**9), 10**9), float: Real(), str: Text(), type(None): NOTHING}
Instance = TypeVar("Instance")


def build_model(spec: ModelSpec, origin: Start, allowed: Iterable[str] = ()) -> tuple[MaskVLM, Task]:
    """Modules with the weights, tokenizer and heads of a checkpoint, in evaluation mode.

    Args:
        spec: model spec of the checkpoint.
        origin: its tensors.
        allowed: packages besides this project's that its task may come from.

    Raises:
        UserError: a class or setting that a checkpoint may not name (77), no task, or a class that is not installed
            (66), weights that do not fit, or missing heads (65).
    """
    if spec.task is None:
        what = "does not say which task it was trained for, and there is no config-fit.yaml beside it"
        raise UserError(origin.path, what, SPEC_TODO, ExitCode.MISSING_INPUT)
    kind = task_class(spec.task["class_path"], origin.path, allowed)
    args = read_arguments(kind, spec.task["init_args"], f"{origin.path}: task", allowed)
    if origin.labels is not None:
        args["labels"] = list(origin.labels)
    # Built without memory first: a model that does not fit is rejected before anything large is allocated.
    check_model_size(spec, origin, lambda: kind(**args))
    backbone, task = new_backbone(spec), _construct(lambda: kind(**args), origin.path)
    # Tokenizer and backbone first: a task's `build` and `warm_start` may need them.
    backbone.take_over(origin)
    task.build_once(backbone)
    task.warm_start(origin.heads)
    return backbone.eval(), task.eval()


def checked_spec_of(path: str) -> ModelSpec:
    """The model spec of a checkpoint, with its backbone checked against its tensors.

    Raises:
        UserError: as `read_content`, `model_spec_of` and `check_model_size`.
    """
    content = read_content(path)
    spec = model_spec_of(content, path)
    check_model_size(spec, start_of(content, path))
    return spec


def checked_task_of(spec: ModelSpec, path: str, allowed: Iterable[str] = ()) -> dict[str, Any]:
    """class_path and init_args of the task that a checkpoint was trained with.

    Args:
        path: path of the checkpoint, for errors.
        allowed: packages besides this project's that the task and its parts may come from.

    Raises:
        UserError: the checkpoint names no task, or a class that is not installed (66); a class or setting that a
            checkpoint may not name (77); a part that cannot be built (65).
    """
    if spec.task is None:
        raise UserError(path, "does not say how it was trained", "Name the files of its run", ExitCode.MISSING_INPUT)
    kind = task_class(spec.task["class_path"], path, allowed)
    read_arguments(kind, spec.task["init_args"], f"{path}: task", allowed)
    return spec.task


def pretraining_task_of(spec: ModelSpec, path: str, allowed: Iterable[str] = ()) -> dict[str, Any]:
    """As `checked_task_of`, for a pre-training checkpoint. Also raises UserError (2) for one of a downstream task."""
    task = checked_task_of(spec, path, allowed)
    kind = task_class(task["class_path"], path, allowed)
    if not issubclass(kind, MaskedPretraining):
        todo = f"Name its task: evaluate {task_name(task['class_path'])}"
        raise UserError(path, f"was fine-tuned as {kind.__name__}", todo)
    return task


def task_name(class_path: str) -> str:
    """Name of a task on the `finetune` command line: `vqa` for `tasks.vqa.task.Vqa`."""
    return class_path.rpartition(".")[0].removesuffix(".task").removeprefix("tasks.")


def check_model_size(spec: ModelSpec, origin: Start, new_task: Any = None) -> None:
    """Build the model without memory, and compare it with the checkpoint's tensors.

    Args:
        spec: model spec of the checkpoint.
        origin: its tensors.
        new_task: function that creates its task; None to check only the backbone.

    Raises:
        UserError: it cannot be built, or its tensors differ (65); it has more tensors than the checkpoint (77).
    """
    count = len(origin.backbone) + len(origin.heads)
    with torch.device("meta"), at_most(count, origin.path):
        backbone = _construct(lambda: new_backbone(spec), origin.path)
        check_fit(backbone, origin.backbone, origin.path)
        if new_task is not None:
            # `build` must come before `warm_start`, as in `build_model`; meta tensors have shapes but no values.
            task = _construct(new_task, origin.path)
            _construct(lambda: task.build(backbone), origin.path)
            shapes = {name: value.to("meta") for name, value in origin.heads.items()}  # torch warns about real values
            _construct(lambda: task.warm_start(shapes), origin.path)  # a head may take its width from the checkpoint
            _check_heads(task, origin)


def _check_heads(task: Task, origin: Start) -> None:
    own, name = task.state_dict(), type(task).__name__
    missing = [key for key, value in own.items() if key not in origin.heads or origin.heads[key].shape != value.shape]
    if missing:
        what = f"holds no {missing[0]}" + (f" and {len(missing) - 1} other tensors" if len(missing) > 1 else "")
        todo = f"Give a checkpoint that {name} wrote"
        raise UserError(origin.path, f"{what} of {name}", todo, ExitCode.BAD_DATA)
    heads = {key: origin.heads[key] for key in own}
    check_fit(task, heads, origin.path)
    check_finite_weights(heads, origin.path)


@contextmanager
def at_most(tensors: int, path: str) -> Iterator[None]:
    """While a model is built: stop if it registers more parameters than the checkpoint has tensors for."""
    budget = 2 * tensors + 100  # parts that are created and discarded, such as pooling layers, also count

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal budget
        budget -= 1
        if budget < 0:
            what = f"asks for a model of more than its {tensors:,} tensors"
            raise UserError(path, what, TODO, ExitCode.REFUSED)

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def new_backbone(spec: ModelSpec) -> MaskVLM:
    """Backbone with random weights, built only by constructors of this project."""
    # The constructors are named here: a spec's class paths never determine what is called.
    args = dict(spec.backbone["init_args"])
    image, text = (args.pop(name)["init_args"] for name in ("image", "text"))
    return MaskVLM(ImageEncoder(**image), TextEncoder(**text), **args)


def _construct(make: typing.Callable[[], Instance], path: str) -> Instance:
    """Call a constructor; any error about its settings becomes one line."""
    try:
        return make()
    except UserError as error:
        code = error.code if error.code == ExitCode.REFUSED else ExitCode.BAD_DATA
        where = error.where if error.where.startswith(path) else f"{path}: {error.where}"
        raise UserError(where, error.what, TODO, code) from error
    except Exception as error:  # each underlying library has its own errors
        raise UserError(path, f"cannot be built ({first_line(error)})", TODO, ExitCode.BAD_DATA) from error


# ---------------------------------------------------------------------- the task's class


def task_class(name: str, path: str, allowed: Iterable[str]) -> type[Task]:
    """The class of a task by its path: from this project, or from a package that the user allows.

    Raises:
        UserError: it may not be named, or is not a task (77); it is not installed (66).
    """
    return class_of(name, path, Task, OURS, allowed)  # type: ignore[type-abstract]


def class_of(name: str, path: str, base: type[Instance], ours: Iterable[str], allowed: Iterable[str]) -> type[Instance]:
    """A class named in an untrusted file.

    Args:
        name: the class path. path: the file, for errors.
        base: required base class.
        ours: patterns of this project's class paths that may be named.
        allowed: packages that the user trusts; any of their classes with this base may be named.

    Raises:
        UserError: it may not be named, or has another base (77); it does not exist (66).
    """
    module, _, last = name.rpartition(".")
    package = name.partition(".")[0]
    trusted = [allowed] if isinstance(allowed, str) else allowed
    # An entry allows a package with everything in it, or a single class if it spells one out.
    is_trusted = any(name == each or name.startswith(f"{each}.") for each in trusted)
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", base.__name__).lower()  # PretrainingLoss -> pretraining loss
    if not (any(re.fullmatch(pattern, name) for pattern in ours) or is_trusted):
        what = f"names {describe_value(name)}, which is not a {kind} of this project"
        todo = f"If you trust the package, allow it: --allow-import {package} (in Python: allow_import=['{package}'])"
        raise UserError(path, what, todo, ExitCode.REFUSED)
    if package == "tasks" and importlib.util.find_spec("tasks") is None:
        find_tasks()
    try:
        # Importing runs the module, so only names that passed the check above get here.
        candidate = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError, ValueError) as error:
        todo = "Install the package that it comes from, or run the command where tasks/ is"
        what = f"names {describe_value(name)}, which is not here"
        raise UserError(path, what, todo, ExitCode.MISSING_INPUT) from error
    if not (isinstance(candidate, type) and issubclass(candidate, base) and not inspect.isabstract(candidate)):
        what = f"names {describe_value(name)}, which is no {kind}"
        raise UserError(path, what, TODO, ExitCode.REFUSED)
    return candidate


def read_arguments(kind: type, args: Mapping[str, Any], where: str, allowed: Iterable[str] = ()) -> dict[str, Any]:
    """Settings for a class, checked against the types in its signature: plain values, and instances of `PARTS`, built
    from class_path and init_args in the same way.

    Args:
        allowed: packages besides this project's that parts may come from.

    Raises:
        UserError: an unknown setting, or one of the wrong type, or a part that may not be named (77); a part that is
            not installed (66) or cannot be built (65).
    """
    hints = hints_of(kind)
    # Labels come with the checkpoint's tensors (`build_model`), not with its settings.
    names = [name for name in hints if name != "labels"]
    parts = {name: base for name in names if (base := kind_of_part(hints.get(name))) is not None}
    # Settings of any other type have no kind here, so naming one is an error.
    kinds: dict[str, Kind] = {name: maybe(Tree()) for name in parts}
    kinds |= {n: plain_kind for n in names if n not in parts and (plain_kind := kind_of_hint(hints.get(n))) is not None}
    for name in args:
        if name in hints and hints[name] is None:
            todo = f"Annotate it where {kind.__name__} is written, such as `{name}: float`"
            raise UserError(f"{where}.{name}", "its class does not say of which type it is", todo, ExitCode.REFUSED)
    read = Record({}, kinds, ExitCode.REFUSED).read(dict(args), where, TODO)
    # Parts are built last, from mappings that have passed the schema.
    for name, base in parts.items():
        content = read.get(name)
        if isinstance(content, list):
            read[name] = [make_part(each, base, f"{where}.{name}", allowed) for each in content]
        elif content is not None:
            read[name] = make_part(content, base, f"{where}.{name}", allowed)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}


def hints_of(kind: type) -> dict[str, Any]:
    """Arguments of a class with their types, None if not annotated. `**kwargs` stands for the arguments of its base
    class."""
    arguments: dict[str, Any] = {}
    for each in kind.__mro__:
        if "__init__" not in vars(each) or each is object:
            continue
        hints, parameters = (
            typing.get_type_hints(vars(each)["__init__"]),
            inspect.signature(vars(each)["__init__"]).parameters,
        )
        kinds = {parameter.kind for parameter in parameters.values()}
        plain = [name for name, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        arguments = {name: hints.get(name) for name in plain if name != "self"} | arguments
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return arguments


def kind_of_part(hint: Any) -> type | None:
    """The class from `PARTS` in an annotated type, such as X, X | None or a sequence of X; None if there is none."""
    bases = [base for arg in (hint, *typing.get_args(hint)) for base in PARTS if arg is base]
    return bases[0] if bases else None


def make_part(value: Any, base: type[Instance], where: str, allowed: Iterable[str]) -> Instance:
    """Build a part of a task from its class_path and init_args, see `class_of`."""
    record = Record({"class_path": Text(200)}, {"init_args": maybe(Tree())}, ExitCode.REFUSED).read(value, where, TODO)
    kind = class_of(record["class_path"], where, base, OUR_PARTS, allowed)
    args = read_arguments(kind, record.get("init_args") or {}, where, allowed)
    return _construct(lambda: kind(**args), where)


def kind_of_hint(hint: Any) -> Kind | None:
    """Schema of the plain values of an annotated type; None for types that are not plain."""
    if hint in SIMPLE:
        return SIMPLE[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return OneOf(args)
    parts = [kind for arg in args if arg is not Ellipsis and (kind := kind_of_hint(arg)) is not None]
    # At least one type of a union must be plain; all types of a container must be.
    if origin in (typing.Union, types.UnionType):
        return AnyOf(tuple(parts)) if parts else None
    if len(parts) < len([arg for arg in args if arg is not Ellipsis]) or not parts:
        return None
    if origin in (list, tuple, Sequence):
        return Listed(AnyOf(tuple(parts)), 100_000)
    if origin in (dict, Mapping) and args[0] is str:
        return Entries(parts[-1])
    return None
