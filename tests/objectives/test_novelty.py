"""An image that is unlike the training data is told from one that is not: on vectors, in files, in the shell."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_pretrained import content_of, toy_model
from toys import SIZE

from maskvlm import MaskVLM
from maskvlm.checkpoint import io as checkpoint
from maskvlm.cli.convert import convert
from maskvlm.cli.main import main
from maskvlm.data.images import BadImage
from maskvlm.data.inputs import open_image
from maskvlm.inference.pretrained import some_of
from maskvlm.objectives.novelty import (
    LEAST,
    MOST,
    FarFromTraining,
    KnownRange,
    distance_to,
    far_line,
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


def known(count: int = 2000) -> KnownRange:
    known_range = fit_range(sample_of(clusters(count, 0)))
    assert known_range is not None
    return known_range


# ---------------------------------------------------------------------- on features


def test_what_is_alike_is_in_range_and_what_is_not_is_far() -> None:
    within = (distance_to(clusters(2000, 1), known()) > known().most).float().mean()
    assert within < 0.03  # FAR of the sample itself, by chance a little more of new ones
    # Ten centres lie in nine dimensions; what leaves these is far, however near to the mean it is.
    elsewhere = torch.randn(2000, 32, generator=torch.Generator().manual_seed(5))
    assert (distance_to(elsewhere, known()) > known().most).float().mean() > 0.95


def test_the_distance_is_mahalanobis_with_shrunk_variances() -> None:
    """Against the inverse of the covariance; with fewer images than axes, too."""
    for count in (LEAST, 400):
        sample_ND = sample_of(clusters(count, 3, 64))
        known_range = fit_range(sample_ND)
        assert known_range is not None
        covariance_DD = torch.cov(sample_ND.double().T)
        shrunk_DD = covariance_DD + 0.1 * covariance_DD.diagonal().mean() * torch.eye(64)
        query_BD = clusters(5, 7, 64)
        off_BD = query_BD.double() - sample_ND.double().mean(0)
        expected_B = torch.einsum("bd,de,be->b", off_BD, shrunk_DD.inverse(), off_BD).sqrt()
        torch.testing.assert_close(distance_to(query_BD, known_range), expected_B, rtol=1e-6, atol=0)


def test_a_share_of_images_like_the_samples_is_beyond_the_threshold() -> None:
    """Of images that the sample does not hold: each part of it is measured by the others."""
    for share in (0.05, 0.2, 0.5):
        known_range = fit_range(sample_of(clusters(500, 3, 8)), share)
        assert known_range is not None
        assert (distance_to(clusters(5000, 8, 8), known_range) > known_range.most).float().mean() == pytest.approx(
            share, abs=0.05
        )


def test_images_that_are_all_alike_make_any_other_far() -> None:
    known_range = fit_range(sample_of(torch.ones(LEAST, 8)))
    assert known_range is not None
    assert (distance_to(torch.tensor([[1.0] * 8, [1.0] * 7 + [1.1]]), known_range) > known_range.most).tolist() == [
        False,
        True,
    ]


def test_a_sample_is_small_and_spread_over_the_split() -> None:
    feature_ND = clusters(3000, 0, 256)
    sample_ND = sample_of(feature_ND)
    assert (sample_ND.shape, sample_ND.dtype) == ((MOST, 256), torch.float16)
    assert sample_ND.untyped_storage().nbytes() == MOST * 256 * 2  # a view would keep the whole split
    assert torch.equal(sample_ND[[0, -1]], feature_ND[[0, -1]].half())
    assert len(sample_of(feature_ND[:7])) == 7
    assert len(sample_of(feature_ND[:0])) == 0


def test_too_few_images_tell_nothing() -> None:
    assert fit_range(sample_of(clusters(LEAST - 1, 0))) is None
    assert fit_range(sample_of(clusters(LEAST, 0))) is not None


def test_a_feature_is_the_mean_over_patches_and_its_line_a_ratio() -> None:
    image_BLD = torch.tensor([[[9.0, 9], [1, 2], [3, 6]]])
    assert mean_patch(image_BLD).tolist() == [[2, 4]]
    known_range = KnownRange(torch.zeros(2).double(), torch.eye(2).double(), torch.tensor([1.0, 4.0]), 2.0)
    assert distance_to(torch.tensor([[3.0, 8]]), known_range).tolist() == [5]
    assert "2.5 times as far from them as 99 % of such images are" in far_line(5, known_range)


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


def test_a_model_that_knows_an_image_says_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = MaskVLM.from_pretrained(write(tmp_path / "a.ckpt"))
    model.match(toy_image(3), "a red circle")
    assert model.far([toy_image(3), toy_image(4)]) == [None, None]
    assert [each for each in recwarn if issubclass(each.category, FarFromTraining)] == []


def test_strange_images_are_warned_of_in_every_call(tmp_path: Path) -> None:
    model = MaskVLM.from_pretrained(write(tmp_path / "a.ckpt", sign=-1))
    with pytest.warns(FarFromTraining, match="unlike those that the model was trained on"):
        model.caption(toy_image(3), lengths=[3])
    with pytest.warns(FarFromTraining, match="unlike those that the model was trained on"):
        model.fill_mask(toy_image(3), "a [MASK] circle")
    (line,) = model.far([toy_image(3)])
    assert line is not None
    assert list(model.far_warnings) == [line]
    open_image(toy_image(4)).save(tmp_path / "x.png")
    with pytest.warns(FarFromTraining, match=r"x\.png: this image is unlike"):
        model.match([toy_image(3), str(tmp_path / "x.png")], ["a circle", "a circle"])
    assert len(model.far_warnings) == 2
    with pytest.warns(FarFromTraining, match="^image 2: this image is unlike") as warned:
        model.encode_image([toy_image(3), toy_image(4)])
    assert {each.filename for each in warned} == {__file__}  # the user's line, not one of this package
    # A file's name may be anybody's: nothing that a terminal obeys is told.
    open_image(toy_image(5)).save(tmp_path / "\x1b[2Jy.png")
    with pytest.warns(FarFromTraining):
        model.match(str(tmp_path / "\x1b[2Jy.png"), "a circle")
    assert model.far_warnings[-1].partition(": this image")[0].endswith("[2Jy.png")
    assert "\x1b" not in model.far_warnings[-1]


@pytest.mark.parametrize("images", [16, 17, 40])
@pytest.mark.parametrize("batch", [3, 64])
def test_whether_few_are_asked_about_does_not_depend_on_the_batch(
    tmp_path: Path, images: int, batch: int, recwarn: pytest.WarningsRecorder
) -> None:
    model = MaskVLM.from_pretrained(write(tmp_path / "a.ckpt", sign=-1))
    model.batch_size = batch
    pictures = [toy_image(seed) for seed in range(images)]
    model.encode_image(pictures)
    model.encode_image(pictures)  # of many it is said once
    messages = [str(each.message).partition(":")[0] for each in recwarn if issubclass(each.category, FarFromTraining)]
    if images > 16:
        line = f"16 of 16 images that were looked at, of {images}, are unlike those that the model was trained on"
        assert messages == [f"{line}; take the answers with care"]
    else:
        assert messages == 2 * [f"image {number}" for number in range(1, images + 1)]


def test_of_later_calls_with_many_images_a_larger_share_is_told(tmp_path: Path) -> None:
    model = MaskVLM.from_pretrained(write(tmp_path / "a.ckpt"))
    known, strange = toy_image(3), torch.zeros(3, SIZE, SIZE)
    told = []
    for count in (1, 0, 1, 20, 12):  # strange ones at the front, of 20
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FarFromTraining)
            model.encode_image([strange] * count + [known] * (20 - count))
        told.append([str(each.message).partition(" images that")[0] for each in caught])
    assert told == [["1 of 16"], [], [], ["16 of 16"], []]


def test_of_many_images_those_looked_at_are_spread_evenly(tmp_path: Path) -> None:
    assert some_of([*range(16)]) == [*range(16)]
    assert some_of([*range(32)]) == [*range(0, 32, 2)]
    assert some_of([]) == []
    model = MaskVLM.from_pretrained(write(tmp_path / "a.ckpt"))
    with pytest.raises(BadImage, match=r"gone\.png"):  # named by what encodes it
        model.encode_image([*(toy_image(seed) for seed in range(20)), "gone.png"])
    with pytest.raises(BadImage, match=r"gone\.png"):
        model.encode_image(["gone.png", *(toy_image(seed) for seed in range(20))])


def test_it_goes_through_the_hubs_format_and_back(tmp_path: Path) -> None:
    first = write(tmp_path / "a.ckpt", sign=-1)
    convert([first, str(tmp_path / "folder")])
    convert([str(tmp_path / "folder"), str(tmp_path / "b.ckpt")])
    for place in (tmp_path / "folder", tmp_path / "b.ckpt"):
        assert MaskVLM.from_pretrained(place).far([toy_image(0)]) != [None]
    assert torch.equal(*(checkpoint.load(tmp_path / name)["known_images"] for name in ("a.ckpt", "b.ckpt")))


def test_a_checkpoint_without_it_does_not_warn_and_says_so(tmp_path: Path) -> None:
    for kind, more in (("pretrain", {"known_images": None}), ("vqa", {})):
        model = MaskVLM.from_pretrained(write(tmp_path / f"{kind}.ckpt", kind, **more))
        assert model.known is None
        assert model.far([toy_image(0)]) == [None]
        assert "does not warn about images" in model.knows
    assert "warn" not in MaskVLM.from_pretrained(write(tmp_path / "with.ckpt")).knows


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
    checkpoint.save(content_of(*toy_model("pretrain")) | {"known_images": value}, path)
    with pytest.raises(UserError, match="known_images") as caught:
        MaskVLM.from_pretrained(path)
    assert caught.value.code == ExitCode.BAD_DATA


def test_vectors_of_another_width_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    checkpoint.save(content_of(*toy_model("pretrain")) | {"known_images": clusters(LEAST, 0, 12).half()}, path)
    with pytest.raises(UserError, match="known_images: features of width 12, its image encoder has 16"):
        MaskVLM.from_pretrained(path)


# ---------------------------------------------------------------------- in the shell


@pytest.mark.parametrize("sign", [1, -1])
def test_the_shell_says_it_once_for_each_image(tmp_path: Path, capsys: pytest.CaptureFixture[str], sign: int) -> None:
    path = write(tmp_path / "a.ckpt", sign=sign)
    files = [str(tmp_path / f"{seed}.png") for seed in (3, 4)]
    for seed, file in zip((3, 4), files, strict=True):
        open_image(toy_image(seed)).save(file)
    assert main(["match", "--from", path, *files[:1], "a red circle", "a blue star"]) == 0
    assert main(["caption", "--from", path, *files]) == 0
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if "unlike" in line]
    warned_files = [] if sign == 1 else [files[0], *files]  # of one command, then of the other
    assert [line.partition(": this image is")[0] for line in lines] == [f"warning: {file}" for file in warned_files]
    assert "unlike" not in output.out


@pytest.mark.parametrize("count", [16, 17])
def test_of_many_far_images_the_shell_says_how_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Of captions, each image is asked about by itself."""
    path = write(tmp_path / "a.ckpt", sign=-1)
    files = [str(tmp_path / f"{seed}.png") for seed in range(count)]
    for seed, file in enumerate(files):
        open_image(toy_image(seed)).save(file)
    assert main(["caption", "--from", path, "--json", *files]) == 0
    output = capsys.readouterr()
    lines = [line.removeprefix("warning: ") for line in output.err.splitlines() if "unlike" in line]
    far = [line for answer in output.out.splitlines() for line in json.loads(answer)["far"]]
    assert [line.partition(": ")[0] for line in far] == files
    told = "17 images are unlike those that the model was trained on (--json says which); take the answers with care"
    assert lines == (far if count == 16 else [told])
    monkeypatch.setattr("maskvlm.cli.ask_model.MOST_WARNINGS", count)
    assert main(["caption", "--from", path, *files]) == 0
    assert ("17 or more images are unlike" in capsys.readouterr().err) == (count > 16)


