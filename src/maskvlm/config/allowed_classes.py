"""Which classes a configuration may name: a list of classes, not packages, checked before the parser imports anything.

Allowed are: this project's own classes of the kinds below; the Lightning classes listed here; classes whose bare name
the user typed on the command line; exact paths that the user typed there; anything under a name given with
--allow-import. Functions are only allowed in the last two cases.
"""

import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from typing import Any

from maskvlm.config.given_options import options
from maskvlm.config.safe_yaml import cut, read_yaml
from maskvlm.utils.errors import UserError
from maskvlm.utils.launch import STUDY

OWN = ("maskvlm", "tasks")
KINDS = {
    "maskvlm.objectives.task.Task",
    "maskvlm.objectives.pretraining_losses.PretrainingLoss",
    "maskvlm.objectives.masking.ImageMasking",
    "maskvlm.objectives.masking.TextMasking",
    "maskvlm.model.maskvlm.MaskVLM",
    "maskvlm.model.encoders.ImageEncoder",
    "maskvlm.model.encoders.TextEncoder",
    "maskvlm.data.batch.Source",
    "maskvlm.data.examples.ExampleSource",
    "lightning.pytorch.core.datamodule.LightningDataModule",
    "lightning.pytorch.callbacks.callback.Callback",
    "lightning.fabric.loggers.logger.Logger",
    "lightning.fabric.plugins.io.checkpoint_io.CheckpointIO",
    "lightning.pytorch.profilers.profiler.Profiler",
    "lightning.fabric.strategies.strategy.Strategy",
    "lightning.pytorch.strategies.strategy.Strategy",
    "lightning.fabric.plugins.precision.precision.Precision",
    "lightning.fabric.plugins.environments.cluster_environment.ClusterEnvironment",
}
"""Base classes of the project's own allowed classes, and of classes typed by bare name."""
LIGHTNING = {
    "lightning.pytorch.callbacks": (
        "BatchSizeFinder DeviceStatsMonitor EarlyStopping EMAWeightAveraging GradientAccumulationScheduler "
        "LearningRateFinder LearningRateMonitor ModelCheckpoint ModelPruning ModelSummary OnExceptionCheckpoint "
        "RichModelSummary RichProgressBar SpikeDetection StochasticWeightAveraging TQDMProgressBar Timer"
    ),
    "lightning.pytorch.loggers": "CSVLogger TensorBoardLogger",
    "lightning.pytorch.profilers": "AdvancedProfiler PassThroughProfiler PyTorchProfiler SimpleProfiler",
    "lightning.pytorch.strategies": "DDPStrategy FSDPStrategy SingleDeviceStrategy",
    "lightning.pytorch.plugins": "DoublePrecision FSDPPrecision HalfPrecision MixedPrecision TorchSyncBatchNorm",
    "lightning.fabric.plugins.environments": (
        "KubeflowEnvironment LightningEnvironment LSFEnvironment MPIEnvironment SLURMEnvironment "
        "TorchElasticEnvironment"
    ),
}
"""Allowed classes by module. Excluded: classes built from callables (LambdaCallback, ThroughputMonitor,
BackboneFinetuning), that send data to an address (WandbLogger and others), or that read checkpoints in their own way.
"""
LISTED = {f"{module}.{name}" for module, names in LIGHTNING.items() for name in names.split()}
PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
NO_CLASSES = ("run", "from", "task_from", "settings_from", "ckpt_path", "out", "allow-import")
"""Options whose values are not read as names of classes: file names, and the packages that --allow-import names."""


class Verdicts(dict[str, bool]):
    """Tells the parser whether a value may name a path, based on the full path and not on its package.

    The parser looks up the longest prefix of a path that is in this dict, and the path itself always is. As a plain
    dict it denies everything.

    Args:
        arguments: the command line.
        allowed: packages, modules or classes that the user trusts.
    """

    def __init__(self, arguments: list[str], allowed: Iterable[str] = ()) -> None:
        # the content of a copy as a plain dict: everything is denied
        super().__init__({"*": False})
        self.typed, self.allowed = typed_names(arguments), set(allowed)

    def __contains__(self, path: object) -> bool:
        # so that the parser asks about the whole path, never about one of its packages
        return True

    def __getitem__(self, path: str) -> bool:
        return may_name(path, self.typed, self.allowed)


