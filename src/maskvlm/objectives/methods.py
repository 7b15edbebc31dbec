"""Methods that tasks add to a model."""

from collections.abc import Callable
from typing import Any, NamedTuple

TASK_METHODS = {"answer": "vqa", "compare": "nlvr", "entail": "entailment"}
"""Methods that this project's tasks add, and the task of each. Those of other packages are found in the checkpoint."""


class Method(NamedTuple):
    """A question type that a fine-tuned model answers, in Python, on the command line and on the demo page.

    Attributes:
        run: (task, model, examples) -> answers, one per example; an example is its images followed by its text. An
            answer is a NamedTuple whose first entry is the answer to show, and whose second is a probability.
        images: images per example.
        text: name of the text, such as `question`; "" if an example has none.
        description: one line of help.
    """

    run: Callable[[Any, Any, list[tuple[Any, ...]]], list[Any]]
    images: int
    text: str
    description: str

    @property
    def form(self) -> str:
        """The parts of an example, in words."""
        images = f"{self.images} image{'s' if self.images > 1 else ''}"
        return f"{images} and a {self.text}" if self.text else images

    @property
    def shell_form(self) -> str:
        """The same as typed in a shell: `IMAGE IMAGE "SENTENCE"`."""
        return " ".join(["IMAGE"] * self.images + ([f'"{self.text.upper()}"'] if self.text else []))

    @property
    def inputs(self) -> int:
        """Number of parts of an example."""
        return self.images + bool(self.text)
