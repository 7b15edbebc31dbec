"""`maskvlm METHOD --from CHECKPOINT image.jpg "text"`: the methods of a model in the shell.

Answers are for reading; with `--json` one line of JSON each. Images go to `--out`.
"""

import argparse
import json
import random
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from maskvlm.cli.commands import COMMANDS
from maskvlm.config.allowed_classes import OWN
from maskvlm.config.arguments import OptionParser
from maskvlm.config.bundled_models import DEFAULT, default_model
from maskvlm.config.given_options import nearest
from maskvlm.config.safe_yaml import cut
from maskvlm.data.inputs import MASK
from maskvlm.inference.pretrained import PretrainedMaskVLM, UnknownWords, unknown_line
from maskvlm.inference.rebuild import PARTS
from maskvlm.objectives.novelty import FarFromTraining
from maskvlm.objectives.task import Task
from maskvlm.utils.errors import UserError

Answer = dict[str, Any]


class ShellMethod(NamedTuple):
    """A method in the shell: what follows it, what it is for, how it is asked, and which head it needs."""

    form: str
    told: str
    ask: Callable[[PretrainedMaskVLM, list[str], argparse.Namespace], Iterator[Answer]]
    head: str = ""


def main(arguments: list[str], allowed: list[str]) -> int:
    """Ask; arguments begin with the method."""
    method, parser = arguments[0], method_parser(arguments[0])
    options = parser.parse_args(arguments[1:])
    # The parser takes both names for one option, so only the words tell which was typed.
    if any(word.partition("=")[0] == "--hide" for word in arguments):
        print("warning: --hide is called --mask-ratio now", file=sys.stderr, flush=True)
    check_image_first(method, options.inputs)
    named = options.source is not None
    options.source = options.source or default_model("asked")
    model = PretrainedMaskVLM.from_pretrained(options.source, device=options.device, allow_import=allowed)
    # What a task brings is known only once its checkpoint is loaded.
    known = METHODS.get(method) or task_method(model, method)
    with told_after(model):
        for answer in known.ask(model, options.inputs, options):
            print(json.dumps(answer, ensure_ascii=False) if options.json else answer_line(answer), flush=True)
    if named:  # of the model that comes along it was said
        print(f"{options.source}: {model.knows}", file=sys.stderr, flush=True)
    return 0


@contextmanager
def told_after(model: PretrainedMaskVLM) -> Iterator[None]:
    """At the end a line on stderr for each image that is unlike the training data, and for words that are not known."""
    with warnings.catch_warnings():
        # Python would show a place in the code with each.
        for kind in (FarFromTraining, UnknownWords):
            warnings.simplefilter("ignore", kind)
        yield
    for line in (*model.told_far, *([unknown_line(model.told_words)] if model.told_words else [])):
        print(f"warning: {line}", file=sys.stderr, flush=True)


def method_parser(method: str) -> argparse.ArgumentParser:
    """The options of all methods."""
    known = METHODS.get(method)
    told = known.told if known else "what a fine-tuned model answers: its images, then the text"
    form = known.form if known else "IMAGE ... TEXT"
    parser = OptionParser(f"maskvlm {method}", description=told, allow_abbrev=False)
    parser.usage = f"maskvlm {method} [--from CHECKPOINT] {form} [options]"
    parser.add_argument("inputs", nargs="*", help=form)
    parser.add_argument("--from", dest="source", help=f"a checkpoint, a folder or name of the hub ({DEFAULT})")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each answer")
    parser.add_argument("--out", type=Path, help="where an image is written")
    parser.add_argument("--device", help="such as cuda; the CPU if left out")
    parser.add_argument("--k", type=int, default=16, help="rank: candidates that matching looks at again")
    parser.add_argument("--top", type=int, default=5, help="fill: guesses for each masked word")
    told = "reconstruct, inpaint: share of patches masked at random (--hide in earlier versions)"
    parser.add_argument("--mask-ratio", "--hide", type=float, default=0.6, help=told)
    parser.add_argument("--box", help="or the patches that this box touches: left,top,right,bottom as shares of 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="of that lot")
    return parser


def answer_line(answer: Answer) -> str:
    """Its entries on one line; numbers with three digits."""

    def word(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3f}"
        if isinstance(value, dict):
            return "  ".join(f"{key} {word(each)}" for key, each in value.items())
        # Words and names may be anybody's: nothing that a terminal obeys is printed.
        return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(value))

    return "  ".join(word(value) for value in answer.values() if value is not None)


def take(inputs: list[str], form: str, least: int, most: int | None, method: str) -> list[str]:
    """The inputs, as many as the method takes. Raises UserError."""
    if len(inputs) < least or (most is not None and len(inputs) > most):
        raise UserError(method, f"{len(inputs)} inputs", f"Give {form}")
    return inputs


