"""How the shell methods (`shell_methods.py`) query a model, and how its answers are printed."""

import argparse
import json
import random
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskvlm.cli.commands import COMMANDS
from maskvlm.cli.shell_methods import METHODS, PIPED, check_count, check_masked_share, read_box
from maskvlm.config.allowed_classes import OWN
from maskvlm.config.bundled_models import default_model
from maskvlm.config.given_options import nearest
from maskvlm.config.safe_yaml import cut
from maskvlm.data.images import BadImage
from maskvlm.data.inputs import is_image, open_image, save_image
from maskvlm.inference.pretrained import INPUT_WARNINGS, MOST_WARNINGS, WATCHED, PretrainedMaskVLM, unknown_line
from maskvlm.inference.rebuild import PARTS
from maskvlm.objectives.task import Task
from maskvlm.utils.errors import UserError

Answer = dict[str, Any]
ShellImage = str | bytes
"""The path of an image, or the encoded image from standard input."""


class Asked(NamedTuple):
    """An answer, and the inputs that it is about."""

    answer: Answer
    images: Sequence[ShellImage]
    texts: Sequence[str]


Ask = Callable[[PretrainedMaskVLM, list[Any], argparse.Namespace], Iterator[Asked | BadImage]]
"""Gives the answers; of several images, also the error of each that cannot be used."""


def ask_method(method: str, options: argparse.Namespace, allowed: list[str]) -> int:
    """Load the model, run the method and print the answers.

    Args:
        options: parsed by `shell_methods.method_parser`, and checked.
        allowed: packages that the model's classes may come from.

    Returns:
        The exit status: that of the first of several images that could not be used, 0 if there is none.
    """
    named = options.source is not None
    options.source = options.source or default_model("used")
    model = PretrainedMaskVLM.from_pretrained(options.source, device=options.device, allow_import=allowed)
    # The methods that a task adds are known only once its checkpoint is loaded.
    ask = ASKS.get(method) or task_ask(model, method)
    seen: dict[ShellImage, str | None] = {}
    code = 0
    with warn_afterwards(model):
        for each in ask(model, options.inputs, options):
            if isinstance(each, BadImage):
                print(f"error: {each}", file=sys.stderr, flush=True)
                code = code or int(each.code)
                continue
            answer, images, texts = each
            if options.json:
                whole = inputs_of(images, texts) | answer | cautions(model, images, texts, seen, method == "fill")
                print(json_line(whole), flush=True)
            else:
                print(answer_line(answer), flush=True)
    if named:  # for the bundled model this was printed already
        print(f"{options.source}: {model.knows}", file=sys.stderr, flush=True)
    return code


def typed_name(image: ShellImage) -> str:
    """What the user typed for an image."""
    return image if isinstance(image, str) else PIPED


def inputs_of(images: Sequence[ShellImage], texts: Sequence[str]) -> Answer:
    """The inputs that an answer is about, so that a line of JSON can be read without its command: `image` and `text`,
    or `images` and `texts` if there are several."""
    entries: Answer = {}
    for name, inputs in (("image", [*map(typed_name, images)]), ("text", texts)):
        if len(inputs) == 1:
            entries[name] = inputs[0]
        elif inputs:
            entries[f"{name}s"] = [*inputs]
    return entries


def cautions(
    model: PretrainedMaskVLM,
    images: Sequence[ShellImage],
    texts: Sequence[str],
    seen: dict[ShellImage, str | None],
    fills: bool = False,
) -> Answer:
    """Reasons to treat an answer about these inputs with care: `far`, a line for each image unlike the training data,
    `unknown_words`, `truncated`, a line for each text of which only the beginning is read, and `unused_masks`, a line
    for each text with [MASK]. An empty entry is left out.

    Args:
        seen: the result of `far` for the images of earlier answers; updated with these images.
        fills: whether the method fills in [MASK].
    """
    new = [image for image in dict.fromkeys(images) if image not in seen]
    seen.update(zip(new, model.far(new), strict=True))
    far = [f"{cut(typed_name(image), 300)}: {seen[image]}" for image in images if seen[image] is not None]
    entries = {"far": far, "unknown_words": model.unknown_words(texts), "truncated": model.truncated(texts)}
    entries["unused_masks"] = [] if fills else model.unused_masks(texts)
    return {name: each for name, each in entries.items() if each}


@contextmanager
def warn_afterwards(model: PretrainedMaskVLM, images: bool = True) -> Iterator[None]:
    """On exit, print a line to stderr for each image unlike the training data, or one for all of more than 16 (none if
    `images` is false), one for unknown words, one for texts that are too long, and one for texts with a [MASK] that is
    not filled in."""
    with warnings.catch_warnings():
        # Python would print the source location of each.
        for kind in INPUT_WARNINGS:
            warnings.simplefilter("ignore", kind)
        yield
    unknown = [unknown_line(model.warned_words)] if model.warned_words else []
    # A line that does not begin with a path is of the only image without one, that from standard input.
    far = [f"{PIPED}: {line}" if line.startswith("this image is unlike") else line for line in model.far_warnings]
    if len(far) > WATCHED:  # `caption` has asked about each image by itself
        # The model remembers no more than these.
        count = f"{len(far):,}{' or more' if len(far) == MOST_WARNINGS else ''}"
        told = f"{count} images are unlike those that the model was trained on (--json says which)"
        far = [f"{told}; take the answers with care"]
    texts = [first_with_count(warned) for warned in (model.truncated_warnings, model.mask_warnings) if warned]
    for line in (*(far if images else []), *unknown, *texts):
        print(f"warning: {line}", file=sys.stderr, flush=True)


