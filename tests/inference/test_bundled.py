"""The model that comes along: what it says it does not know."""

import warnings

import pytest

from maskvlm import MaskVLM
from maskvlm.data.scenes.source import Scenes
from maskvlm.inference.pretrained import TruncatedText, UnknownWords, UnusedMask


def test_what_a_text_holds_that_is_not_read_is_told_once() -> None:
    """Words that the tokenizer does not know, tokens beyond the longest text, masks where none is filled in."""
    model, image = MaskVLM.from_pretrained(), Scenes().split("val")[3]["image"]
    room = model.words.text_length - 2
    long = "red " * (room + 1)
    with pytest.warns(UnknownWords, match="does not know: giraffe, '&', Zebra, '!'; take"):
        model.match(image, "a giraffe & a Zebra on the left!")
    with pytest.warns(TruncatedText, match=f"only the first {room} of its {room + 1} tokens are read"):
        model.score(image, [long, "a red square"])
    with pytest.warns(UnusedMask, match="is read as plain text"):
        model.encode_text("a [MASK] star and a red square")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.score(image, ["a giraffe, a blue star", long])
        model.match(image, "a [MASK] star and a red square")
        model.fill_mask(image, ["the [MASK] star", "a star at the [MASK]", "[MASK] " * room])
    assert model.unknown_words(["red " * (room - 1) + "zebra horse"]) == ["zebra"]  # the other one is not read