def check_image_first(method: str, inputs: list[str]) -> None:
    """Whether a text stands where an image belongs, and an image after it.

    Raises:
        UserError: it does.
    """
    known = METHODS.get(method)
    if known is None or "TEXT IMAGE" in known.form or not inputs or Path(inputs[0]).is_file():
        return
    image = next((each for each in inputs[1:] if Path(each).is_file()), None)
    if image is not None:
        what = f"'{cut(inputs[0])}' is no file, and {image} after it is one"
        raise UserError(method, what, "Give the image before the text")


# ---------------------------------------------------------------------- the core's methods


def ask_fill(model: PretrainedMaskVLM, inputs: list[str], options: argparse.Namespace) -> Iterator[Answer]:
    """The likeliest words of each [MASK]."""
    image, text = take(inputs, METHODS["fill"].form, 2, 2, "fill")
    for guesses in model.fill_mask(image, text, options.top):
        yield {"words": {guess.word: guess.probability for guess in guesses}}  # type: ignore[union-attr]


def ask_match(model: PretrainedMaskVLM, inputs: list[str], options: argparse.Namespace) -> Iterator[Answer]:
    """Probability of each text."""
    image, *texts = take(inputs, METHODS["match"].form, 2, None, "match")
    for text, probability in zip(texts, model.match(image, texts), strict=True):  # type: ignore[arg-type]
        yield {"match": probability, "text": text}


def ask_rank(model: PretrainedMaskVLM, inputs: list[str], options: argparse.Namespace) -> Iterator[Answer]:
    """What was given, the best first."""
    query, *candidates = take(inputs, METHODS["rank"].form, 2, None, "rank")
    for place, one in enumerate(model.rank(query, candidates, options.k), 1):
        ranked: Any = one
        told = {"rank": place, "match": ranked.match, "similarity": ranked.similarity}
        yield told | {"candidate": candidates[ranked.place]}


def ask_caption(model: PretrainedMaskVLM, inputs: list[str], options: argparse.Namespace) -> Iterator[Answer]:
    """A caption of each image."""
    images = take(inputs, METHODS["caption"].form, 1, None, "caption")
    for image in images:
        told = {"caption": model.caption(image)}
        yield {"image": image, **told} if len(images) > 1 or options.json else told


def ask_score(model: PretrainedMaskVLM, inputs: list[str], options: argparse.Namespace) -> Iterator[Answer]:
    """Nats of each text."""
    image, *texts = take(inputs, METHODS["score"].form, 2, None, "score")
    for text, value in zip(texts, model.score(image, texts), strict=True):  # type: ignore[arg-type]
        yield {"score": value, "text": text}


def ask_explain(model: PretrainedMaskVLM, inputs: list[str], options: argparse.Namespace) -> Iterator[Answer]:
    """Where the heat map was written, and which patches weigh most."""
    image, text, word = take(inputs, METHODS["explain"].form, 3, 3, "explain")
    check_out(image, options.out, "explain.png")
    found: Any = model.explain(image, text, word)
    # Place in the flat map -> (row, column)
    row, column = divmod(int(found.gradcam.argmax()), found.gradcam.shape[1])
    yield {"written": save_image(found.image, options.out, "explain.png")} | (
        {"word": word, "attention": found.attention.tolist(), "gradcam": found.gradcam.tolist()}
        if options.json
        else {"peak": f"'{word}' is seen most in row {row + 1}, column {column + 1} of {found.gradcam.shape}"}
    )


def ask_reconstruct(model: PretrainedMaskVLM, inputs: list[str], options: argparse.Namespace) -> Iterator[Answer]:
    """Where the image was written; all patches at once."""
    yield from paint(model.reconstruct, model, inputs, options, "reconstruct")


def ask_inpaint(model: PretrainedMaskVLM, inputs: list[str], options: argparse.Namespace) -> Iterator[Answer]:
    """Where the image was written; patches in rounds."""
    yield from paint(model.inpaint, model, inputs, options, "inpaint")


def paint(
    how: Callable[..., Any], model: PretrainedMaskVLM, inputs: list[str], options: argparse.Namespace, method: str
) -> Iterator[Answer]:
    """Mask patches by the options, fill them in by `how`, and write the image."""
    image, text = take(inputs, METHODS[method].form, 2, 2, method)
    check_out(image, options.out, f"{method}.png")
    mask = box_mask(options.box, model.grid) if options.box else lot_mask(options.mask_ratio, options.seed, model.grid)
    yield {"written": save_image(how(image, mask, text), options.out, f"{method}.png"), "masked": int(mask.sum())}


