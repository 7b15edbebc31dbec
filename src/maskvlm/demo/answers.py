"""What the page shows: answers as HTML with all text escaped, and images embedded in that HTML."""

import io
import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from maskvlm.data.inputs import MASK, ImageInput
from maskvlm.demo.samples import Hit
from maskvlm.inference.infill import Guess
from maskvlm.inference.pretrained import PretrainedMaskVLM, unknown_line
from maskvlm.utils.errors import UserError

Mask = list[list[bool]]
BOARD = 384  # approximate side of an image with its patches, in pixels
MAX_IMAGE_SIDE = 400  # pixels per side; a board is a little larger or smaller than BOARD
DRAWN_COLOURS = 4096  # maximum number of colours of a drawn scene
COVER, LINE, FRAME = (64, 72, 88), (148, 163, 184), (245, 158, 11)
LENGTHS = (5, 8, 12)
"""Caption lengths to try, in tokens; few, as the page must answer quickly."""
_WORD = re.compile(rf"{re.escape(MASK)}|[\w'’-]+")


class SplitText(NamedTuple):
    """A text split into words, and the span of each."""

    text: str
    words: list[str]
    spans: list[tuple[int, int]]


def split_words(text: str) -> SplitText:
    """Words including apostrophes and hyphens; [MASK] is one word."""
    word_matches = list(_WORD.finditer(text))
    return SplitText(text, [each.group() for each in word_matches], [each.span() for each in word_matches])


def covered(text: str, chosen: Iterable[int]) -> tuple[str, list[str]]:
    """The text with [MASK] in place of the chosen words, and the word at each covered place, "" if it was [MASK]."""
    parts, truths = split_words(text), []
    which = set(chosen)
    covered_text, end = "", 0
    for number, (word, (start, stop)) in enumerate(zip(parts.words, parts.spans, strict=True)):
        masked = number in which or word == MASK
        # Text between words is kept unchanged.
        covered_text += text[end:start] + (MASK if masked else word)
        end = stop
        if masked:
            truths.append("" if word == MASK else word)
    return covered_text + text[end:], truths


def text_notes(model: PretrainedMaskVLM, texts: Sequence[str], fills: bool = False) -> str:
    """Notes on words that the model's tokenizer does not know, on texts that are longer than it reads, and on a [MASK]
    that stays; "" if there are none.

    Args:
        fills: whether the answer fills in [MASK].
    """
    words = model.unknown_words(texts)
    lines = [*([unknown_line(words)] if words else []), *model.truncated(texts)]
    if not fills and any(len(model.words.between_masks(text)) > 1 for text in texts):
        lines.append(f"{MASK} is read as plain text here; only the tab Words fills it in")
    return "".join(note(sentence(line)) for line in lines)


def words_filled(model: PretrainedMaskVLM, image: ImageInput | None, text: str, chosen: Sequence[int]) -> str:
    """Guesses for each covered word, with the image and without it."""
    masked, truths = covered(text, chosen)
    if not truths:
        return note(f"Click a word to cover it, or write {MASK} in the text.")
    without_image: Any = model.fill_mask(None, masked)
    # Without an image both would be equal.
    with_image: Any = model.fill_mask(image, masked) if image is not None else None
    # Escaped first; escaping does not change [MASK].
    parts = [f'<p class="sentence">{escape(masked).replace(MASK, "<b>▮▮▮</b>")}</p>']
    for number, truth in enumerate(truths):
        head = f"Word {number + 1}" + (f", covered: <b>{escape(truth)}</b>" if truth else "")
        sides = [] if with_image is None else [guesses("with the image", with_image[number], truth)]
        sides.append(guesses("without it", without_image[number], truth))
        parts.append(f'<section><h2>{head}</h2><div class="sides">{"".join(sides)}</div></section>')
    return "".join(parts)


def guesses(title: str, words: Sequence[Guess], truth: str) -> str:
    """Half of a word's answer: the most likely words with their probabilities."""
    # Ignoring case, which some tokenizers do not keep.
    rows = [(each.word, each.probability, each.word.lower() == truth.lower()) for each in words]
    return f'<div class="side"><h3>{escape(title)}</h3>{bars(rows)}</div>'


