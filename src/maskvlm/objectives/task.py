"""The plug-in interface: pre-training and every downstream task implement it, nothing else knows them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

from torch import Tensor, nn

from maskvlm.data.batch import Source
from maskvlm.data.examples import ExampleSource
from maskvlm.objectives.masking import Uniform
from maskvlm.objectives.methods import Method
from maskvlm.utils.constructor import given_arguments
from maskvlm.utils.errors import UserError

if TYPE_CHECKING:
    from maskvlm.model.maskvlm import MaskVLM


class Prediction(TypedDict):
    """One line of `predictions.jsonl`, and a row of `examples.png`.

    Attributes:
        id: the data set's own id of the example.
        text: what was asked.
        truth, prediction: in words; truth is "" where it is not published.
        right: 0 to 1, None where the truth is not published.
        index: rows of the evaluated split whose images belong to it: the examples' own, or those that were found.
        kind: question type, or "".
        images: their ids in the data set. Examples of one photo are not independent: who wants an interval groups them.
        measured: what this example alone gets, by the metric's name, where no answer is simply right or wrong; left
            out by other tasks, and of an example that the metric does not judge.
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
    """Parameters that learn only after a share of the run: their learning rate rises from there.

    stopping: those that learn only until then; their learning rate has run down by then. All others learn throughout.
    """

    share: float = 0.0
    parameters: Sequence[nn.Parameter] = ()
    stopping: Sequence[nn.Parameter] = ()


class Task(nn.Module, ABC):
    """What is special about one objective: its heads, its losses, its metrics.

    A batch is whatever the task's data source makes: `Batch` of pairs, `ExampleBatch` of questions and the like.

    Attributes:
        uniform: gives the random numbers of the current step (see `masking.Uniform`).
        weights: weight of each loss term in the sum, 1 where it has none.
        methods: what a loaded model can be asked through this task, by name.
        predictions: of the last evaluation, complete in every process; empty where a task makes none.
        stuck_hints: of each loss term, what it means that it stays at its chance level, and where to look.
        run_progress: share of the run's steps that were made before the current one; 1 outside a run.
        compares_examples: a loss depends on which examples are together in a pass, as contrast does.
        source_kind: what its data source is, `Source` of pairs or `ExampleSource`; None: whatever gives its batches.
        arguments: that it was built with.
        built: whether it has its heads.
    """

    built: bool = False
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
        self.arguments = given_arguments(self)
        self.predictions = []

    @abstractmethod
    def build(self, backbone: "MaskVLM") -> None:
        """Create the heads to fit the backbone's widths; called once, before the optimiser exists."""

    def build_once(self, backbone: "MaskVLM") -> bool:
        """Create the heads where there are none yet: those of a loaded model, or of an earlier training, stay.

        Returns:
            whether they are new.
        """
        if self.built:
            return False
        backbone.unfreeze_for_task()
        self.build(backbone)
        self.built = True
        return True

    @abstractmethod
    def forward(self, backbone: "MaskVLM", batch: Any) -> dict[str, Tensor]:
        """Named loss terms of one training batch, scalars, each a mean over the global batch; LitModel logs them as
        they are and sums them by `weights`."""

    def begin_evaluation(self) -> None:
        """Forget what an evaluation that was broken off has taken in; LitModel calls it before each evaluation."""
        return

    @abstractmethod
    def update(self, backbone: "MaskVLM", batch: Any) -> None:
        """Take in one evaluation batch."""

    @abstractmethod
    def compute(self, backbone: "MaskVLM") -> dict[str, float]:
        """Metrics over all batches taken in since the last call, then forget them: accuracies and recalls in percent,
        losses in nats. `score` chooses the best checkpoint, higher is better; chance levels end in `_chance` or
        `_majority`."""

    def heads_of_labels(self) -> tuple[str, ...]:
        """What the names of those tensors begin with that decide among `labels`, where the task has such: they are not
        taken over from a checkpoint with other labels. By default all of the task's."""
        return ("",)

    def warm_start(self, heads: Mapping[str, Tensor]) -> set[str]:
        """Take over what fits of a checkpoint's heads, by their names within its task; called after `build`.

        Returns:
            Names of this task's own tensors that were taken over.
        """
        own = self.state_dict()
        fitting = {n: value for n, value in heads.items() if n in own and own[n].shape == value.shape}
        # Not strict: what does not fit keeps what `build` gave it.
        self.load_state_dict(fitting, strict=False)
        return set(fitting)

    def late(self, backbone: "MaskVLM") -> TrainingPhases:
        """Which parameters learn in which part of the run; by default all in all of it."""
        return TrainingPhases()

    def compute_in_chunks(self, size: int) -> None:
        """Compute a training batch `size` examples at a time, with the losses and gradients of the whole one; called
        after `build`. Raises UserError where the task does not know how."""
        what = f"{type(self).__name__} does not compute a batch in chunks"
        todo = "Where each example is judged by itself trainer.accumulate_grad_batches does the same"
        raise UserError("model.chunk", what, todo)

    def use_token_counts(self, count: Callable[[], Tensor]) -> None:
        """Called before the first step of a training. `count` gives how often each token stands in some of its texts,
        [entries of the tokenizer]; it reads them when it is called."""
        return

    def card(self) -> dict[str, Any]:
        """What of the task's settings a reader must know beside its numbers, such as k of the re-ranking."""
        return {}

    def resume_state(self) -> dict[str, Tensor]:
        """What a run needs, beside weights, to go on as if it had not stopped; kept in its checkpoints."""
        return {}

    def load_resume_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `resume_state` gave. Raises ValueError, whose text says what is wrong with it."""
        return

    def files(self) -> dict[str, str]:
        """Further files of the last evaluation for the run's folder, by name, such as a server's submission."""
        return {}

    def chance_levels(self, batch_size: int) -> dict[str, float]:
        """Chance level of each loss term, in its unit. batch_size: images that meet in one pass, of all processes; the
        global batch, unless passes are accumulated."""
        return {}

    def set_uniform(self, uniform: Uniform) -> None:
        """Take the random numbers of the coming step; LitModel derives them from (seed, step)."""
        self.uniform = uniform


def checked_terms(task: Task, terms: object) -> dict[str, Tensor]:
    """What `Task.forward` gave. Raises UserError where it is no dict of scalar tensors, which a plug-in may give."""
    todo = "Return a dict: each loss by its name, a scalar tensor, the mean over the batch"
    if not isinstance(terms, dict) or not terms:
        raise UserError(f"{_name(task)}.forward", "gave no loss" if terms == {} else f"gave a {_kind(terms)}", todo)
    for name, term in terms.items():
        if not isinstance(term, Tensor) or term.ndim:
            raise UserError(f"{_name(task)}.forward", f"gave {name} as a {_kind(term)}", todo)
    return terms


def checked_metrics(task: Task, metrics: object, needs_score: bool) -> dict[str, float]:
    """What `Task.compute` gave. Raises UserError where it is no dict of numbers, or has no `score` to choose the best
    checkpoint by, where one is needed."""
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