def lot_mask(share: float, seed: int, grid: tuple[int, int]) -> np.ndarray[Any, Any]:
    """A share of the patches, masked at random."""
    if not 0 <= share <= 1:
        raise UserError("--mask-ratio", f"{share} is no share", "Give a number from 0 to 1")
    patches = grid[0] * grid[1]
    # A generator of its own: the same patches whatever else has drawn numbers.
    chosen = random.Random(seed).sample(range(patches), round(share * patches))
    return np.isin(np.arange(patches), chosen).reshape(grid)


def box_mask(box: str, grid: tuple[int, int]) -> np.ndarray[Any, Any]:
    """The patches that a box touches."""
    try:
        left, top, right, bottom = (float(part) for part in box.split(","))
    except ValueError:
        raise UserError("--box", f"'{box}' is no box", "Give left,top,right,bottom such as 0.2,0.2,0.7,0.7") from None
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise UserError("--box", f"{box} is outside of the image or empty", "Give shares of 0 to 1, left before right")
    # (rows, 1) and (1, columns); a patch that only shares an edge with the box is not touched.
    rows, columns = np.arange(grid[0])[:, None], np.arange(grid[1])[None]
    down = (rows + 1 > top * grid[0]) & (rows < bottom * grid[0])
    across = (columns + 1 > left * grid[1]) & (columns < right * grid[1])
    found: np.ndarray[Any, Any] = down & across
    return found


def check_out(image: str, out: Path | None, name: str) -> None:
    """Raises UserError where the answer would be written over the image that is asked about."""
    path = out or Path(name)
    if path.exists() and Path(image).exists() and path.samefile(image):
        raise UserError(path, "is the image itself, which would be lost", "Name another file: --out filled.png")


def save_image(image: Image.Image, out: Path | None, name: str) -> str:
    """Write an image; returns where."""
    path = out or Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except (OSError, ValueError) as error:
        raise UserError(path, f"cannot be written ({error})", "Name another file, such as out.png") from error
    return str(path)


def how_to_ask(task: Task, checkpoint: Path) -> str | None:
    """The command that asks a trained model: by the first method of its task, or the first that its heads allow, with
    the packages of others that its parts are from; None where there is no such method."""
    own = next(((name, method.shell_form) for name, method in task.methods.items()), None)
    core = ((name, known.form) for name, known in METHODS.items() if getattr(task, known.head, None) is not None)
    found = own or next(core, None)
    if found is None:
        return None
    name, form = found
    several = [each for value in vars(task).values() for each in (value if isinstance(value, list) else [value])]
    parts = [task, *(each for each in several if isinstance(each, PARTS))]
    packages = sorted({type(part).__module__.partition(".")[0] for part in parts} - {*OWN})
    trusted = [word for package in packages for word in ("--allow-import", package)]
    return f"{shlex.join(['maskvlm', name, *trusted, '--from', str(checkpoint)])} {form}"


def task_method(model: PretrainedMaskVLM, method: str) -> ShellMethod:
    """The method that the model's task brings. Raises UserError, which lists those there are."""
    found = model.task.methods.get(method)
    if found is None:
        # The core's methods for which this checkpoint has the head, then the task's own.
        core = [name for name, known in METHODS.items() if getattr(model.task, known.head, None) is not None]
        known = ", ".join([*core, *model.task.methods])
        near = nearest(method, COMMANDS, 0.6)
        meant = f"; did you mean {near}?" if near else ""
        raise UserError(
            method, f"no method of this checkpoint ({type(model.task).__name__}{meant})", f"There are: {known}"
        )

    def ask(model: PretrainedMaskVLM, inputs: list[str], options: argparse.Namespace) -> Iterator[Answer]:
        take(inputs, found.form, found.inputs, found.inputs, method)
        answer = getattr(model, method)(*inputs)
        yield answer._asdict() if options.json else {"answer": answer[0], "probability": answer[1]}

    return ShellMethod(found.form, found.told, ask)


METHODS: dict[str, ShellMethod] = {
    "fill": ShellMethod(f'IMAGE "a {MASK} on the {MASK}"', "fill in masked words from the image", ask_fill, "tokens"),
    "match": ShellMethod("IMAGE TEXT ...", "probability that image and text belong together", ask_match, "matching"),
    "rank": ShellMethod(
        "IMAGE TEXT ...  or  TEXT IMAGE ...", "texts or images, the best first", ask_rank, "projection"
    ),
    "caption": ShellMethod("IMAGE ...", "write a caption", ask_caption, "tokens"),
    "score": ShellMethod("IMAGE TEXT ...", "pseudo-log-likelihood of texts, nats", ask_score, "tokens"),
    "explain": ShellMethod("IMAGE TEXT WORD", "where the model looks for a word (--out)", ask_explain, "tokens"),
    "reconstruct": ShellMethod("IMAGE TEXT", "fill in masked patches from the text (--out)", ask_reconstruct, "pixels"),
    "inpaint": ShellMethod("IMAGE TEXT", "the same in rounds, the most certain first (--out)", ask_inpaint, "pixels"),
}
