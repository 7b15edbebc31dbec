"""The models of the page: pre-training runs, best first (`history.run_order`), and the newest run of each fine-tuned
task, found in a folder or named."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from maskvlm.checkpoint.model_spec import model_spec_of, read_small
from maskvlm.checkpoint.warm_start import read_content, training_history_of
from maskvlm.config.old_names import current
from maskvlm.config.safe_yaml import read_yaml
from maskvlm.data.examples import Examples, ExampleSource
from maskvlm.demo.history import WORLDS, Trained, run_order, trained_run
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.inference.rebuild import class_of, read_arguments
from maskvlm.objectives.loaded_model import Model
from maskvlm.objectives.methods import Method
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import check_inside

PRETRAINING = "maskvlm.objectives.pretraining.MaskedPretraining"
WEIGHTS = ("best.ckpt", "last.ckpt")
"""Checkpoints in a run's folder; the first one that exists is loaded."""
HEADS = ("projection", "matching", "tokens", "pixels")
"""Heads of pre-training that the tabs need."""


class Run(NamedTuple):
    """A checkpoint and the class of its task. trained: its training data, for pre-training only."""

    path: str
    task: str
    trained: Trained | None = None

    @property
    def title(self) -> str:
        """Title of its tab: `tasks.vqa.task.Vqa` is VQA."""
        name = self.task.rpartition(".")[2]
        return name.upper() if len(name) < 5 else name

    @property
    def short_path(self) -> str:
        """The end of its path; the rest is private."""
        return "/".join(Path(self.path).parts[-2:])

    @property
    def choice(self) -> str:
        """Its line in the chooser: the run, its step, its score and its training data."""
        if self.trained is None:
            return self.short_path
        return f"{Path(self.path).parent.name or self.short_path}: {self.trained.measures}, {self.trained.description}"


class FoundModels(NamedTuple):
    """runs: pre-training runs, best first. tasks: one run per task class, in alphabetical order. problems: messages."""

    runs: list[Run]
    tasks: list[Run]
    problems: list[str]

    @property
    def pretrained(self) -> Run | None:
        """The run that the page starts with; None if there is none."""
        return self.runs[0] if self.runs else None


def find_models(folder: Path, sources: Iterable[str] = ()) -> FoundModels:
    """The pre-training runs, best first (`run_order`), and the newest checkpoint of each fine-tuned task.

    Args:
        folder: folder of runs.
        sources: checkpoints, Hugging Face folders or names in the hub's cache, listed before those of the folder, the
            last one first.

    Raises:
        UserError: one of the sources does not exist or is damaged.
    """
    named, problems = [run_of(source) for source in sources], list[str]()
    known = {Path(run.path).resolve() for run in named}
    there = [path for path in map(weights_in, folder.glob("*/")) if path is not None and path.resolve() not in known]
    folder_runs = []
    # Oldest first, so that `last` keeps the newest of each task.
    for path in sorted(there, key=lambda path: path.stat().st_mtime):
        try:
            folder_runs.append(run_of(str(path)))
        except UserError as error:
            # Damaged checkpoints do not keep the page from starting; it lists them.
            problems.append(str(error))
    last = {run.task: run for run in [*folder_runs, *named]}
    last.pop(PRETRAINING, None)
    trained = [(run, run.trained) for run in folder_runs if run.trained is not None]
    order = run_order([each for _, each in trained])
    runs = [run for run in reversed(named) if run.trained is not None] + [trained[place][0] for place in order]
    return FoundModels(runs, sorted(last.values(), key=lambda run: run.title), problems)