def first_with_count(warned: Sequence[str]) -> str:
    """The first of the warnings about texts, with the number of the others."""
    others = len(warned) - 1
    return f"{warned[0]}; the same for {others} other text{'' if others == 1 else 's'}" if others else warned[0]


def json_line(answer: Answer) -> str:
    """The answer as JSON that is always valid UTF-8: undecodable bytes of a file name are escaped."""
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def answer_line(answer: Answer) -> str:
    """The entries on one line. Numbers have three decimals, and are preceded by their names if there are several. A
    single small probability keeps a significant digit, so that it can still be told from another."""
    several = sum(isinstance(value, int | float) for value in answer.values()) > 1

    def word(value: Any, alone: bool = True) -> str:
        if isinstance(value, float):
            return f"{value:.1e}" if alone and 0 < value < 5e-4 else f"{value:.3f}"
        if isinstance(value, dict):
            return "  ".join(f"{word(key)} {word(each, alone=False)}" for key, each in value.items())
        # Words and names are untrusted: no control characters reach the terminal.
        return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(value))

    return "  ".join(
        f"{name} {word(value)}" if several and isinstance(value, int | float) else word(value)
        for name, value in answer.items()
        if value is not None
    )


# ---------------------------------------------------------------------- the core's methods


def ask_fill(model: PretrainedMaskVLM, inputs: list[Any], options: argparse.Namespace) -> Iterator[Asked]:
    """The most likely words for each [MASK]."""
    image, text = inputs
    for guesses in model.fill_mask(image, text, options.top):
        words: dict[str, float] = {}
        for guess in guesses:
            # Some tokenizers have several tokens with the same text: keep the most likely.
            words.setdefault(guess.word, guess.probability)  # type: ignore[union-attr]
        yield Asked({"words": words}, [image], [text])


def ask_match(model: PretrainedMaskVLM, inputs: list[Any], options: argparse.Namespace) -> Iterator[Asked]:
    """The matching probability of each text."""
    image, *texts = inputs
    for text, probability in zip(texts, model.match(image, texts), strict=True):  # type: ignore[arg-type]
        yield Asked({"match": probability, "text": text}, [image], [text])


def ask_rank(model: PretrainedMaskVLM, inputs: list[Any], options: argparse.Namespace) -> Iterator[Asked | BadImage]:
    """The candidates, best first, without images that cannot be used."""
    query, *candidates = inputs
    if not is_image(query) and is_image(candidates[0]):
        bad = {place: error for place, each in enumerate(candidates) if (error := error_of(each)) is not None}
        yield from bad.values()
        candidates = [each for place, each in enumerate(candidates) if place not in bad]
        if not candidates:
            return
    for place, one in enumerate(model.rank(query, candidates, options.k), 1):
        ranked: Any = one
        candidate = candidates[ranked.place]
        named = typed_name(candidate)
        answer = {"rank": place, "match": ranked.match, "similarity": ranked.similarity, "candidate": named}
        image, text = (query, candidate) if is_image(query) else (candidate, query)
        yield Asked(answer, [image], [text])


def error_of(image: ShellImage) -> BadImage | None:
    """Why an image cannot be used; None if it can."""
    try:
        open_image(image)
    except BadImage as bad:
        return bad
    return None


def ask_caption(model: PretrainedMaskVLM, inputs: list[Any], options: argparse.Namespace) -> Iterator[Asked | BadImage]:
    """A caption for each image, or its error."""
    for image in inputs:
        try:
            answer = {"caption": model.caption(image)}
        except BadImage as bad:
            yield bad
            continue
        yield Asked({"image": typed_name(image), **answer} if len(inputs) > 1 else answer, [image], [])


def ask_score(model: PretrainedMaskVLM, inputs: list[Any], options: argparse.Namespace) -> Iterator[Asked]:
    """The score of each text, in nats."""
    image, *texts = inputs
    for text, value in zip(texts, model.score(image, texts), strict=True):  # type: ignore[arg-type]
        yield Asked({"score": value, "text": text}, [image], [text])


def ask_explain(model: PretrainedMaskVLM, inputs: list[Any], options: argparse.Namespace) -> Iterator[Asked]:
    """Where the heat map was written, and the patch with the highest weight."""
    image, text, word = inputs
    explanation: Any = model.explain(image, text, word)
    # Index into the flattened map -> (row, column)
    rows, columns = explanation.gradcam.shape
    row, column = divmod(int(explanation.gradcam.argmax()), columns)
    peak = f"'{word}' is seen most strongly in row {row + 1}, column {column + 1}, counted from 1 in {rows} x {columns}"
    if not explanation.gradcam.any():
        peak = f"no patch supports '{word}' (Grad-CAM is 0 everywhere; --json gives the attention)"
    answer = {"written": save_image(explanation.image, options.out)} | (
        {"word": word, "attention": explanation.attention.tolist(), "gradcam": explanation.gradcam.tolist()}
        if options.json
        else {"peak": peak}
    )
    yield Asked(answer, [image], [text])