def test_each_answer_tells_what_is_strange_about_its_own_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.ckpt")
    known, strange = str(tmp_path / "known.png"), str(tmp_path / "strange.png")
    open_image(toy_image(3)).save(known)
    open_image(torch.zeros(3, SIZE, SIZE)).save(strange)

    def told(*words: str) -> dict[str, tuple[bool, list[str]]]:
        assert main([*words, "--from", path, "--json"]) == 0
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        for far in (answer["far"] for answer in answers if "far" in answer):
            assert [line.partition(": this image is unlike")[0] for line in far] == [strange]
        of = ("candidate", "text", "image")
        names = [next(answer[key] for key in of if key in answer) for answer in answers]
        return {
            name: ("far" in answer, answer.get("unknown_words", []))
            for name, answer in zip(names, answers, strict=True)
        }

    assert told("caption", strange, known) == {strange: (True, []), known: (False, [])}
    assert told("rank", "a red giraffe", known, strange) == {known: (False, ["giraffe"]), strange: (True, ["giraffe"])}
    assert told("match", strange, "a circle", "a giraffe") == {"a circle": (True, []), "a giraffe": (True, ["giraffe"])}
    # Of more than 16 the warning is of some; each answer still tells its own.
    many = [str(tmp_path / f"{number}.png") for number in range(16)]
    for each in many:
        open_image(toy_image(3)).save(each)
    assert [name for name, (far, _) in told("rank", "a circle", *many, strange).items() if far] == [strange]
