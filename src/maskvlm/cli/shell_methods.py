"""The methods of a model in the shell: their arguments, and checks of what was typed.

Nothing here imports torch, which takes seconds, so that mistakes are reported at once.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from maskvlm.config.arguments import OptionParser
from maskvlm.config.bundled_models import DEFAULT
from maskvlm.config.safe_yaml import cut
from maskvlm.utils.errors import ExitCode, UserError


class ShellMethod(NamedTuple):
    """A method in the shell.

    Attributes:
        form: its inputs, as shown in the usage line.
        description: what it does.
        least, most: number of inputs that it takes; most is None if there is no limit.
        options: the names in OPTIONS that it takes.
        head: the head that it needs.
    """

    form: str
    description: str
    least: int
    most: int | None
    options: tuple[str, ...] = ()
    head: str = ""


PIPED = "-"
"""The input that stands for an image from standard input."""
PAINT = ("--out", "--mask-ratio", "--box", "--seed")
METHODS: dict[str, ShellMethod] = {
    "fill": ShellMethod(
        'IMAGE "a [MASK] on the [MASK]"', "fill in masked words from the image", 2, 2, ("--top",), "tokens"
    ),
    "match": ShellMethod("IMAGE TEXT ...", "probability that image and text match", 2, None, head="matching"),
    "rank": ShellMethod(
        "IMAGE TEXT ...  or  TEXT IMAGE ...",
        "order texts for an image, or images for a text, best first",
        2,
        None,
        ("--k",),
        "projection",
    ),
    "caption": ShellMethod("IMAGE ...", "write a caption for each image", 1, None, head="tokens"),
    "score": ShellMethod(
        "IMAGE TEXT ...", "pseudo-log-likelihood of each text given the image, in nats", 2, None, head="tokens"
    ),
    "explain": ShellMethod(
        "IMAGE TEXT WORD", "show where the model looks for a word; writes an image (--out)", 3, 3, ("--out",), "tokens"
    ),
    "reconstruct": ShellMethod(
        "IMAGE TEXT", "paint masked patches from the text; writes an image (--out)", 2, 2, PAINT, "pixels"
    ),
    "inpaint": ShellMethod(
        "IMAGE TEXT",
        "paint masked patches in rounds, the most certain first; writes an image (--out)",
        2,
        2,
        PAINT,
        "pixels",
    ),
}

OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "--out": ((), {"type": Path, "help": "image file to write (default: named after the method, such as explain.png)"}),
    "--k": ((), {"type": int, "default": 16, "help": "candidates to re-rank by matching (default: %(default)s)"}),
    "--top": ((), {"type": int, "default": 5, "help": "guesses per masked word (default: %(default)s)"}),
    "--mask-ratio": (
        ("--hide",),
        {
            "type": float,
            "default": 0.6,
            "help": "share of patches to mask at random (default: %(default)s; formerly --hide)",
        },
    ),
    "--box": (
        (),
        {"help": "mask the patches that touch this box instead: left,top,right,bottom, each from 0 to 1"},
    ),
    "--seed": ((), {"type": int, "default": 0, "help": "random seed of the mask (default: %(default)s)"}),
}
"""Options of some methods -> their other names, and their keyword arguments for argparse."""


def method_parser(method: str) -> argparse.ArgumentParser:
    """The parser of a method. A method that a task adds has the options common to all methods."""
    known = METHODS.get(method)
    description = known.description if known else "ask a fine-tuned model: its images, then the text"
    form = known.form if known else "IMAGE ... TEXT"
    parser = OptionParser(f"maskvlm {method}", description=description, allow_abbrev=False)
    parser.usage = f"maskvlm {method} [--from CHECKPOINT] {form} [options]"
    parser.add_argument("inputs", nargs="*", help=f"{form}; - is an image from standard input")
    parser.add_argument(
        "--from", dest="source", help=f"checkpoint file, Hugging Face folder or hub name (default: {DEFAULT})"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON per answer")
    parser.add_argument("--device", help="torch device, such as cuda (default: cpu)")
    for name in known.options if known else ():
        others, keywords = OPTIONS[name]
        parser.add_argument(name, *others, **keywords)
    return parser


# ---------------------------------------------------------------------- what can be wrong


def check_options(method: str, words: list[str]) -> None:
    """Raises UserError if an option of another method is given."""
    own = METHODS[method].options if method in METHODS else ()
    # Nothing after `--` is an option.
    words = words[: words.index("--")] if "--" in words else words
    for name, (others, _) in OPTIONS.items():
        typed = next((word for word in words if word.partition("=")[0] in (name, *others)), None)
        if typed is not None and name not in own:
            takers = [each for each, known in METHODS.items() if name in known.options]
            what = f"not an option of {method}, only of {', '.join(takers)}"
            raise UserError(typed.partition("=")[0], what, f"Leave it out, or see maskvlm {method} --help")


def check_typed(method: str, options: argparse.Namespace) -> None:
    """Check inputs and options as far as possible before a model is loaded. Methods that a task adds are not checked.

    Raises:
        UserError: an input or option is wrong.
    """
    if options.source == "":
        raise UserError("--from", "its value is empty", f"Name a checkpoint, or leave it out for {DEFAULT}")
    known = METHODS.get(method)
    if known is None:
        return
    inputs: list[str] = options.inputs
    check_count(inputs, known.form, known.least, known.most, method)
    if "TEXT IMAGE" not in known.form:
        check_images(method, inputs if known.form == "IMAGE ..." else inputs[:1], inputs[1:])
        check_texts([] if known.form == "IMAGE ..." else inputs[1:], "word" if method == "explain" else None)
    # A tokenizer may have its own mask token; whatever it is called, it is in brackets.
    if method == "fill" and not any(sign in inputs[1] for sign in "[<") and "mask" not in inputs[1].lower():
        raise UserError(f"text '{cut(inputs[1], 60)}'", "no word in it is masked", "Replace one with [MASK]")
    for name, least in (("k", 0), ("top", 1)):
        if getattr(options, name, least) < least:
            raise UserError(f"--{name}", f"{getattr(options, name)} is too few", f"Give {least} or more")
    if "--box" in known.options:
        if options.box is not None:
            read_box(options.box)
            for name, value in (("--mask-ratio", options.mask_ratio), ("--seed", options.seed)):
                if value != OPTIONS[name][1]["default"]:
                    raise UserError(
                        name, "has no effect with --box, which says what is masked", "Leave out one of them"
                    )
        check_masked_share(options.mask_ratio)
    if "--out" in known.options:
        options.out = options.out or Path(f"{method}.png")
        check_out(inputs[0], options.out)


def with_piped(method: str, inputs: list[str]) -> list[str | bytes]:
    """The inputs, with the encoded image from standard input in place of `-`, where the method takes an image.

    Raises:
        UserError: `-` is given for several images, or as `read_piped`.
        BadImage: as `read_piped`.
    """
    places = [place for place in image_places(method, inputs) if inputs[place] == PIPED]
    if not places:
        return [*inputs]
    if len(places) > 1:
        raise UserError(PIPED, "standard input gives one image", "Name the others")
    content = read_piped()
    return [content if place in places else each for place, each in enumerate(inputs)]


def read_piped() -> bytes:
    """The encoded image from standard input.

    Raises:
        UserError: it is a terminal (2), or closed or unreadable (74).
        BadImage: what it gives is not an image (65), see `images.safe_open`.
    """
    from maskvlm.data.images import MAX_FILE_BYTES, BadImage, safe_open

    todo = "Pipe one into the command (cat photo.jpg | maskvlm caption -), or name a file"
    try:
        if sys.stdin is None:  # closed before the command began
            raise OSError("it is closed")
        if sys.stdin.isatty():
            raise UserError(PIPED, "standard input is a terminal and gives no image", todo)
        content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        what = f"standard input cannot be read ({error.strerror or error})"
        raise UserError(PIPED, what, todo, ExitCode.IO_ERROR) from error
    if len(content) > MAX_FILE_BYTES:
        raise BadImage("standard input", "too large", f"more than {MAX_FILE_BYTES:,} bytes").without_row()
    try:
        safe_open(content, "standard input", least=1)
    except BadImage as bad:
        raise bad.without_row() from bad
    return content


def image_places(method: str, inputs: list[str]) -> range:
    """The places of a method's inputs where images may stand; the others are texts."""
    known = METHODS.get(method)
    if known is None:  # a task's own: how many images it takes is known once its checkpoint is loaded
        return range(len(inputs) - 1)
    if known.form == "IMAGE ...":
        return range(len(inputs))
    if "TEXT IMAGE" in known.form and inputs[0] != PIPED and not os.path.isfile(inputs[0]):
        return range(1, len(inputs))
    return range(1)


