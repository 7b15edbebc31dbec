"""What people hand to the methods by mistake, and a folder whose files are damaged."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_pretrained import saved

from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.utils.errors import ExitCode, UserError

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
TEXT = "a red circle on the left"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    saved(folder / "best.ckpt")
    PretrainedMaskVLM.from_pretrained(folder / "best.ckpt").save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> PretrainedMaskVLM:
    return PretrainedMaskVLM.from_pretrained(place / "best.ckpt")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m: m.rank(IMAGE, ["a"], k=-1), "k is -1"),
        (lambda m: m.rank(IMAGE, {"a", "b"}), "give several as list"),
        (lambda m: m.fill_mask(IMAGE, "a red circle"), "no word in it is masked"),
        (lambda m: m.explain(IMAGE, TEXT, "star"), "'star' is not in the text"),
        (lambda m: m.match([IMAGE, IMAGE], ["a"] * 3), "2 images and 3 texts"),
        (lambda m: m.reconstruct(IMAGE, np.zeros((3, 3), bool), "a"), r"a mask of shape \[3, 3\]"),
        (lambda m: m.encode_image(""), "its path is empty"),
        (lambda m: m.encode_image(io.StringIO("a")), "a file opened in text mode"),
        (lambda m: m.encode_image([b"not an image at all"]), "image 1: |not an image"),
        (lambda m: m.encode_image([{}]), "dict is not an image"),
        (lambda m: m.encode_image(np.zeros((4, 4, 7))), r"array of shape \[4, 4, 7\]"),
        (lambda m: m.encode_image(np.zeros((0, 0, 3), np.uint8)), "has no pixels"),
        (lambda m: m.encode_image(np.full((9, 9, 3), 3.0)), "not normalised"),
        (lambda m: m.encode_image(np.ones((4, 4, 3), complex)), "array of complex128"),
        (lambda m: m.encode_image("a dog on grass"), "It looks like a text"),
        (lambda m: m.encode_text(""), "no word"),
        (lambda m: m(torch.zeros(1, 3, 7, 7)), r"\[1, 3, 7, 7\] where"),
        (lambda m: m(None, torch.tensor([[2, 10**6]])), "ids 2 to 1000000"),
    ],
)
def test_a_mistake_is_one_line(model: PretrainedMaskVLM, ask: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask(model)


@pytest.mark.parametrize("name", ["model.safetensors", "lineage.safetensors"])
def test_a_changed_byte_in_a_folder_is_seen(place: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(place / "model", tmp_path / "copy"))
    content = bytearray((folder / name).read_bytes())
    content[-5] ^= 0xFF
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: damaged") as caught:
        PretrainedMaskVLM.from_pretrained(folder)
    assert caught.value.code == ExitCode.BAD_DATA
    (folder / "checksums.json").unlink()  # of an older version: nothing to compare with
    PretrainedMaskVLM.from_pretrained(folder)
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"{name}: truncated or damaged"):
        PretrainedMaskVLM.from_pretrained(folder)
