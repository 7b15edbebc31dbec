"""An image that is unlike the training data is told from one that is not: on vectors, in files, in the shell."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_pretrained import content_of, made
from toys import SIZE

from maskvlm import MaskVLM
from maskvlm.checkpoint import io as checkpoint
from maskvlm.cli.convert import convert
from maskvlm.cli.main import main
from maskvlm.objectives.novelty import (
    LEAST,
    MOST,
    FarFromTraining,
    KnownRange,
    far_line,
    fit_range,
    is_far,
    max_cosine,
    sample_of,
)
from maskvlm.utils.errors import ExitCode, UserError


def unit(vector: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vector, dim=-1)


def clusters(count: int, seed: int, width: int = 32, spread: float = 0.15) -> torch.Tensor:
    """Unit vectors around ten directions, which are the same at every seed: like the images of a data set."""
    centre_CE = unit(torch.randn(10, width, generator=torch.Generator().manual_seed(99)))
    generator = torch.Generator().manual_seed(seed)
    chosen_N = torch.randint(10, (count,), generator=generator)
    return unit(centre_CE[chosen_N] + spread * torch.randn(count, width, generator=generator))


def known(count: int = 2000) -> KnownRange:
    found = fit_range(sample_of(clusters(count, 0)))
    assert found is not None
    return found


# ---------------------------------------------------------------------- on vectors


def test_what_is_alike_is_in_range_and_what_is_not_is_far() -> None:
    within = is_far(clusters(2000, 1), known()).float().mean()
    assert within < 0.03  # FAR of the sample itself, by chance a little more of new ones
    elsewhere = unit(torch.randn(2000, 32, generator=torch.Generator().manual_seed(5)))
    assert is_far(elsewhere, known()).float().mean() > 0.95


def test_a_share_of_the_sample_is_below_the_threshold() -> None:
    """Each is compared with the others, not with itself: else everything would be below."""
    sample_NE = sample_of(clusters(400, 3))
    for share in (0.01, 0.1, 0.5):
        found = fit_range(sample_NE, share)
        assert found is not None
        cosine_NN = found.vector_NE @ found.vector_NE.T - 2 * torch.eye(400)
        below = (cosine_NN.max(1).values < found.least).float().mean()
        assert below == pytest.approx(share, abs=0.005)
        assert not is_far(found.vector_NE, found).any()


def test_a_sample_is_small_and_spread_over_the_split() -> None:
    vector_NE = clusters(3000, 0, 256)
    sample_NE = sample_of(vector_NE)
    assert (sample_NE.shape, sample_NE.dtype) == ((MOST, 256), torch.float16)
    assert sample_NE.untyped_storage().nbytes() == MOST * 256 * 2  # a view would keep the whole split
    assert torch.equal(sample_NE[[0, -1]], vector_NE[[0, -1]].half())
    assert len(sample_of(vector_NE[:7])) == 7
    assert len(sample_of(vector_NE[:0])) == 0


def test_too_few_images_tell_nothing() -> None:
    assert fit_range(sample_of(clusters(LEAST - 1, 0))) is None
    assert fit_range(sample_of(clusters(LEAST, 0))) is not None


def test_nearness_is_the_highest_cosine() -> None:
    found = KnownRange(torch.eye(3), 0.7)
    vector_BE = unit(torch.tensor([[1.0, 0, 0], [1, 1, 1], [-1, 0, -1]]))
    assert max_cosine(vector_BE, found).tolist() == pytest.approx([1, 3**-0.5, 0], abs=1e-6)
    assert is_far(vector_BE, found).tolist() == [False, True, True]
    assert "0.58, 99 % of them have 0.70 or more" in far_line(0.577, found)


# ---------------------------------------------------------------------- in files


def toy_image(seed: int) -> torch.Tensor:
    return torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def write(path: Path, kind: str = "pretrain", sign: int = 1, **more: Any) -> str:
    """A checkpoint whose reference is its own vectors of some images, or, with sign -1, the opposite of them; of the
    class token alone, as the mean patches of noise are all alike."""
    backbone, task, recipe = made(kind, **({"contrast_reads": "class"} if kind == "pretrain" else {}))
    content = content_of(backbone, task, recipe)
    checkpoint.save(content, path)
    if kind == "pretrain":
        vector_NE = MaskVLM.from_pretrained(path).encode_image([toy_image(seed) for seed in range(LEAST)])
        content["reference"] = sample_of(sign * vector_NE)
    checkpoint.save(content | more, path)
    return str(path)


def test_a_model_that_knows_an_image_says_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = MaskVLM.from_pretrained(write(tmp_path / "a.ckpt"))
    model.match(toy_image(3), "a red circle")
    assert model.far([toy_image(3), toy_image(4)]) == [None, None]
    assert [each for each in recwarn if issubclass(each.category, FarFromTraining)] == []


def test_a_strange_image_is_warned_of_once(tmp_path: Path) -> None:
    model = MaskVLM.from_pretrained(write(tmp_path / "a.ckpt", sign=-1))
    with pytest.warns(FarFromTraining, match="unlike those that the model was trained on"):
        model.caption(toy_image(3), lengths=[3])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FarFromTraining)
        model.fill_mask(toy_image(3), "a [MASK] circle")
    (line,) = model.far([toy_image(3)])
    assert line is not None
    assert model.told_far == line


def test_it_goes_through_the_hubs_format_and_back(tmp_path: Path) -> None:
    first = write(tmp_path / "a.ckpt", sign=-1)
    convert([first, str(tmp_path / "folder")])
    convert([str(tmp_path / "folder"), str(tmp_path / "b.ckpt")])
    for place in (tmp_path / "folder", tmp_path / "b.ckpt"):
        assert MaskVLM.from_pretrained(place).far([toy_image(0)]) != [None]
    assert torch.equal(*(checkpoint.load(tmp_path / name)["reference"] for name in ("a.ckpt", "b.ckpt")))


def test_a_checkpoint_without_it_says_nothing(tmp_path: Path) -> None:
    for kind, more in (("pretrain", {"reference": None}), ("vqa", {})):
        model = MaskVLM.from_pretrained(write(tmp_path / f"{kind}.ckpt", kind, **more))
        assert model.known is None
        assert model.far([toy_image(0)]) == [None]


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(MOST + 1, 8).half(),
        torch.zeros(8).half(),
        torch.zeros(60, 8),
        torch.full((60, 8), float("nan")).half(),
        torch.zeros(60, 8192).half(),
        "vectors",
        [[1.0]],
    ],
)
def test_strange_vectors_are_refused(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.ckpt"
    checkpoint.save(content_of(*made("pretrain")) | {"reference": value}, path)
    with pytest.raises(UserError, match="reference") as caught:
        MaskVLM.from_pretrained(path)
    assert caught.value.code == ExitCode.BAD_DATA


def test_vectors_of_another_width_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    checkpoint.save(content_of(*made("pretrain")) | {"reference": clusters(LEAST, 0, 16).half()}, path)
    with pytest.raises(UserError, match="reference: vectors of width 16, its contrast head has 8"):
        MaskVLM.from_pretrained(path)


# ---------------------------------------------------------------------- in the shell


@pytest.mark.parametrize("sign", [1, -1])
def test_the_shell_says_it_once_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str], sign: int) -> None:
    from maskvlm.data.inputs import open_image

    path = write(tmp_path / "a.ckpt", sign=sign)
    files = [str(tmp_path / f"{seed}.png") for seed in (3, 4)]
    for seed, file in zip((3, 4), files, strict=True):
        open_image(toy_image(seed)).save(file)
    assert main(["match", "--from", path, *files[:1], "a red circle", "a blue star"]) == 0
    assert main(["caption", "--from", path, *files]) == 0
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "unlike" in line]
    assert len(lines) == (0 if sign == 1 else 2)  # one a command
    assert all(line.startswith("warning: this image is") for line in lines)
    assert "unlike" not in said.out
