"""What a model can be asked beyond its core: the methods that tasks bring."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Method(NamedTuple):
    """A question that a fine-tuned model answers, in Python, on the command line and on the page.

    Attributes:
        run: (task, model, examples) -> answers, one an example; an example is its images followed by its text. An
            answer is a NamedTuple whose first entry is what a person wants to read, and whose second is a probability.
        images: how many an example has.
        text: what the text is called, such as `question`; "" where an example has none.
        description: one line of help.
    """

    run: Callable[[Any, Any, list[tuple[Any, ...]]], list[Any]]
    images: int
    text: str
    description: str

    @property
    def form(self) -> str:
        """What an example is made of, in words."""
        images = f"{self.images} image{'s' if self.images > 1 else ''}"
        return f"{images} and a {self.text}" if self.text else images

    @property
    def shell_form(self) -> str:
        """The same as it is typed in a shell: `IMAGE IMAGE SENTENCE`."""
        return " ".join(["IMAGE"] * self.images + ([self.text.upper()] if self.text else []))

    @property
    def inputs(self) -> int:
        """How many parts an example has."""
        return self.images + bool(self.text)
