"""Exported files give what the training code gives: ONNX in onnxruntime."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor
from toy_pretrained import BACKBONE, saved
from toys import SIZE

from maskvlm.inference import onnx_export as export
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.utils.errors import ExitCode

LONGEST = BACKBONE["init_args"]["text"]["init_args"]["text_length"]  # type: ignore[index]
NAMES = ("image_encoder", "text_encoder", "fusion_scorer")
BATCHES = [(1, 1), (1, 3), (1, LONGEST), (9, LONGEST), (3, 2), (7, 11)]
Run = Callable[..., list[Tensor]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "best.ckpt"


@pytest.fixture(scope="module")
def parts(path: Path) -> tuple[MaskVLM, MaskedPretraining]:
    """The checkpoint's model as the training code has it."""
    backbone, task = saved(path)
    assert isinstance(task, MaskedPretraining)
    return backbone, task


@pytest.fixture(scope="module")
def model(path: Path, parts: Any) -> PretrainedMaskVLM:
    return PretrainedMaskVLM.from_pretrained(path)


@pytest.fixture(scope="module")
def onnx_folder(path: Path, parts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "not" / "there yet"
    assert export.main(["--from", str(path), str(folder)], []) == ExitCode.DONE
    return folder


def sessions(folder: Path) -> list[Run]:
    """The three files in onnxruntime, without the code that exported them."""

    def opened(name: str) -> Run:
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]

        def run(*arguments: Tensor) -> list[Tensor]:
            return [torch.from_numpy(each) for each in session.run(None, _named(names, arguments))]

        return run

    return [opened(name) for name in NAMES]


def _named(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Any]:
    return {name: each.numpy() for name, each in zip(names, tensors, strict=True)}


def pairs(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise images, random words and their attention: lengths by lot, one of them the longest."""
    generator = torch.Generator().manual_seed(seed)
    tokens_B = torch.randint(1, length + 1, (rows,), generator=generator)
    tokens_B[int(torch.randint(rows, (), generator=generator))] = length
    attention_BT = torch.arange(length) < tokens_B[:, None]
    token_BT = torch.randint(5, 256, (rows, length), generator=generator) * attention_BT
    return torch.randn(rows, 3, SIZE, SIZE, generator=generator), token_BT, attention_BT.long()


@torch.no_grad()
def expected(parts: tuple[MaskVLM, MaskedPretraining], batch: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """All outputs of the three parts, by the training code."""
    (backbone, task), (image_BCHW, token_BT, attention_BT) = parts, batch
    image_BLD, text_BTD = backbone.image(image_BCHW), backbone.text(token_BT, attention_BT.bool())
    fused = backbone.fuse(image_BLD, text_BTD, attention_BT.bool())
    logits_B2 = task.matching(fused.product_MD)
    vectors = task.projection.embed_image(image_BLD), task.projection.embed_text(text_BTD, attention_BT.bool())
    return [image_BLD, vectors[0], text_BTD, vectors[1], fused.joined_MX, logits_B2[:, 1] - logits_B2[:, 0]]


@torch.no_grad()
def exported_outputs(runs: Sequence[Run], batch: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The same by exported files, one after the other."""
    (image, text, fusion), (image_BCHW, token_BT, attention_BT) = runs, batch
    image_BLD, image_BE = image(image_BCHW)
    text_BTD, text_BE = text(token_BT, attention_BT)
    return [image_BLD, image_BE, text_BTD, text_BE, *fusion(image_BLD, text_BTD, attention_BT)]


@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=pytest.mark.slow), "parts"])
def test_batches_of_pairs_are_as_in_training(
    kind: str, parts: tuple[MaskVLM, MaskedPretraining], model: PretrainedMaskVLM, request: pytest.FixtureRequest
) -> None:
    """The files, and what is written to them."""
    if kind == "parts":
        runs = [part.module for part in export.parts_of(model)]
    else:
        runs = sessions(request.getfixturevalue("onnx_folder"))
    scores = []
    for seed, (rows, length) in enumerate(BATCHES):
        batch = pairs(rows, length, seed)
        for ours, theirs in zip(exported_outputs(runs, batch), expected(parts, batch), strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        scores.append(ours)
    assert torch.cat(scores).std() > 0.1  # pairs differ, or agreement would say little
