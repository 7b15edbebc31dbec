"""`reconstructions.png`: masked pairs, and what the model fills in with the right partner and without it.

Captions are in a fixed-width font, so that words can be shaded.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskvlm.data.batch import Batch
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.objectives.reconstructed_examples import Guesses, Reconstruction, reconstruct, subsample
from maskvlm.reporting.page import GREEN, GREY, RED, Line, Page, Segment

IMAGE, GAP, MARGIN, TEXT = 1.44, 0.08, 0.15, 6.1  # inches; TEXT is the width of the text column
POINTS = 7.2  # ten pixels at 100 per inch, where a character takes exactly six, so that columns align
SPACE = 0.22  # inches between rows
LINE, CHARACTER = 0.14, 0.06  # inches per line and per character of DejaVu Sans Mono
WRAP = int(TEXT / CHARACTER)
WORD, GUESS, SIDE = 14, 9, 36  # characters: the masked word, a guess, three guesses with their percentages
MOST_WORDS = 8
CLOSING = set(".,;:!?)%'")  # no space before these


def reconstructions(
    backbone: MaskVLM, task: MaskedPretraining, batch: Batch, tokenizer: Any, path: Path, count: int = 12
) -> Path:
    """Draw held-out pairs with what the model fills in.

    Each row shows the image, the image with patches masked, filled in with its caption, and filled in with a wrong one.
    Beside them are the caption with masked words shaded, and the most likely guesses for each masked word with the
    image and with a blank one, green if right and red if wrong.

    Args:
        backbone, task: in evaluation mode.
        batch: an evaluation batch.
        tokenizer: turns ids into words.
        path: path of the PNG; its folder must exist.
        count: number of rows.

    Returns:
        `path`.
    """
    return draw_reconstruction(reconstruct(backbone, task, subsample(batch, count)), tokenizer).save(path)


def draw_reconstruction(result: Reconstruction, tokenizer: Any) -> Page:
    """One row per pair, as high as its text needs."""
    # Sizes first, as a page is created with a fixed size.
    columns = image_columns(result)
    texts = [words_of_row(result, row, tokenizer) for row in range(len(result.image_BCHW))]
    heights = [max(IMAGE + 0.2, LINE * len(text)) + SPACE for text in texts]
    width = 2 * MARGIN + len(columns) * (IMAGE + GAP) + GAP + TEXT
    page = Page(width, sum(heights) + 2 * MARGIN + 2 * LINE, POINTS)
    top = MARGIN
    # The headings.
    for place, (title, _, _) in enumerate(columns):
        left = MARGIN + place * (IMAGE + GAP)
        page.line(left, top, [Segment(title, bold=True)])
    words = [
        Segment("caption, masked words shaded", bold=True),
        Segment("  (percentages: the likeliest guesses)"),
    ]
    page.line(MARGIN + len(columns) * (IMAGE + GAP) + GAP, top, words)
    # The filled-in patches use true statistics, which the reader must know.
    if result.true_statistics and len(columns) > 2:
        note = [Segment("each patch has its true mean and contrast (pixel_norm)", GREY)]
        page.line(MARGIN + 2 * (IMAGE + GAP), top + LINE, note)
    top += 2 * LINE
    # [columns with an error, B]
    errors = torch.stack([error_B for _, _, error_B in columns if error_B is not None] or [torch.empty(0)])
    for row, (text, height) in enumerate(zip(texts, heights, strict=True)):
        for place, (_, image_BCHW, error_B) in enumerate(columns):
            left = MARGIN + place * (IMAGE + GAP)
            # [C, H, W] -> [H, W, C]
            page.image(left, top, IMAGE, image_BCHW[row].permute(1, 2, 0).cpu().numpy())
            if error_B is not None:
                page.line(left, top + IMAGE + 0.03, [error_text(error_B[row], errors[:, row])])
        left = MARGIN + len(columns) * (IMAGE + GAP) + GAP
        for number, line in enumerate(text):
            page.line(left, top + number * LINE, line)
        top += height
        if row + 1 < len(texts):
            page.rule(MARGIN, width - MARGIN, top - SPACE / 2)
    return page


def image_columns(result: Reconstruction) -> list[tuple[str, Tensor, Tensor | None]]:
    """Title, images and errors (None if there are none) of each column."""
    columns: list[tuple[str, Tensor, Tensor | None]] = [("image", result.image_BCHW, None)]
    if result.images is not None:
        masked, filled, wrong, error, error_wrong = result.images
        columns += [("patches masked", masked, None), ("with its caption", filled, error)]
        if len(masked) > 1:  # the wrong caption is the next row's
            columns += [("with a wrong caption", wrong, error_wrong)]
    return columns


def error_text(error: Tensor, errors: Tensor) -> Segment:
    """The error below an image, green if it is the smallest of its row."""
    texts = {f"{value:.3f}" for value in errors.tolist()}
    best = len(texts) > 1 and bool((error <= errors).all())
    return Segment(f"error {error:.3f}", GREEN if best else GREY, bold=best)


# ---------------------------------------------------------------------- words


def words_of_row(result: Reconstruction, row: int, tokenizer: Any) -> list[Line]:
    """The text column: the caption, the wrong one, and the guesses for each masked word."""
    # The wrong caption is the next row's, as `reconstruct` rolls them; the last row gets the first one's.
    batch, other = result.batch, (row + 1) % len(result.image_BCHW)
    masked: set[int] = set()
    if result.words is not None:
        # K positions, of which the unmasked ones are padding.
        index_K, masked_K = result.words.index_BK[row], result.words.masked_BK[row]
        masked = set(index_K[masked_K].tolist())
    lines = wrap(caption_pieces(batch, row, tokenizer, masked), WRAP)
    if result.images is not None and other != row:
        wrong = [Segment("wrong: ", GREY)]
        wrong += [piece._replace(colour=GREY) for piece in caption_pieces(batch, other, tokenizer, set())]
        lines += wrap(wrong, WRAP)
    if result.words is not None:
        head = f"{'masked word':{WORD}}{'with its image':{SIDE}}without an image"
        lines += [[], [Segment(head, GREY)]]
        places = sorted(masked)
        lines += [guess_line(result, row, place, tokenizer) for place in places[:MOST_WORDS]]
        if len(places) > MOST_WORDS:
            lines.append([Segment(f"and {len(places) - MOST_WORDS} more", GREY)])
    return lines


def caption_pieces(batch: Batch, row: int, tokenizer: Any, masked: set[int]) -> list[Segment]:
    """The caption token by token, with spaces between words and masked tokens shaded."""
    pieces: list[Segment] = []
    last = -1
    words = batch.word_CT[row].tolist()
    for place, token in enumerate(batch.token_CT[row].tolist()):
        # Start, end and padding.
        if words[place] < 0:
            continue
        text = piece_text(tokenizer, token)
        # A space before each word, not between its tokens.
        if pieces and words[place] != last and text not in CLOSING:
            pieces.append(Segment(" "))
        pieces.append(Segment(text, shade=place in masked, bold=place in masked))
        last = words[place]
    return pieces


def piece_text(tokenizer: Any, token: int) -> str:
    """A token for display, without WordPiece's `##` or RoBERTa's leading space."""
    text = tokenizer.decode([token]).strip()
    return text[2:] if text.startswith("##") and len(text) > 2 else text


def wrap(pieces: list[Segment], width: int) -> list[Line]:
    """Lines of at most `width` characters, broken at spaces; a longer word is cut."""
    lines: list[Line] = [[]]
    used = 0
    for word in group_words(pieces):
        length = sum(len(piece.text) for piece in word)
        if used and used + length > width:
            lines.append([])
            used = 0
            # A line does not start with a space.
            word = word[1:] if word[0].text == " " else word
        lines[-1] += word
        used += sum(len(piece.text) for piece in word)
    # A line can only be too long if a single word is.
    return [cut_line(line, width) for line in lines]


def group_words(pieces: list[Segment]) -> list[Line]:
    """Pieces grouped into words: each group starts at a space."""
    groups: list[Line] = []
    for piece in pieces:
        if piece.text == " " or not groups:
            groups.append([])
        groups[-1].append(piece)
    return groups


def cut_line(line: Line, width: int) -> Line:
    """The first `width` characters."""
    pieces, room = [], width
    for piece in line:
        pieces.append(piece._replace(text=piece.text[:room]))
        room -= len(pieces[-1].text)
    return [piece for piece in pieces if piece.text]


def guess_line(result: Reconstruction, row: int, place: int, tokenizer: Any) -> Line:
    """A masked word and the most likely guesses for it with the image and without."""
    assert result.words is not None
    target = int(result.batch.token_CT[row, place])
    # Position in the text (of T) -> index among the masked positions (of K).
    position = int((result.words.index_BK[row] == place).nonzero()[0, 0])
    line = [Segment(f"{shorten(piece_text(tokenizer, target), WORD - 2):{WORD}}", bold=True)]
    for guesses in (result.words.with_image, result.words.without_image):
        line += guess_segments(guesses, row, position, target, tokenizer)
    return line


def guess_segments(guesses: Guesses, row: int, position: int, target: int, tokenizer: Any) -> Line:
    """Guesses such as `red 92  blue 3  big 1`: the target green, a wrong first guess red, the others grey."""
    segments, used = [], 0
    tokens, shares = (
        guesses.token_BKG[row, position].tolist(),
        guesses.probability_BKG[row, position].tolist(),
    )
    for number, (token, share) in enumerate(zip(tokens, shares, strict=True)):
        colour = GREEN if token == target else RED if number == 0 else GREY
        text = f"{shorten(piece_text(tokenizer, token), GUESS)} {100 * share:.0f}"
        segments += [Segment(text, colour, bold=number == 0), Segment("  ")]
        used += len(text) + 2
    # As wide as the heading, so that the guesses without an image start below theirs.
    return [*segments, Segment(" " * max(0, SIDE - used))]


def shorten(text: str, most: int) -> str:
    """The text cut to `most` characters; an ellipsis marks the cut."""
    return text if len(text) <= most else text[: most - 1] + "…"