def bars(rows: Iterable[tuple[str, float, bool]]) -> str:
    """A table of texts, each with its probability as a bar and in percent; the true one is marked."""
    lines = []
    for word, share, right in rows:
        percent = 100 * min(1.0, max(0.0, share))
        mark = ' class="right"' if right else ""
        lines.append(
            f'<tr{mark}><th scope="row">{escape(word)}{" ✓" if right else ""}</th>'
            f'<td class="bar"><i style="width:{percent:.1f}%"></i></td><td class="number">{percent:.1f} %</td></tr>'
        )
    return f'<table class="bars">{"".join(lines)}</table>'


def data_address(image: Image.Image) -> str:
    """An image as a data URL: PNG if it has few colours, else JPEG."""
    rgb, file = image.convert("RGB"), io.BytesIO()
    rgb.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    kind, media = ("PNG", "png") if rgb.getcolors(DRAWN_COLOURS) else ("JPEG", "jpeg")
    rgb.save(file, kind, quality=90)
    return f"data:image/{media};base64,{b64encode(file.getvalue()).decode()}"


def picture(image: Image.Image, description: str) -> str:
    """An image as HTML; description: its alternative text."""
    return f'<img src="{data_address(image)}" alt="{escape(description)}">'


def choice_buttons(images: Iterable[tuple[Image.Image, str]]) -> str:
    """Images with their labels, as buttons."""
    parts = [
        f'<button type="button" data-index="{number}" aria-label="Example {number + 1}: {escape(label)}">'
        f"{picture(image, '')}</button>"
        for number, (image, label) in enumerate(images)
    ]
    return f'<div class="choices">{"".join(parts)}</div>'


def hits(ranking: Iterable[Hit], title: str) -> str:
    """The images found, best first, each with its caption."""
    figures = [
        f"<li><figure>{picture(hit.image, f'Number {number}')}"
        f"<figcaption>{escape(hit.label)}</figcaption></figure></li>"
        for number, hit in enumerate(ranking, 1)
    ]
    return f'<h2>{escape(title)}</h2><ol class="hits">{"".join(figures)}</ol>'


def sentence(line: str) -> str:
    """A line as a sentence; words other than the first keep their case."""
    return f"{line[0].upper()}{line[1:]}."


def note(line: str) -> str:
    """An informative line, as HTML."""
    return f'<p class="note">{marked(line)}</p>'


def problem(line: str) -> str:
    """An error of the visitor, as HTML that screen readers announce."""
    return f'<p class="problem" role="alert">{marked(line)}</p>'


def marked(line: str) -> str:
    """A line, escaped; text in backquotes becomes code."""
    # Escaping leaves backquotes unchanged, so the text between them is already escaped.
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(line))


def matches(model: PretrainedMaskVLM, image: ImageInput, texts: list[str]) -> str:
    """Each text with the probability that it belongs to the image, most likely first."""
    likely: Any = model.match([image], texts)
    order = sorted(zip(texts, likely, strict=True), key=lambda pair: -pair[1])
    return bars((text, share, False) for text, share in order)


def captioned(model: PretrainedMaskVLM, image: ImageInput) -> str:
    """A caption, and how well it belongs to the image."""
    text = str(model.caption(image, LENGTHS))
    if not text.strip():
        return note("The model finds no words for it.")
    likely: Any = model.match(image, text)
    line = f"Belongs to the image: {100 * likely:.1f} %. The most certain word was written first."
    return f'<p class="answer">{escape(text)}</p>{note(line)}'


def decided(answer: Any) -> str:
    """A task's answer, and the probabilities of the candidates."""
    # The answer is followed by its probability, or by those of all candidates.
    first, *others = answer
    shares = next((each for each in others if isinstance(each, dict)), None)
    if shares is None:
        shares = {str(first): float(others[0])} if others and isinstance(others[0], float) else {}
    best = list(shares.items())[:5]
    return f'<p class="answer">{escape(str(first))}</p>' + bars((str(name), float(p), False) for name, p in best)


# ---------------------------------------------------------------------- patches


def model_view(model: PretrainedMaskVLM, image: Image.Image) -> Image.Image:
    """The image as the model sees it: a small square."""
    side = model.image_size
    return image.resize((side, side), Image.Resampling.BICUBIC)


def enlarge(model: PretrainedMaskVLM, image: Image.Image) -> Image.Image:
    """Enlarge an image to about BOARD pixels, with whole pixels for each patch."""
    rows, columns = model.grid
    width, height = (max(1, round(BOARD / count)) * count for count in (columns, rows))
    return image.resize((width, height), Image.Resampling.NEAREST)


