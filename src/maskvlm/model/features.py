"""Frozen leading blocks of an image encoder, whose output can be cached on disk.

Shapes: B rows, W whole images among them, L positions, D width, R rows of the data set.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.paths import expand_user

Frozen = int | Literal["all"]
AFTER = ("norm", "fc_norm", "blocks_token_only")  # modules after the last block; the last one is CaiT's


class FrozenBlocks:
    """The part of a timm ViT that is not trained: patch and position embeddings and the first blocks, or all of it.

    Args:
        vit: the ViT; the parameters of the frozen part no longer require gradients.
        frozen: number of blocks, or `all`, which includes the last norm.
        folder: where to cache the outputs of the frozen part; None recomputes them each time.

    Attributes:
        blocks: number of frozen blocks. all_frozen: whether the whole ViT is frozen.

    Raises:
        UserError: a number of blocks below 0 or above the ViT's, or a cache without frozen blocks, or for a ViT that
            cannot be split after a block.
    """

    def __init__(self, vit: Any, frozen: Frozen, folder: str | None = None) -> None:
        depth = len(vit.blocks)
        if frozen != "all" and not 0 <= frozen <= depth:
            what = f"{frozen} frozen blocks, but the ViT has {depth}"
            todo = (
                f"Give a number from 0 to {depth}, or all; with from= leave out a model= that is not the checkpoint's"
            )
            raise UserError("model.backbone.image.frozen", what, todo)
        self.vit, self.all_frozen, self.folder = vit, frozen == "all", folder
        self.blocks: int = depth if frozen == "all" else frozen
        self.cache: FeatureCache | None = None
        # Not isinstance: a subclass may pass positions to each block, and cannot be split between two of them.
        if folder is not None and (frozen == 0 or type(vit) is not VisionTransformer):
            what = "features can be kept only for a plain ViT with frozen blocks"
            raise UserError(
                "model.backbone.image.feature_cache", what, "Set model.backbone.image.frozen, or leave it out"
            )
        for name, parameter in vit.named_parameters():
            if self.is_frozen(name):
                parameter.requires_grad_(False)
        # No randomness in the frozen part: an image must give the same features each time.
        for name, part in vit.named_modules():
            if self.is_frozen(name) and isinstance(part, nn.Dropout):
                part.p = 0.0
            elif self.is_frozen(name) and isinstance(part, DropPath):
                part.drop_prob = 0.0

    def __bool__(self) -> bool:
        """Whether anything is frozen."""
        return self.all_frozen or self.blocks > 0

    def is_frozen(self, name: str) -> bool:
        """Whether a tensor or module of the ViT belongs to the frozen part."""
        if self.all_frozen or self.blocks == 0:
            return self.all_frozen
        part, *rest = name.split(".")
        if part == "blocks":
            # `blocks.7.attn` is decided by its number. The container `blocks` has none and counts as trained.
            return bool(rest) and int(rest[0]) < self.blocks
        return part not in AFTER

    def forward_frozen(self, image_BCHW: Tensor) -> Tensor:
        """Output of the frozen part, [B, L, D]; if nothing is frozen, the input of the first block."""
        vit = self.vit
        # As timm's forward_features, up to the split; no graph is kept for frozen blocks.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self):
            hidden_BLD = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(image_BCHW))))
            hidden_BLD = vit.blocks[: self.blocks](hidden_BLD)
            features_BLD: Tensor = vit.norm(hidden_BLD) if self.all_frozen else hidden_BLD
        return features_BLD

    def forward_trained(self, hidden_BLD: Tensor) -> Tensor:
        """Run the trained blocks and the last norm on the output of `forward_frozen`, [B, L, D]."""
        if self.all_frozen:
            return hidden_BLD
        features_BLD: Tensor = self.vit.norm(run_blocks(self.vit, self.blocks, hidden_BLD))
        return features_BLD

    def open_cache(self, follows: str, rows: int) -> None:
        """Start caching features if a folder was given; call after the weights are loaded.

        Args:
            follows: what the features depend on besides the frozen weights: split fingerprint, image preparation,
                precision. It is part of the file name, so another value uses other files.
            rows: number of rows: of images in the training split, times the versions in which each is shown.

        Raises:
            UserError: as `FeatureCache`.
        """
        if self.folder is None:
            return
        digest = hashlib.sha256(follows.encode())
        # Other frozen weights give another file name, so features are never used with the wrong weights.
        for name, value in self.vit.state_dict().items():
            if self.is_frozen(name):
                digest.update(value.cpu().contiguous().numpy().tobytes())
        length = self.vit.patch_embed.num_patches + self.vit.num_prefix_tokens
        name = f"{digest.hexdigest()[:24]}-{self.blocks}{'-norm' if self.all_frozen else ''}"
        # A second training in the same process may use other data, where row i is another image.
        if self.cache is None or self.cache.name != name:
            self.cache = FeatureCache(self.folder, name, rows, (length, self.vit.embed_dim))


def run_blocks(vit: Any, first: int, hidden_BLD: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Run the blocks of a plain ViT starting from number `first`, [B, L, D]; if the ViT uses activation checkpointing,
    activations are recomputed in the backward pass. attn_mask: added to the attention logits of every block."""
    # One by one: `blocks` is a Sequential, which cannot pass a mask on.
    for block in vit.blocks[first:]:
        # As timm's forward_features, which however does not recompute with a mask.
        if vit.grad_checkpointing:
            hidden_BLD = checkpoint(block, hidden_BLD, use_reentrant=False, attn_mask=attn_mask)
        else:
            hidden_BLD = block(hidden_BLD, attn_mask=attn_mask)
    return hidden_BLD