def may_name(path: str, typed: set[str], allowed: set[str]) -> bool:
    """Whether a value may name the class at this path.

    Args:
        path: dotted, such as `tasks.vqa.task.Vqa`.
        typed: what the user typed: paths, or bare names of classes.
        allowed: packages, modules or classes that the user trusts.
    """
    root = path.partition(".")[0]
    if root == "jsonargparse" or not PATH.fullmatch(path):
        return False
    # --allow-import: the name and everything under it
    if any(path == name or path.startswith(f"{name}.") for name in allowed):
        _find(path, True)  # reports a mistake in its file with the line; the parser would say "does not fit"
        return True
    # typed: the whole path; nothing from the standard library, which contains `os.system`
    if path in typed and root not in sys.stdlib_module_names:
        return True
    # only our own packages are imported for the check: importing any other runs its code
    target = _find(path, root in OWN)
    if target is _Missing:
        return root in OWN  # the parser reports what is missing; there is nothing to import
    # functions would be called with the file's arguments: none is allowed that the user has not named
    if not inspect.isclass(target):
        return False
    # base classes by name, so that torch and Lightning need not be imported here
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in target.__mro__}
    if f"{target.__module__}.{target.__qualname__}" in KINDS:
        return True
    # by the module that defines the class, not the path used to find it: our modules also contain imported classes
    if target.__module__.partition(".")[0] in OWN or target.__qualname__ in typed:
        return bool(kinds & KINDS)
    # the same class may be named by another path, so the classes themselves are compared
    return any(target is _find(name, False) for name in LISTED | typed | allowed)


class _Missing:
    """Sentinel for a missing object."""


def _find(path: str, load: bool) -> Any:
    """The object at a path: from modules already imported or, with `load`, from one imported now."""
    module, _, name = path.rpartition(".")
    if load and module:
        try:
            importlib.import_module(module)
        except Exception as error:
            absent = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
            if absent is None or not f"{module}.".startswith(f"{absent}."):
                what = f"cannot be imported ({type(error).__name__}: {cut(str(error), 200)})"
                raise UserError(path, what, f"Fix {_place_of(error)}") from error
            # `module.Class.method` is found too, and is not a class
            outer = _find(module, True) if "." in module else _Missing
            return _Missing if outer is _Missing else getattr(outer, name, _Missing)
    # no import: what is not loaded counts as missing
    return getattr(sys.modules.get(module, _Missing), name, _Missing)


def _place_of(error: Exception) -> str:
    """`file:line` of the last line that ran, or of a syntax error. Lines of Python itself and of installed packages are
    skipped if the traceback passes through any other file."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith("<")]
    installed = tuple(sysconfig.get_path(kind) + os.sep for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
    frames = [each for each in frames if not each.filename.startswith(installed)] or frames
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "its file"


def typed_names(arguments: list[str]) -> set[str]:
    """Dotted paths and bare names in the values of options, also inside YAML and JSON. Empty in a run of a study, whose
    options come from the study's file and were not typed."""
    names: set[str] = set()
    if STUDY in os.environ:
        return names
    for option in options(arguments):
        if option.key in NO_CLASSES or not option.value:
            continue
        if PATH.fullmatch(option.value):
            names.add(option.value)
        # a mapping or list typed as YAML or JSON, which may contain class paths
        elif option.value[0] in "{[":
            try:
                names |= set(_texts(read_yaml(option.value, option.where)))
            except UserError:
                continue  # reported when it is parsed
    return names


def _texts(value: Any) -> Iterable[str]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, str) and PATH.fullmatch(value):
        yield value
    for part in parts:
        yield from _texts(part)