def boxes(size: tuple[int, int], mask: Mask) -> Iterable[tuple[bool, tuple[int, int, int, int]]]:
    """For each patch: whether it is covered, and its corners in pixels."""
    down, across = size[1] / len(mask), size[0] / len(mask[0])
    for row, line in enumerate(mask):
        for column, masked in enumerate(line):
            left, top = round(column * across), round(row * down)
            # Pillow includes the second corner.
            yield masked, (left, top, round((column + 1) * across) - 1, round((row + 1) * down) - 1)


def board(model: PretrainedMaskVLM, image: Image.Image, mask: Mask) -> Image.Image:
    """What the model sees, with its patches; covered ones are dark."""
    view = enlarge(model, model_view(model, image))
    draw = ImageDraw.Draw(view)
    for masked, box in boxes(view.size, mask):
        draw.rectangle(box, fill=COVER if masked else None, outline=LINE)
        if masked:
            left, top, right, bottom = box
            draw.line((left + 3, top + 3, right - 3, bottom - 3), fill=LINE, width=2)
            draw.line((left + 3, bottom - 3, right - 3, top + 3), fill=LINE, width=2)
    return view


def painted(model: PretrainedMaskVLM, image: Image.Image, mask: Mask, texts: Sequence[str]) -> list[Image.Image]:
    """The covered patches filled in from each of the texts, framed."""
    # All texts in one batch, with the same image and mask.
    paintings: Any = model.reconstruct([image] * len(texts), [mask] * len(texts), list(texts))
    framed = []
    for each in paintings:
        # Enlarged afterwards, so that the visitor sees the model's own pixels.
        large = enlarge(model, each)
        draw = ImageDraw.Draw(large)
        for masked, box in boxes(large.size, mask):
            if masked:
                # Thin on small patches, so that the frame does not hide them.
                draw.rectangle(box, outline=FRAME, width=min(3, max(1, (box[2] - box[0]) // 24)))
        framed.append(large)
    return framed


def buttons(image: Image.Image, mask: Mask) -> str:
    """A board as HTML: each patch is a button over its place. The Tab key reaches only the first; from there, the arrow
    keys reach the others (`page.js`)."""
    columns = len(mask[0])
    parts = [
        f'<button type="button" data-index="{row * columns + column}" aria-pressed="{str(masked).lower()}" '
        f'tabindex="{-1 if row or column else 0}" aria-label="Row {row + 1}, column {column + 1}"></button>'
        for row, line in enumerate(mask)
        for column, masked in enumerate(line)
    ]
    count = sum(map(sum, mask))
    description = f"The image in {len(mask)} × {columns} patches, {count} of them covered"
    style = f"grid-template-columns: repeat({columns}, 1fr)"
    group = f'role="group" aria-label="Patches to cover" data-columns="{columns}" style="{style}"'
    return f'<div class="board">{picture(image, description)}<div class="patches" {group}>{"".join(parts)}</div></div>'


def turned(mask: Mask, number: Any) -> Mask:
    """The mask with one patch toggled, counted row by row. Raises UserError: there is no such patch."""
    # The number comes from a browser and may be anything.
    if type(number) is not int or not 0 <= number < len(mask) * len(mask[0]):
        raise UserError("patches", "that is not a patch of the image", "Click on the image")
    place = divmod(number, len(mask[0]))
    return [[masked != ((r, c) == place) for c, masked in enumerate(line)] for r, line in enumerate(mask)]


def by_lot(grid: tuple[int, int], share: float = 0.6) -> Mask:
    """A random mask over a share of the patches, different at every call."""
    count = grid[0] * grid[1]
    chosen = np.random.default_rng().permutation(count)[: round(share * count)]
    return [[row * grid[1] + column in chosen for column in range(grid[1])] for row in range(grid[0])]


def fitted(mask: Mask, grid: tuple[int, int]) -> Mask:
    """The mask, or an empty one if it belongs to another run's grid."""
    return mask if (len(mask), len(mask[0]) if mask else 0) == tuple(grid) else empty(grid)


def empty(grid: tuple[int, int]) -> Mask:
    """A mask that covers no patch."""
    return [[False] * grid[1] for _ in range(grid[0])]