class FeatureCache:
    """One float32 row [L, D] for each version of an image of the training split, written when it is first seen.

    Two files: `NAME.float32` has the rows, `NAME.there` one byte per row that says whether it was written. Both are
    memory-mapped: memory holds only what is in use, and processes on the same machine share them. A process that misses
    a row computes and writes it; two that do so write the same values.

    Args:
        folder: created if missing.
        name: identifies what the features depend on: data, frozen weights, size. Each name has its own pair of files.
        rows: R.
        shape: L and D.

    Raises:
        UserError: the files do not fit on the disk (74), or do not have the expected size (65).
    """

    def __init__(self, folder: str | Path, name: str, rows: int, shape: tuple[int, int]) -> None:
        self.name, folder = name, expand_user(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.mark = folder / f"{name}.float32", folder / f"{name}.there"
        row_bytes = 4 * shape[0] * shape[1]
        sizes = {self.file: rows * row_bytes, self.mark: rows}
        # Checked beforehand: the files are sparse, so a full disk would only show in the middle of a run. A run that
        # was killed may have left files of full size that are mostly holes: the marks say how many rows are there.
        there = np.count_nonzero(np.fromfile(self.mark, np.uint8)) if self.mark.exists() and self.file.exists() else 0
        wanted, free = max(0, rows - there) * (row_bytes + 1), shutil.disk_usage(folder).free
        if wanted > free:
            what = f"{rows:,} rows of features need {wanted / 1e9:.1f} GB more, the disk has {free / 1e9:.1f} GB"
            todo = "Name a folder on a larger disk, or set model.backbone.image.feature_cache to null"
            raise UserError(folder, what, todo, ExitCode.IO_ERROR)
        for path, size in sizes.items():
            # Appending never empties the file: another process may have created it.
            with path.open("ab") as file:
                if file.tell() == 0:
                    file.truncate(size)  # a sparse file: it takes disk space as rows are written
            if path.stat().st_size != size:
                what = f"has {path.stat().st_size:,} bytes, expected {size:,}"
                raise UserError(path, what, "Remove it: it will be created again", ExitCode.BAD_DATA)
        # (R, L, D) and (R,)
        self.features_RLD = np.memmap(self.file, np.float32, "r+", shape=(rows, *shape))
        self.written_R = np.memmap(self.mark, np.uint8, "r+", shape=(rows,))

    def get(self, rows_B: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The features of these rows, [B, L, D], float32, on the device of `rows_B`.

        Args:
            rows_B: int64, rows in [0, R) (see `feature_rows`); a row may occur twice. -1: computed and not stored.
            compute: returns the features [M, L, D] of the missing rows, given their indices [M] into `rows_B`.
        """
        row_B = rows_B.cpu().numpy()
        # A copy, since the index is an array. Row -1 reads the last row here and is computed below.
        features_BLD = torch.from_numpy(self.features_RLD[row_B])
        # A position of all zeros was never written: after a power cut, or on another machine that shares the folder, a
        # mark may be visible before its row.
        empty_B = ~features_BLD.any(-1).all(-1).numpy()
        missing_M = np.flatnonzero((self.written_R[row_B] == 0) | (row_B < 0) | empty_B)
        if len(missing_M):
            fresh_MLD = compute(torch.from_numpy(missing_M).to(rows_B.device)).float().cpu()
            features_BLD[missing_M] = fresh_MLD
            # Row -1 is not stored.
            known = row_B[missing_M] >= 0
            # Write the row before its mark, so that a process that finds the mark reads a complete row.
            self.features_RLD[row_B[missing_M][known]] = fresh_MLD.numpy()[known]
            self.written_R[row_B[missing_M][known]] = 1
        return features_BLD.to(rows_B.device)