def check_count(inputs: list[str], form: str, least: int, most: int | None, method: str) -> None:
    """Raises UserError if the number of inputs is not one that the method takes."""
    if len(inputs) < least or (most is not None and len(inputs) > most):
        quotes = ", a text of several words in quotes" if len(inputs) > least and "IMAGE ..." not in form else ""
        what, todo = f"{len(inputs)} input{'' if len(inputs) == 1 else 's'}", f"Give {form}{quotes}"
        raise UserError(method, what, f"{todo} (maskvlm {method} --help)")


def check_images(method: str, images: list[str], rest: list[str]) -> None:
    """Check that an image exists and is one. Of several, each is reported when its turn comes, and the others answered.

    Raises:
        UserError: an image's name is empty, or a text is given in place of an image, and an image after it.
        BadImage: there is no such file, or it is not an image, see `images.safe_open`.
    """
    from maskvlm.data.images import BadImage, safe_open

    if "" in images:
        raise UserError(method, f"the name of image {images.index('') + 1} is empty", "Name an image file")
    if len(images) > 1:
        return
    image = images[0]
    # Not Path.exists, which raises OSError for a text that is too long to be a file name.
    if image != PIPED and not os.path.exists(image):
        after = next((each for each in rest if each == PIPED or os.path.isfile(each)), None)
        if after is not None:
            what = f"'{cut(image)}' is not a file, but {after} after it is {'an image' if after == PIPED else 'one'}"
            raise UserError(method, what, "Give the image before the text")
        raise BadImage(image, "missing").without_row()
    # A pipe can be read only once.
    if os.path.isfile(image) or os.path.isdir(image):
        try:
            # At an eighth of its size where the format allows it, as only damage is of interest.
            safe_open(image, image, least=1)
        except BadImage as bad:
            raise bad.without_row() from bad


