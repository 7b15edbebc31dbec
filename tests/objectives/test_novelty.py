"""An image that is unlike the training data is told from one that is not: on vectors, in files, in the shell."""

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_pretrained import content_of, toy_model
from toys import SIZE

from maskvlm import MaskVLM
from maskvlm.checkpoint import io as checkpoint
from maskvlm.data.inputs import open_image
from maskvlm.objectives.novelty import (
    LEAST,
    MOST,
    FarFromTraining,
    distance_to,
    fit_range,
    mean_patch,
    sample_of,
)
from maskvlm.utils.errors import ExitCode, UserError


def clusters(count: int, seed: int, width: int = 32, spread: float = 0.15) -> torch.Tensor:
    """Features around ten centres, which are the same at every seed: like the images of a data set."""
    centre_CD = torch.randn(10, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    chosen_N = torch.randint(10, (count,), generator=generator)
    return centre_CD[chosen_N] + spread * torch.randn(count, width, generator=generator)


# ---------------------------------------------------------------------- on features


def test_the_distance_is_mahalanobis_with_shrunk_variances() -> None:
    """Against the inverse of the covariance; with fewer images than axes, too."""
    for count in (LEAST, 400):
        sample_ND = sample_of(clusters(count, 3, 64))
        known_range = fit_range(sample_ND)
        covariance_DD = torch.cov(sample_ND.double().T)
        shrunk_DD = covariance_DD + 0.1 * covariance_DD.diagonal().mean() * torch.eye(64)
        query_BD = clusters(5, 7, 64)
        off_BD = query_BD.double() - sample_ND.double().mean(0)
        expected_B = torch.einsum("bd,de,be->b", off_BD, shrunk_DD.inverse(), off_BD).sqrt()
        torch.testing.assert_close(distance_to(query_BD, known_range), expected_B, rtol=1e-6, atol=0)


def test_a_sample_is_small_and_spread_over_the_split() -> None:
    feature_ND = clusters(3000, 0, 256)
    sample_ND = sample_of(feature_ND)
    assert (sample_ND.shape, sample_ND.dtype) == ((MOST, 256), torch.float16)
    assert sample_ND.untyped_storage().nbytes() == MOST * 256 * 2  # a view would keep the whole split
    assert torch.equal(sample_ND[[0, -1]], feature_ND[[0, -1]].half())
    assert [len(sample_of(feature_ND[:count])) for count in (7, 0)] == [7, 0]
    assert fit_range(sample_of(clusters(LEAST - 1, 0))) is None  # too few tell nothing
    alike = fit_range(sample_of(torch.ones(LEAST, 8)))  # images that are all alike make any other far
    far_B = distance_to(torch.tensor([[1.0] * 8, [1.0] * 7 + [1.1]]), alike) > alike.most
    assert far_B.tolist() == [False, True]


# ---------------------------------------------------------------------- in files


def toy_image(seed: int) -> torch.Tensor:
    return torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def features(path: Path, images: list[torch.Tensor]) -> torch.Tensor:
    model = MaskVLM.from_pretrained(path)
    return mean_patch(model.backbone.image(model.pixels(images)))


def write(path: Path, kind: str = "pretrain", sign: int = 1, **more: Any) -> str:
    """A checkpoint that knows some images by its own features, or, with sign -1, by the opposite of these."""
    backbone, task, recipe = toy_model(kind)
    content = content_of(backbone, task, recipe)
    checkpoint.save(content, path)
    if kind == "pretrain":
        content["known_images"] = sample_of(sign * features(path, [toy_image(seed) for seed in range(LEAST)]))
    checkpoint.save(content | more, path)
    return str(path)


def test_strange_images_are_warned_of_in_every_call(tmp_path: Path) -> None:
    model = MaskVLM.from_pretrained(write(tmp_path / "a.ckpt", sign=-1))
    with pytest.warns(FarFromTraining):
        model.caption(toy_image(3), lengths=[3])
    with pytest.warns(FarFromTraining):
        model.fill_mask(toy_image(3), "a [MASK] circle")
    with pytest.warns(FarFromTraining, match="^image 2: ") as warned:
        model.encode_image([toy_image(3), toy_image(4)])
    assert {each.filename for each in warned} == {__file__}  # the user's line, not one of this package
    # A file's name may be anybody's: nothing that a terminal obeys is told.
    open_image(toy_image(5)).save(tmp_path / "\x1b[2Jy.png")
    with pytest.warns(FarFromTraining):
        model.match(str(tmp_path / "\x1b[2Jy.png"), "a circle")
    assert model.far_warnings[-1].partition(": this image")[0].endswith("[2Jy.png")
    assert "\x1b" not in model.far_warnings[-1]


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(MOST + 1, 8).half(),
        torch.zeros(60, 8),
        torch.full((60, 8), float("nan")).half(),
        clusters(LEAST, 0, 12).half(),  # the image encoder has another width
        "vectors",
    ],
)
def test_strange_vectors_are_refused(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.ckpt"
    checkpoint.save(content_of(*toy_model("pretrain")) | {"known_images": value}, path)
    with pytest.raises(UserError, match="known_images") as caught:
        MaskVLM.from_pretrained(path)
    assert caught.value.code == ExitCode.BAD_DATA


# ---------------------------------------------------------------------- in the shell
