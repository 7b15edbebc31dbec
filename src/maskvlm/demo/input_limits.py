"""Limits on what visitors send once a request is accepted: images, texts, and the time that an answer may take."""

import hashlib
import io
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from maskvlm.data.images import safe_open
from maskvlm.data.inputs import check_text
from maskvlm.inference.pretrained import INPUT_WARNINGS
from maskvlm.utils.errors import ExitCode, UserError

ANSWER_SECONDS = 20.0
QUEUE = 24  # maximum number of waiting questions
MAX_TEXT = 1000  # characters
MAX_LINES = 20  # texts at once
MAX_SIDE = 1024  # pixels per side of a stored image; models see far fewer
OWN = "own-"
"""Prefix of the names of the page's own images; the SHA-256 of the image's bytes follows."""

T = TypeVar("T")


class Worker:
    """A single thread for all decoding and computing, so that many questions need the memory of one.

    A thread cannot be stopped: a question that takes too long is abandoned, not ended, and so are those waiting behind
    it. The limits above ensure that every question ends.
    """

    def __init__(self, seconds: float = ANSWER_SECONDS) -> None:
        self.seconds, self.pool = seconds, ThreadPoolExecutor(1)

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of a function. Raises UserError if it is not ready in time, and whatever the function raises."""
        future = self.pool.submit(_quietly, function, *arguments)
        # Not by `result(seconds)`, whose TimeoutError could also be the function's own.
        done, _ = wait([future], self.seconds)
        if not done:
            # Cancels it if it is still waiting; if it is running, it continues to its end.
            future.cancel()
            what, todo = f"no answer within {self.seconds:g} seconds", "Try again with less input"
            raise UserError("model", what, todo, ExitCode.UNAVAILABLE)
        return future.result()


def _quietly(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function without warnings about inputs: Python remembers every warning shown, and visitors cause any
    number of them. The page shows them elsewhere."""
    with warnings.catch_warnings():
        for kind in INPUT_WARNINGS:
            warnings.simplefilter("ignore", kind)
        return function(*arguments)


class Opener:
    """Opens uploads as images, through `safe_open`. The latest few are cached, as each is used many times.

    The page's own images stay in memory, so that none is removed while somebody looks at it.
    """

    def __init__(self, most: int = 16) -> None:
        self.most, self.known = most, OrderedDict[bytes, Image.Image]()
        self.own = dict[str, bytes]()

    def keep(self, image: Image.Image) -> str:
        """Store one of the page's own images; returns the name that opens it again."""
        file = io.BytesIO()
        image.save(file, "PNG")
        name = OWN + hashlib.sha256(file.getvalue()).hexdigest()
        self.own[name] = file.getvalue()
        return name

    def __call__(self, path: str | None, name: str = "image") -> Image.Image:
        """The image of a path or name. Raises BadImage, or UserError if there is none."""
        if not path:
            raise UserError(name, "there is none", "Upload one, or choose an example")
        file = Path(path)
        if path not in self.own and not file.is_file():
            raise UserError(name, "has expired", "Upload it again", ExitCode.MISSING_INPUT)
        data = self.own[path] if path in self.own else file.read_bytes()
        # Cached by content: the same image uploaded twice has two paths.
        key = hashlib.sha256(data).digest()
        if key not in self.known:
            opened = safe_open(data, name)
            opened.thumbnail((MAX_SIDE, MAX_SIDE))
            self.known[key] = opened
            while len(self.known) > self.most:
                self.known.popitem(last=False)
        self.known.move_to_end(key)
        return self.known[key]


def checked_text(value: object, name: str = "text") -> str:
    """Check that a text has a bounded length and at least one word; returns it. Raises UserError."""
    if not isinstance(value, str):
        raise UserError(name, "is not text", "Write one")
    if len(value) > MAX_TEXT:
        raise UserError(name, f"{len(value):,} characters", f"Write at most {MAX_TEXT:,}")
    return check_text(value)


def lines_of(value: object) -> list[str]:
    """Texts, one per line. Raises UserError."""
    if not isinstance(value, str):
        raise UserError("texts", "are not texts", "Write some")
    # First bound the whole, before it is split.
    if len(value) > MAX_LINES * MAX_TEXT:
        todo = f"Write at most {MAX_LINES} lines of at most {MAX_TEXT:,}"
        raise UserError("texts", f"{len(value):,} characters", todo)
    lines = [line for line in value.splitlines() if line.strip()]
    if not 0 < len(lines) <= MAX_LINES:
        raise UserError("texts", f"{len(lines)} lines", f"Write 1 to {MAX_LINES}")
    return [checked_text(line) for line in lines]