def ask_reconstruct(model: PretrainedMaskVLM, inputs: list[Any], options: argparse.Namespace) -> Iterator[Asked]:
    """Where the image was written; all patches are filled in at once."""
    yield from paint(model.reconstruct, model, inputs, options)


def ask_inpaint(model: PretrainedMaskVLM, inputs: list[Any], options: argparse.Namespace) -> Iterator[Asked]:
    """Where the image was written; patches are filled in over several rounds."""
    yield from paint(model.inpaint, model, inputs, options)


def paint(
    how: Callable[..., Any], model: PretrainedMaskVLM, inputs: list[Any], options: argparse.Namespace
) -> Iterator[Asked]:
    """Mask patches as the options say, fill them in with `how`, and write the image."""
    image, text = inputs
    mask = box_mask(options.box, model.grid) if options.box else lot_mask(options.mask_ratio, options.seed, model.grid)
    written, masked = save_image(how(image, mask, text), options.out), int(mask.sum())
    answer = {"written": written, "masked": masked if options.json else f"{masked} of {mask.size} patches masked"}
    yield Asked(answer, [image], [text])


def lot_mask(share: float, seed: int, grid: tuple[int, int]) -> np.ndarray[Any, Any]:
    """A mask over a random share of the patches."""
    check_masked_share(share)
    patches = grid[0] * grid[1]
    if not round(share * patches):
        raise UserError("--mask-ratio", f"{share} masks none of the {patches} patches", "Give a larger share")
    # A separate generator: the same patches whatever else has drawn random numbers.
    chosen = random.Random(seed).sample(range(patches), round(share * patches))
    return np.isin(np.arange(patches), chosen).reshape(grid)


def box_mask(box: str, grid: tuple[int, int]) -> np.ndarray[Any, Any]:
    """A mask over the patches that a box touches."""
    left, top, right, bottom = read_box(box)
    # (rows, 1) and (1, columns); a patch that only shares an edge with the box does not count.
    rows, columns = np.arange(grid[0])[:, None], np.arange(grid[1])[None]
    down = (rows + 1 > top * grid[0]) & (rows < bottom * grid[0])
    across = (columns + 1 > left * grid[1]) & (columns < right * grid[1])
    mask: np.ndarray[Any, Any] = down & across
    return mask


def how_to_ask(task: Task, checkpoint: Path) -> str | None:
    """The command that queries a trained model, with the third-party packages that its parts come from. It uses the
    first method of the task, or else the first that the heads allow; None if there is no such method."""
    own = next(((name, method.shell_form) for name, method in task.methods.items()), None)
    core = ((name, known.form) for name, known in METHODS.items() if getattr(task, known.head, None) is not None)
    name_and_form = own or next(core, None)
    if name_and_form is None:
        return None
    name, form = name_and_form
    several = [each for value in vars(task).values() for each in (value if isinstance(value, list) else [value])]
    parts = [task, *(each for each in several if isinstance(each, PARTS))]
    packages = sorted({type(part).__module__.partition(".")[0] for part in parts} - {*OWN})
    trusted = [word for package in packages for word in ("--allow-import", package)]
    return f"{shlex.join(['maskvlm', name, *trusted, '--from', str(checkpoint)])} {form}"


def task_ask(model: PretrainedMaskVLM, method: str) -> Ask:
    """The method that the model's task adds. Raises UserError if there is none; its message lists the known ones."""
    task_method = model.task.methods.get(method)
    if task_method is None:
        # The core methods for which this checkpoint has a head, then the task's own.
        core = [name for name, known in METHODS.items() if getattr(model.task, known.head, None) is not None]
        known = ", ".join([*core, *model.task.methods])
        near = nearest(method, COMMANDS, 0.6)
        meant = f"; did you mean {near}?" if near else ""
        raise UserError(
            method, f"not a method of this checkpoint ({type(model.task).__name__}{meant})", f"Available: {known}"
        )

    def answers(model: PretrainedMaskVLM, inputs: list[Any], options: argparse.Namespace) -> Iterator[Asked]:
        check_count(inputs, task_method.form, task_method.inputs, task_method.inputs, method)
        answer = getattr(model, method)(*inputs)
        shown = answer._asdict() if options.json else {"answer": answer[0], "probability": answer[1]}
        yield Asked(shown, inputs[: task_method.images], inputs[task_method.images :])

    return answers


ASKS: dict[str, Ask] = {
    "fill": ask_fill,
    "match": ask_match,
    "rank": ask_rank,
    "caption": ask_caption,
    "score": ask_score,
    "explain": ask_explain,
    "reconstruct": ask_reconstruct,
    "inpaint": ask_inpaint,
}
