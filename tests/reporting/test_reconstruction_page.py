"""`reconstructions.png`: its words, its colours, its size."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from objectives.test_reconstructed_examples import toy
from PIL import Image
from toys import tokens, toy_batch

from maskvlm.data.text import Captioner, train_tokenizer
from maskvlm.objectives.reconstructed_examples import GuessedWords, Guesses, Reconstruction, reconstruct, subsample
from maskvlm.reporting.page import GREEN, GREY, RED, Segment
from maskvlm.reporting.reconstruction_page import (
    SIDE,
    caption_pieces,
    draw_reconstruction,
    guess_line,
    reconstructions,
)  # fmt: skip

NAMES: Any = SimpleNamespace(decode=lambda ids: f" w{ids[0]}")


def plain(line: list[Segment]) -> str:
    return "".join(segment.text for segment in line)


def test_a_caption_is_written_with_its_masked_words_shaded() -> None:
    tokenizer = train_tokenizer(["a red circle, left of a blue square."] * 5, 99)
    words = Captioner(tokenizer, 30)(["A red circle, left of a blue square."])
    batch = toy_batch(1)._replace(**words._asdict())
    place = batch.token_CT[0].tolist().index(tokenizer.convert_tokens_to_ids("blue"))
    pieces = caption_pieces(batch, 0, tokenizer, {place})
    assert plain(pieces) == "a red circle, left of a blue square."
    assert [piece.text for piece in pieces if piece.shade] == ["blue"]


def test_a_right_guess_is_green_and_a_wrong_first_one_red() -> None:
    batch = toy_batch(1)._replace(**tokens([[7, 8, 9]]))
    with_image = Guesses(torch.tensor([[[8, 9, 5]]]), torch.tensor([[[0.9, 0.07, 0.03]]]))
    without_image = Guesses(torch.tensor([[[9, 8, 5]]]), torch.tensor([[[0.5, 0.4, 0.1]]]))
    words = GuessedWords(torch.tensor([[2]]), torch.tensor([[True]]), with_image, without_image)
    line = guess_line(Reconstruction(batch, batch.image_BCHW, None, words), 0, 2, NAMES)
    assert plain(line) == f"{'w8':14}{'w8 90  w9 7  w5 3':{SIDE}}{'w9 50  w8 40  w5 10':{SIDE}}"
    assert [(s.text, s.colour) for s in line[1:] if s.text.strip()] == [
        ("w8 90", GREEN), ("w9 7", GREY), ("w5 3", GREY), ("w9 50", RED), ("w8 40", GREEN), ("w5 10", GREY),
    ]  # fmt: skip


def test_rows_are_as_high_as_their_words_and_the_file_as_wide_as_its_columns(tmp_path: Path) -> None:
    backbone, task = toy()
    path = reconstructions(backbone, task, toy_batch(6), NAMES, tmp_path / "r.png", count=3)
    width, height = Image.open(path).size
    assert width == 1256
    assert 3 * 164 < height < 3 * 240
    assert len(draw_reconstruction(reconstruct(backbone, task, subsample(toy_batch(6), 3)), NAMES).figure.axes) == 12