def weights_in(folder: Path) -> Path | None:
    """The checkpoint in a run's folder; None if there is none."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def run_of(source: str) -> Run:
    """A checkpoint with its task's class path, from the card beside it or else from the checkpoint itself.

    Raises:
        UserError: it does not exist, is damaged, or does not state its task. A fine-tuned checkpoint with a card is
            checked only when it is loaded.
    """
    task = task_on_card(source)
    # A fine-tuned checkpoint with a card is not read until it is used.
    if task not in (None, PRETRAINING):
        return Run(source, str(task))
    content = read_content(source)
    if task is None:
        spec = model_spec_of(content, source)
        if spec.task is None:
            todo = "Put the config-fit.yaml of its run beside it"
            raise UserError(source, "does not say which task it was trained for", todo, ExitCode.MISSING_INPUT)
        task = str(spec.task["class_path"])
    if task != PRETRAINING:
        return Run(source, task)
    heads = {name.split(".")[1] for name in content["state_dict"] if name.startswith("task.")}
    # A Hugging Face folder includes its metrics.
    evaluation = content.get("evaluation")
    metrics = evaluation.get("metrics") if isinstance(evaluation, dict) else None
    history = training_history_of(content)
    return Run(source, task, trained_run(source, history, heads.issuperset(HEADS), metrics))


def task_on_card(source: str) -> str | None:
    """Class of the task, from the card beside a checkpoint; None if the card does not state it."""
    try:
        file = Path(source).parent / "card.json"
        # Untrusted, like the files beside it.
        check_inside(file)
        class_path = json.loads(read_small(file))["task"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError):
        return None
    known = isinstance(class_path, str) and len(class_path) < 300 and source.endswith(".ckpt")
    return current(class_path) if known else None


class Loaded(NamedTuple):
    """A fine-tuned model and its method. examples: from the data set that it was trained on; None if that cannot be
    opened here."""

    model: PretrainedMaskVLM
    method: Method
    examples: Examples | None


class Models:
    """Loads the models found: the first pre-training run at once, others when they are chosen, tasks on first use.

    Args:
        listing: result of `find_models`.
        device: torch device; None for the CPU.
        allowed: packages besides this project's that tasks may come from.
    """

    def __init__(self, listing: FoundModels, device: str | None = None, allowed: Iterable[str] = ()) -> None:
        self.listing, self.device, self.allowed = listing, device, list(allowed)
        self.pretrained = self.load(listing.pretrained) if listing.pretrained else None
        self.tasks: dict[str, Loaded] = {}

    def load(self, run: Run) -> PretrainedMaskVLM:
        """The model of a run, on the page's device."""
        return PretrainedMaskVLM.from_pretrained(run.path, device=self.device, allow_import=self.allowed)

    def core(self, number: int = 0) -> PretrainedMaskVLM:
        """The model of a run in the chooser; all but the first are loaded anew. Raises UserError if there is none."""
        if self.pretrained is None:
            todo = "Run `maskvlm pretrain`, then `maskvlm demo` again"
            raise UserError("model", "no checkpoint of pre-training is here", todo, ExitCode.MISSING_INPUT)
        return self.load(self.listing.runs[number]) if number else self.pretrained

    def task(self, run: Run) -> Loaded:
        """The model of a task, loaded on first use and kept. Raises UserError if it cannot be loaded."""
        if run.task not in self.tasks:
            model = self.load(run)
            method = next(iter(model.task.methods.values()), MATCH)  # retrieval only has the core methods
            self.tasks[run.task] = Loaded(model, method, self.examples(run))
        return self.tasks[run.task]

    def examples(self, run: Run) -> Examples | None:
        """The validation split of the built-in world that a run was trained on, from the configuration beside it.

        That file is as untrusted as the checkpoint, so no source that opens files is built from it.
        """
        file = Path(run.path).parent / "config-fit.yaml"
        try:
            check_inside(file)
            source = read_yaml(read_small(file), str(file))["data"]["init_args"]["source"]
            # Sources that draw their images (WORLDS), or those of packages that the user allows.
            kind = class_of(str(source["class_path"]), str(file), ExampleSource, WORLDS, self.allowed)  # type: ignore[type-abstract]
            args = read_arguments(kind, source.get("init_args") or {}, str(file))
            return kind(**args).split("val")
        except (UserError, KeyError, TypeError, AttributeError):
            return None  # real photos, another machine's data, or captions: the page has other examples


class Matched(NamedTuple):
    """Whether a caption belongs to an image, and the probability that it does."""

    answer: str
    probability: float


def matched(_: Any, model: Model, examples: list[tuple[Any, ...]]) -> list[Matched]:
    """The `Method` of a model that has no other: matching."""
    probabilities = model.match([example[0] for example in examples], [example[-1] for example in examples])  # type: ignore[attr-defined]
    return [Matched("belongs to it" if each > 0.5 else "does not belong to it", each) for each in probabilities]


MATCH = Method(matched, 1, "caption", "whether a caption belongs to an image")
