"""The plug-in interface that pre-training and every downstream task implement; no other code knows the tasks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from maskvlm.data.batch import Source
from maskvlm.data.examples import ExampleSource
from maskvlm.objectives.masking import Uniform
from maskvlm.objectives.methods import Method
from maskvlm.utils.constructor import given_arguments
from maskvlm.utils.errors import UserError
from maskvlm.utils.overrides import check_overrides

if TYPE_CHECKING:
    from maskvlm.model.maskvlm import MaskVLM


class Prediction(TypedDict):
    """One line of `predictions.jsonl`, and a row of `examples.png`.

    Attributes:
        id: the data set's id of the example.
        text: the question or query.
        truth, prediction: in words; truth is "" if it is not published.
        right: 0 to 1; None if the truth is not published.
        index: rows of the evaluated split with its images: the example's own, or those that were retrieved.
        kind: question type, or "".
        images: ids of the images in the data set. Examples of the same photo are not independent: group them for
            confidence intervals.
        measured: scores of this example, by metric name, for tasks whose answers are not simply right or wrong;
            omitted by other tasks, and for examples that the metric does not score.
    """

    id: str
    text: str
    truth: str
    prediction: str
    right: float | None
    index: list[int]
    kind: str
    images: NotRequired[list[str]]
    measured: NotRequired[dict[str, float]]


class TrainingPhases(NamedTuple):
    """The two phases of a run, and which parameters are trained in one of them only; all others are trained in both.

    Attributes:
        share: share of the run's steps in the first phase, 0 to 1; 0: there is only one phase.
        late: trained in the second phase only: their learning rate starts to rise there.
        stopping: trained in the first phase only: their learning rate has decayed at its end.
    """

    share: float = 0.0
    late: Sequence[nn.Parameter] = ()
    stopping: Sequence[nn.Parameter] = ()


class Task(nn.Module, ABC):
    """One objective: its heads, losses and metrics.

    A batch is whatever the task's data source yields: `Batch` for pairs, `ExampleBatch` for questions and the like.

    Attributes:
        uniform: source of the current step's random numbers (see `masking.Uniform`).
        weights: weight of each loss term in the sum; 1 if not given. If not every step has every term, name all.
        methods: methods that this task adds to a loaded model, by name.
        predictions: predictions of the last evaluation, complete in every process; empty if the task makes none.
        stuck_hints: for each loss term, what it means if it stays at its chance level, and what to check.
        run_progress: share of the run's steps completed before the current one; 1 outside a run.
        compares_examples: whether a loss depends on which examples share a pass, as contrast does.
        source_kind: class of its data source, `Source` for pairs or `ExampleSource`; None: any that yields its batches.
        arguments: the arguments that it was built with.
        built: whether its heads have been created.
        unreached: names of the backbone's parameters that none of its losses reaches, frozen while it is trained.
    """

    built: bool = False
    unreached: tuple[str, ...] = ()
    uniform: Uniform
    run_progress: float = 1.0
    compares_examples: bool = False
    source_kind: type[Source] | type[ExampleSource] | None = None
    weights: Mapping[str, float] = MappingProxyType({})
    methods: Mapping[str, Method] = MappingProxyType({})
    stuck_hints: Mapping[str, str] = MappingProxyType({})
    predictions: list[Prediction]

    def __init__(self) -> None:
        super().__init__()
        check_overrides(self, Task)
        self.arguments = given_arguments(self)
        self.predictions = []

    @abstractmethod
    def build(self, backbone: "MaskVLM") -> None:
        """Create the heads to match the backbone's widths; called once, before the optimiser exists."""

    def build_once(self, backbone: "MaskVLM") -> bool:
        """Create the heads if there are none yet; those of a loaded model or an earlier training are kept.

        Returns:
            Whether they are new.
        """
        if self.built:
            return False
        backbone.unfreeze_for_task()
        self.build(backbone)
        self.unreached = backbone.frozen_for_task
        self.built = True
        return True

    def freeze_unreached(self, backbone: "MaskVLM") -> None:
        """Freeze what this task does not reach, as `build` has: another task may have been built on the backbone since,
        which froze other parts."""
        backbone.unfreeze_for_task()
        backbone.freeze_for_task(*map(backbone.get_parameter, self.unreached))

    def check_ready(self) -> None:
        """Check that a training step can be computed, as a loop of one's own may forget to prepare it.

        Raises:
            UserError: there are no heads, or no random numbers for the step.
        """
        name = type(self).__name__
        if not self.built and next(self.parameters(), None) is None:
            raise UserError(name, "has no heads yet", "Call task.build_once(backbone) before the first step")
        if not hasattr(self, "uniform"):
            todo = 'Call task.set_uniform(Draw(seed, step, "cpu")) before each step (maskvlm.utils.distributed.Draw)'
            raise UserError(name, "has no random numbers for this step", todo)

    @abstractmethod
    def forward(self, backbone: "MaskVLM", batch: Any) -> dict[str, Tensor]:
        """Named loss terms of one training batch, scalars, each a mean over the global batch; LitModel logs them
        unweighted and sums them with `weights`."""

    def begin_evaluation(self) -> None:
        """Discard what an interrupted evaluation has collected; LitModel calls it before each evaluation."""
        return

    @abstractmethod
    def update(self, backbone: "MaskVLM", batch: Any) -> None:
        """Add one evaluation batch."""

    @abstractmethod
    def compute(self, backbone: "MaskVLM") -> dict[str, float]:
        """Metrics over all batches added since the last call, which are then discarded: accuracies and recalls in
        percent, losses in nats. `score` selects the best checkpoint, higher is better; chance levels end in `_chance`
        or `_majority`."""

    def heads_of_labels(self) -> tuple[str, ...]:
        """Name prefixes of the tensors that depend on `labels`, for tasks that have them: they are not loaded from a
        checkpoint with other labels. By default all of the task's tensors."""
        return ("",)

    def warm_start(self, heads: Mapping[str, Tensor]) -> set[str]:
        """Load the heads of a checkpoint that match by name (within its task) and shape; called after `build`.

        Returns:
            Names of this task's tensors that were loaded.
        """
        own = self.state_dict()
        fitting = {n: value for n, value in heads.items() if n in own and own[n].shape == value.shape}
        # Not strict: tensors that do not match keep their values from `build`.
        self.load_state_dict(fitting, strict=False)
        return set(fitting)

    def training_phases(self, backbone: "MaskVLM") -> TrainingPhases:
        """Which parameters are trained in which part of the run; by default all of them throughout."""
        return TrainingPhases()

    def compute_in_chunks(self, size: int) -> None:
        """Compute a training batch `size` examples at a time, with the losses and gradients of the whole batch; called
        after `build`. Raises UserError if the task does not support it."""
        what = f"{type(self).__name__} does not compute a batch in chunks"
        todo = "If the loss of an example does not depend on others, trainer.accumulate_grad_batches does the same"
        raise UserError("model.chunk", what, todo)

    def use_token_counts(self, count: Callable[[], Tensor]) -> None:
        """Called before the first training step. `count` returns how often each token occurs in a sample of the
        training texts, [entries of the tokenizer]; it reads them when it is called."""
        return

    def card(self) -> dict[str, Any]:
        """Settings of the task that a reader needs to interpret its metrics, such as k of the re-ranking."""
        return {}

    def resume_state(self) -> dict[str, Tensor]:
        """State other than weights that a run needs to resume exactly; kept in its checkpoints."""
        return {}

    def load_resume_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `resume_state` returned. Raises ValueError with a message that says what is wrong with it."""
        return

    def files(self) -> dict[str, str]:
        """Additional files of the last evaluation for the run's folder, by name, such as a submission to a server."""
        return {}

    def chance_levels(self, batch_size: int) -> dict[str, float]:
        """Chance level of each loss term, in its unit. batch_size: images in one pass over all processes; the global
        batch, unless gradients are accumulated."""
        return {}

    def set_uniform(self, uniform: Uniform) -> None:
        """Set the source of the next pass's random numbers; LitModel derives them from (seed, number of the pass)."""
        self.uniform = uniform