def check_texts(texts: list[str], last: str | None) -> None:
    """Check that the texts have words. last: what the last one is called, if it is no text. Raises UserError."""
    from maskvlm.data.caption_text import clean_caption

    count = len(texts) - (last is not None)
    for number, text in enumerate(texts, 1):
        if not clean_caption(text)[0]:
            name = last if last and number > count else "text" if count == 1 else f"text {number}"
            raise UserError(name, "it has no words", "Write one")


def check_masked_share(share: float) -> None:
    """Raises UserError unless it is a number from 0 to 1."""
    if not 0 <= share <= 1:
        raise UserError("--mask-ratio", f"{share} is out of range", "Give a number from 0 to 1")


def read_box(box: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of `--box`, as fractions of the image. Raises UserError if it is not a valid box."""
    try:
        left, top, right, bottom = (float(part) for part in box.split(","))
    except ValueError:
        raise UserError(
            "--box", f"'{box}' is not a box", "Give left,top,right,bottom such as 0.2,0.2,0.7,0.7"
        ) from None
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise UserError("--box", f"{box} is outside of the image or empty", "Give shares of 0 to 1, left before right")
    return left, top, right, bottom


def check_out(image: str, out: Path) -> None:
    """Raises UserError if the output would overwrite the input image or has no extension of an image format."""
    if out.exists() and os.path.exists(image) and out.samefile(image):
        raise UserError(out, "is the input image, which would be overwritten", "Name another file: --out filled.png")
    check_ending(out)


def check_ending(out: Path) -> None:
    """Raises UserError if the file's extension is not that of an image format that can be written."""
    from PIL import Image

    # Some formats can only be read.
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        what = f"'{out.suffix}' is not an image file extension" if out.suffix else "it has no extension"
        raise UserError(out, f"cannot be written ({what})", "Name a file such as out.png")
