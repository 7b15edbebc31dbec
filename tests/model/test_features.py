"""A frozen image tower: what is trained and what is not, and features that are kept equal those made afresh."""

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskvlm.model.encoders import ImageEncoder
from maskvlm.model.features import FeatureCache, FrozenBlocks
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


def test_blocks_that_stand_after_all_others_are_not_among_the_first() -> None:
    """Those of a CaiT's class token."""
    vit = timm.create_model("cait_xxs24_224", depth=2, embed_dim=32, num_heads=2, img_size=32)
    frozen = FrozenBlocks(vit, 1)
    names = [name for name, _ in vit.named_parameters()]
    trained = {name.split(".")[0] for name in names if not frozen.is_frozen(name)}
    assert trained >= {"blocks", "blocks_token_only", "norm"}
    assert frozen.is_frozen("blocks.0.attn.proj.weight")
    assert not frozen.is_frozen("blocks.1.attn.proj.weight")


def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same_as_ever() -> None:
    frozen, free = tower(2), tower(0)
    for encoder in (frozen, free):
        encoder(images(), torch.rand(4, 16, generator=torch.Generator().manual_seed(2)) < 0.5).square().sum().backward()
    for (name, ours), theirs in zip(frozen.named_parameters(), free.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
        else:
            assert ours.grad is None, name


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
    for frozen, data, change in (
        (2, "a", 0.0),
        (2, "b", 0.0),
        (2, "a", 1.0),
        (1, "a", 0.0),
        ("all", "a", 0.0),
        (3, "a", 0.0),
    ):
        encoder = tower(frozen, tmp_path)
        encoder.vit.patch_embed.proj.bias.data += change
        encoder.frozen_blocks.open_cache(data, 10)
        assert encoder.frozen_blocks.cache is not None
        names.add(encoder.frozen_blocks.cache.file)
    assert len(names) == 6
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


def test_a_second_training_on_other_data_has_other_features(tmp_path: Path) -> None:
    """Row 0 is another image there."""
    encoder, rows = tower(2, tmp_path), torch.arange(4)
    encoder.frozen_blocks.open_cache("data", 4)
    first = encoder(images(), None, rows)
    encoder.frozen_blocks.open_cache("others", 6)
    torch.testing.assert_close(encoder(images() + 1, None, rows), encoder(images() + 1))
    encoder.frozen_blocks.open_cache("data", 4)
    assert torch.equal(encoder(images() + 1, None, rows), first)


@given(st.lists(st.lists(st.integers(-1, 5), min_size=1, max_size=6), min_size=1, max_size=5))
def test_any_order_of_rows(tmp_path_factory: pytest.TempPathFactory, batches: list[list[int]]) -> None:
    """Each row is computed once, and read as it was computed."""
    feature_cache = FeatureCache(tmp_path_factory.mktemp("kept"), "x", 6, (2, 3))
    computed_rows: list[int] = []
    for batch in batches:
        rows = torch.tensor(batch)

        def compute(at_M: Tensor, rows: Tensor = rows) -> Tensor:
            computed_rows.extend(rows[at_M].tolist())
            return 1 + rows[at_M].float()[:, None, None].expand(-1, 2, 3)

        assert torch.equal(feature_cache.get(rows, compute), 1 + rows.float()[:, None, None].expand(-1, 2, 3))
    for batch in batches:
        for row in {row for row in batch if row >= 0}:
            times = [list(each).count(row) for each in batches if row in each]
            assert computed_rows.count(row) == times[0]  # in the first batch that has it


# ---------------------------------------------------------------------- what cannot be


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(
        UserError, match=r"frozen: 4 frozen blocks, but the ViT has 3\. Give a number from 0 to 3, or all"
    ):
        tower(4)


def test_features_of_what_is_not_frozen_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only for a plain ViT with frozen blocks"):
        tower(0, tmp_path)
    rotary = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    with pytest.raises(UserError, match="only for a plain ViT"):
        ImageEncoder(
            "eva02_tiny_patch14_224", 64, random_init=True, config=rotary, frozen=1, feature_cache=str(tmp_path)
        )


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1,000,000,000,000 rows of features need \d+\.\d GB more, the disk has "):
        FeatureCache(tmp_path, "x", 10**12, (197, 768))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_has_not_written_still_needs_its_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, shape = 100, (10, 1024)  # 4 MB
    cache = FeatureCache(tmp_path, "x", rows, shape)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match=r"100 rows of features need 0\.0 GB more"):
        FeatureCache(tmp_path, "x", rows, shape)
    cache.get(torch.arange(80), lambda at_M: torch.ones(len(at_M), *shape))
    cache.features_RLD.flush()
    FeatureCache(tmp_path, "x", rows, shape)  # 0.8 MB is missing


def test_a_file_of_another_size(tmp_path: Path) -> None:
    FeatureCache(tmp_path, "x", 3, (1, 2))
    (tmp_path / "x.float32").write_bytes(b"12345")
    with pytest.raises(UserError, match=r"x\.float32: has 5 bytes, expected 24\. Remove it"):
        FeatureCache(tmp_path, "x", 3, (1, 2))


def test_a_copy_keeps_its_own_tower() -> None:
    encoder = tower(2)
    other = copy.deepcopy(encoder)
    other.vit.norm.bias.data += 1.0
    hidden = other.frozen_blocks.forward_frozen(images())
    assert not torch.equal(other.frozen_blocks.forward_trained(hidden), encoder.frozen_blocks.forward_trained(hidden))
    assert np.isfinite(hidden.numpy()).all()