def checked_terms(task: Task, terms: object) -> dict[str, Tensor]:
    """The result of `Task.forward`. Raises UserError if it is not a dict of scalar tensors, as a plug-in may return, or
    `Task.weights` seems to misname a term: one has no weight, and a weight has no term."""
    todo = "Return a dict: each loss by its name, a scalar tensor, the mean over the batch"
    if not isinstance(terms, dict) or not terms:
        raise UserError(f"{_name(task)}.forward", "gave no loss" if terms == {} else f"gave a {_kind(terms)}", todo)
    for name, term in terms.items():
        if not isinstance(term, Tensor) or term.ndim:
            raise UserError(f"{_name(task)}.forward", f"gave {name} as a {_kind(term)}", todo)
    if torch.is_grad_enabled() and not any(term.requires_grad for term in terms.values()):
        todo = "Compute it with gradient: without torch.no_grad(), detach() or item()"
        raise UserError(f"{_name(task)}.forward", "gave no loss that has a gradient: nothing would learn", todo)
    unknown = [name for name, weight in task.weights.items() if weight and name not in terms]
    if unknown and not terms.keys() <= task.weights.keys():
        what = f"has a weight for {', '.join(unknown)}, and forward gave {', '.join(terms)}"
        raise UserError(f"{_name(task)}.weights", what, "Name each term as forward does")
    return terms


def checked_metrics(task: Task, metrics: object, needs_score: bool) -> dict[str, float]:
    """The result of `Task.compute`. Raises UserError if it is not a dict of numbers, or lacks a required `score` to
    select the best checkpoint."""
    todo = "Return a dict: each metric by its name, a number"
    if not isinstance(metrics, dict):
        raise UserError(f"{_name(task)}.compute", f"gave a {_kind(metrics)}", todo)
    for name, value in metrics.items():
        if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise UserError(f"{_name(task)}.compute", f"gave {name} as a {_kind(value)}", todo)
    if needs_score and "score" not in metrics:
        todo = "Return one, higher is better: the best checkpoint is chosen by it"
        raise UserError(f"{_name(task)}.compute", "gave no 'score'", todo)
    return metrics


def _name(task: Task) -> str:
    return f"{type(task).__module__}.{type(task).__qualname__}"


def _kind(value: object) -> str:
    return f"tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
