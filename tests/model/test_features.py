"""A frozen image tower: what is trained and what is not, and features that are kept equal those made afresh."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskvlm.model.encoders import ImageEncoder
from maskvlm.model.features import FeatureCache
from maskvlm.utils.errors import UserError

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 14, "init_values": 0.5}


def tower(frozen: Any = 2, folder: Path | None = None, **more: Any) -> ImageEncoder:
    torch.manual_seed(0)
    cache_folder = None if folder is None else str(folder)
    name = "vit_small_patch14_dinov2"
    return ImageEncoder(name, 56, random_init=True, config=SMALL, frozen=frozen, feature_cache=cache_folder, **more)


def images(rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def trained(encoder: ImageEncoder) -> set[str]:
    return {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def test_the_first_blocks_and_what_is_before_them_are_not_trained() -> None:
    everything = trained(tower(0))
    lower = {name for name in everything if not name.startswith(("vit.blocks.2.", "vit.norm."))}
    assert lower >= {"mask_token", "vit.pos_embed", "vit.patch_embed.proj.bias", "vit.blocks.1.ls1.gamma"}
    assert trained(tower(2)) == everything - lower
    assert {name.split(".")[1] for name in trained(tower(3))} == {"norm"}
    assert trained(tower("all")) == set()


def test_a_frozen_tower_has_no_dropout() -> None:
    encoder = tower("all", drop_path=0.5).train()
    assert torch.equal(encoder(images()), encoder(images()))
    half = tower(1, drop_path=0.5).train()
    assert torch.equal(half.frozen_blocks.forward_frozen(images()), half.frozen_blocks.forward_frozen(images()))
    assert not torch.equal(half(images()), half(images()))


def test_a_mask_token_that_cannot_learn_is_a_patch_of_the_mean_colour(tmp_path: Path) -> None:
    torch.save(tower(0).vit.state_dict(), tmp_path / "vit.pth")
    name = "vit_small_patch14_dinov2"
    encoder = ImageEncoder(name, 56, weights=str(tmp_path / "vit.pth"), config=SMALL, frozen=1)
    encoder.load_pretrained()
    encoder.eval()
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, 5:9] = True
    image = images(1)
    blank = image.clone()
    for patch in range(5, 9):
        row, column = divmod(patch, 4)
        blank[:, :, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14] = 0.0
    with torch.no_grad():
        torch.testing.assert_close(encoder(image, hidden), encoder(blank), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- kept on disk


@pytest.mark.parametrize("frozen", [1, 3, "all"])
def test_kept_features_equal_fresh_ones(frozen: Any, tmp_path: Path) -> None:
    """Whole images out of the file and masked ones afresh, in one pass; in values and in gradients."""
    keeps, fresh = tower(frozen, tmp_path).train(), tower(frozen).train()
    keeps.frozen_blocks.open_cache("data", 10)
    rows = torch.tensor([7, 2, 9, 2])
    image = images()[torch.tensor([0, 1, 2, 1])]
    mask_BN = torch.rand(4, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    both, masks = torch.cat([image, image]), torch.cat([torch.zeros_like(mask_BN), mask_BN])
    for _ in range(2):  # written, then read
        output, expected = keeps(both, masks, rows), fresh(both, masks)
        assert torch.equal(output, expected)
        torch.testing.assert_close(keeps(image, None, rows), expected[:4])
    if frozen != "all":
        for encoder in (keeps, fresh):
            encoder.zero_grad()
            encoder(both, masks, rows).square().sum().backward()
        for ours, theirs in zip(keeps.parameters(), fresh.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad)


def test_what_was_kept_is_read_and_not_made_again(tmp_path: Path) -> None:
    encoder = tower("all", tmp_path).train()
    encoder.frozen_blocks.open_cache("data", 10)
    first = encoder(images(), None, torch.arange(4))
    again = encoder(torch.zeros_like(images()), None, torch.arange(4))  # the images are not looked at
    assert torch.equal(first, again)
    later = tower("all", tmp_path).train()
    later.frozen_blocks.open_cache("data", 10)
    assert torch.equal(later(torch.zeros_like(images()), None, torch.arange(4)), first)
    assert not torch.equal(encoder.eval()(torch.zeros_like(images()), None, torch.arange(4)), first)  # as evaluation


def test_other_data_weights_or_blocks_have_a_file_of_their_own(tmp_path: Path) -> None:
    names = set()
    for frozen, data, change in ((2, "a", 0.0), (2, "b", 0.0), (2, "a", 1.0), (1, "a", 0.0), ("all", "a", 0.0)):
        encoder = tower(frozen, tmp_path)
        encoder.vit.patch_embed.proj.bias.data += change
        encoder.frozen_blocks.open_cache(data, 10)
        assert encoder.frozen_blocks.cache is not None
        names.add(encoder.frozen_blocks.cache.file)
    assert len(names) == 5
    above = tower(2, tmp_path)
    above.vit.norm.bias.data += 1.0  # not of the frozen part
    above.frozen_blocks.open_cache("a", 10)
    assert above.frozen_blocks.cache is not None
    assert above.frozen_blocks.cache.file in names


def test_a_row_that_could_not_be_read_is_not_kept(tmp_path: Path) -> None:
    feature_cache = FeatureCache(tmp_path, "x", 3, (1, 2))
    assert feature_cache.get(torch.tensor([-1, 2]), lambda at: torch.full((len(at), 1, 2), 5.0)).tolist() == [
        [[5, 5]],
        [[5, 5]],
    ]
    assert feature_cache.written_R.tolist() == [0, 0, 1]
    assert feature_cache.get(torch.tensor([2, -1]), lambda at: torch.full((len(at), 1, 2), 7.0)).tolist() == [
        [[5, 5]],
        [[7, 7]],
    ]


def test_a_mark_without_its_row_is_no_row(tmp_path: Path) -> None:
    """After a power cut, or on another machine that shares the folder; fails where zeros are taken for features."""
    feature_cache = FeatureCache(tmp_path, "x", 3, (2, 2))
    feature_cache.written_R[:] = 1
    feature_cache.features_RLD[1] = 5.0
    feature_cache.features_RLD[2, 0] = 5.0  # the second position is not there
    features_BLD = feature_cache.get(torch.tensor([0, 1, 2]), lambda at: torch.full((len(at), 2, 2), 7.0))
    assert features_BLD[:, 0, 0].tolist() == [7, 5, 7]
    assert feature_cache.features_RLD[:, 1, 1].tolist() == [7, 5, 7]


# ---------------------------------------------------------------------- what cannot be


def damaged(folder: Path) -> FeatureCache:
    FeatureCache(folder, "x", 3, (1, 2))
    (folder / "x.float32").write_bytes(b"12345")
    return FeatureCache(folder, "x", 3, (1, 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: tower(4), "4 frozen blocks, but the ViT has 3"),
        (lambda folder: tower(0, folder), "only for a plain ViT with frozen blocks"),
        (lambda folder: FeatureCache(folder, "x", 10**12, (197, 768)), "rows of features need .* GB more"),
        (damaged, "has 5 bytes, expected 24"),
    ],
)
def test_what_cannot_be_is_one_line(make: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        make(tmp_path)
