"""What the page takes from strangers behind its door: images, texts, and the time that an answer may take."""

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
from maskvlm.inference.pretrained import UnknownWords
from maskvlm.objectives.novelty import FarFromTraining
from maskvlm.utils.errors import ExitCode, UserError

ANSWER_SECONDS = 20.0
QUEUE = 24  # questions that wait
MAX_TEXT = 1000  # characters
MAX_LINES = 20  # texts at once
MAX_SIDE = 1024  # pixels of an image that is kept; models see far fewer
OWN = "own-"
"""How the name of one of the page's own images begins; after it comes the SHA-256 of its bytes."""

T = TypeVar("T")


class Worker:
    """One thread for all that decodes and computes, so that many questions cost memory for one.

    A thread cannot be stopped: a question that takes too long is given up, not ended, and what waits behind it is given
    up too. What is asked is bounded above, so that it ends.
    """

    def __init__(self, seconds: float = ANSWER_SECONDS) -> None:
        self.seconds, self.pool = seconds, ThreadPoolExecutor(1)

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Raises UserError: no answer in time; and whatever the function raises."""
        future = self.pool.submit(_quietly, function, *arguments)
        # Not by `result(seconds)`: its TimeoutError may as well be the function's own.
        done, _ = wait([future], self.seconds)
        if not done:
            # Takes it back where it still waits; one that runs goes on to its end.
            future.cancel()
            what, todo = f"no answer within {self.seconds:g} seconds", "Try again, with less at once"
            raise UserError("model", what, todo, ExitCode.UNAVAILABLE)
        return future.result()


def _quietly(function: Callable[..., T], *arguments: Any) -> T:
    """Without warnings of strange words and images: Python remembers each that it has shown, and visitors bring any
    number. The page tells both in places of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FarFromTraining)
        warnings.simplefilter("ignore", UnknownWords)
        return function(*arguments)


class Opener:
    """Uploads to images, through `safe_open`; the last few are kept, since each is asked about again and again.

    The page's own images stay in memory: no file of theirs is removed while somebody looks at them.
    """

    def __init__(self, most: int = 16) -> None:
        self.most, self.known = most, OrderedDict[bytes, Image.Image]()
        self.own = dict[str, bytes]()

    def keep(self, image: Image.Image) -> str:
        """Take in one of the page's own images; returns the name that opens it again."""
        file = io.BytesIO()
        image.save(file, "PNG")
        name = OWN + hashlib.sha256(file.getvalue()).hexdigest()
        self.own[name] = file.getvalue()
        return name

    def __call__(self, path: str | None, name: str = "image") -> Image.Image:
        """Raises BadImage, or UserError where there is none."""
        if not path:
            raise UserError(name, "there is none", "Drop one in, or choose an example")
        file = Path(path)
        if path not in self.own and not file.is_file():
            raise UserError(name, "is here no more", "Drop it in again", ExitCode.MISSING_INPUT)
        data = self.own[path] if path in self.own else file.read_bytes()
        # By content: the same image uploaded twice lies at two paths.
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
    """A text of bounded length with a word in it. Raises UserError."""
    if not isinstance(value, str):
        raise UserError(name, "is no text", "Write one")
    if len(value) > MAX_TEXT:
        raise UserError(name, f"{len(value):,} characters", f"Write at most {MAX_TEXT:,}")
    return check_text(value)


def lines_of(value: object) -> list[str]:
    """Texts, one a line. Raises UserError."""
    if not isinstance(value, str):
        raise UserError("texts", "are no texts", "Write some")
    # Bounded as a whole first, before it is taken apart.
    if len(value) > MAX_LINES * MAX_TEXT:
        todo = f"Write at most {MAX_LINES} lines of at most {MAX_TEXT:,}"
        raise UserError("texts", f"{len(value):,} characters", todo)
    lines = [line for line in value.splitlines() if line.strip()]
    if not 0 < len(lines) <= MAX_LINES:
        raise UserError("texts", f"{len(lines)} lines", f"Write 1 to {MAX_LINES}")
    return [checked_text(line) for line in lines]
