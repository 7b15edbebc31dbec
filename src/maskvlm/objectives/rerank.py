"""Re-ranking: the cross encoders and matching re-score the top candidates of contrast (paper sec. 4).

Features are computed once and kept in host memory. Each process keeps the images of the evaluation batches that it
encoded and scores their pairs one batch (tile) at a time; captions, which are small, are held by all processes. The
device holds only a tile's images and a chunk of pairs, however large the gallery is. Every process computes a given
tile identically, so metrics do not depend on the number of processes.

Shapes: B images of the gallery, P of a tile, C captions, X images and U captions of a chunk, E contrast width, L and T
positions, D width, M pairs, m pairs of a chunk.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from maskvlm.data.batch import Batch
from maskvlm.model.cross_attention import Context
from maskvlm.model.heads import Matching, Projection
from maskvlm.model.maskvlm import Fused, MaskVLM
from maskvlm.objectives.retrieval_metrics import Scores, best_items, candidates, contrast_scores
from maskvlm.utils.distributed import gather_objects
from maskvlm.utils.errors import UserError

CHUNK = 256  # pairs in one pass of the cross encoders: 0.45 GB per float32 activation [m, L, D] of ViT-B at 384 px
Item = TypeVar("Item")


class SharedFeatures(NamedTuple):
    """The part of an evaluation batch that all processes need. index_B, owner_C: indices in the split of each image,
    and of each caption's image."""

    index_B: Tensor
    image_BE: Tensor
    text_CE: Tensor
    text_CTD: Tensor
    attention_CT: Tensor
    owner_C: Tensor
    texts: tuple[str, ...]


class EncodedBatch(NamedTuple):
    """An encoded evaluation batch in host memory; image_BLD never leaves the process."""

    public: SharedFeatures
    image_BLD: Tensor


class Gallery(NamedTuple):
    """A whole split in host memory, the same rows in all processes.

    Attributes:
        index_B: index of each image in the split.
        image_BE, text_CE: unit vectors.
        text_CTD, attention_CT: caption features, padded to the longest.
        owner_C: row of each caption's image.
        texts: the captions; "" if the data does not provide them.
        tiles: image features [P, L, D] of this process's tiles, by their first row.
    """

    index_B: Tensor
    image_BE: Tensor
    text_CE: Tensor
    text_CTD: Tensor
    attention_CT: Tensor
    owner_C: Tensor
    texts: list[str]
    tiles: dict[int, Tensor]


def offload(projection: Projection, batch: Batch, image_BLD: Tensor, text_CTD: Tensor, matched: bool) -> EncodedBatch:
    """Copy an encoded batch to host memory: features in the run's precision, unit vectors in float32.

    Args:
        matched: whether pairs will be matched; if not, only the unit vectors are kept.
    """
    # Under autocast, in its dtype, which takes half the memory.
    kind = image_BLD.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else image_BLD.dtype
    # slice(0) leaves [B, 0, D]: no features, but the axes that the gallery expects.
    positions = slice(None if matched else 0)
    public = SharedFeatures(
        _host(batch.index_B),
        _host(projection.embed_image(image_BLD)),
        _host(projection.embed_text(text_CTD, batch.attention_CT)),
        _host(text_CTD[:, positions], precision),
        _host(batch.attention_CT[:, positions]),
        # Indices in the split: a row of this batch means nothing to other processes.
        _host(batch.index_B[batch.owner_C]),
        batch.texts or ("",) * len(batch.owner_C),
    )
    return EncodedBatch(public, _host(image_BLD[:, positions], precision))


def _host(x: Tensor, precision: torch.dtype | None = None) -> Tensor:
    """A copy in host memory: a view would keep, and send, the whole tensor that it belongs to."""
    return x.detach().to("cpu", precision or x.dtype, copy=True)


def in_rounds(own: Iterable[Item], count: int) -> Iterator[Item]:
    """The `count` items of each process, gathered in rounds of one item per process: NCCL moves objects through device
    memory, and no process runs ahead of the others by more than one item."""
    own_items = iter(own)
    # All processes take part in every round, even with no items left: a gather waits for all.
    counts: list[Any] = gather_objects(count)
    for _ in range(max(counts)):
        items: list[Any] = gather_objects(next(own_items, None))
        yield from (item for item in items if item is not None)


def gather_gallery(batches: list[EncodedBatch]) -> Gallery | None:
    """Merge the batches of all processes into one gallery, in split order; None if there are no batches.

    Raises:
        UserError: an image was added twice, which would leave one copy without captions (2).
    """
    # In split order, whichever process encoded them.
    parts = sorted(in_rounds((part.public for part in batches), len(batches)), key=lambda part: int(part.index_B[0]))
    if not parts:
        return None
    index_B = torch.cat([part.index_B for part in parts])
    if len(index_B.unique()) < len(index_B):
        what = "images were taken in twice since the last `compute`"
        raise UserError("evaluation", what, "Call task.begin_evaluation() before an evaluation's first batch")
    # Index in the split -> row of the gallery.
    row = torch.full((int(index_B.max()) + 1,), -1)
    row[index_B] = torch.arange(len(index_B))
    return Gallery(
        index_B,
        torch.cat([part.image_BE for part in parts]),
        torch.cat([part.text_CE for part in parts]),
        pad_sequence([text_TD for part in parts for text_TD in part.text_CTD], batch_first=True),
        pad_sequence([attention_T for part in parts for attention_T in part.attention_CT], batch_first=True),
        row[torch.cat([part.owner_C for part in parts])],
        [text for part in parts for text in part.texts],
        {int(row[part.public.index_B[0]]): part.image_BLD for part in batches},
    )


@torch.no_grad()
def score_gallery(
    backbone: MaskVLM,
    head: Matching | None,
    gallery: Gallery,
    k: int | None,
    chunk: int = CHUNK,
    contrast: float = 0.0,
) -> Scores:
    """Contrast of all pairs, and matching of each query's k best in both directions; the same in all processes.

    Matching is trained to tell true pairs from negatives drawn in proportion to exp(ITC logit), so its log-odds
    estimate what is true *beyond* contrast: log p - log q, where q is the distribution of the negatives
    (noise-contrastive estimation, Gutmann and Hyvarinen 2010). Ranking by p requires the sum of both.

    Args:
        backbone, head: in evaluation mode; without head, contrast alone.
        gallery: from the same backbone.
        k: candidates per query; None matches all pairs.
        chunk: pairs in one pass of the cross encoders; bounds memory.
        contrast: factor of the cosine that is added to the log-odds: 1 / temperature for the sum; 0: matching alone.
    """
    contrast_BC = contrast_scores(gallery.image_BE, gallery.text_CE)
    if head is None:
        return Scores(contrast_BC, None, gallery.owner_C)
    best = None if k is None else best_items(contrast_BC, k)
    wanted_BC = torch.ones(contrast_BC.shape, dtype=torch.bool) if best is None else candidates(best)
    match_BC = match_pairs(backbone, head, gallery, wanted_BC, chunk)
    return Scores(contrast_BC, match_BC + contrast * contrast_BC if contrast else match_BC, gallery.owner_C, best)


@torch.no_grad()
def match_pairs(backbone: MaskVLM, head: Matching, gallery: Gallery, wanted_BC: Tensor, chunk: int = CHUNK) -> Tensor:
    """Matching log-odds of the wanted pairs, [B, C], float32; NaN elsewhere. Each process scores its own tiles."""
    # A generator: each tile is scored in its round.
    own = (
        (first, match_tile(backbone, head, gallery, first, wanted_BC[first : first + len(tile)], chunk))
        for first, tile in gallery.tiles.items()
    )
    match_BC = torch.full(wanted_BC.shape, torch.nan, dtype=torch.float32)
    for first, tile in in_rounds(own, len(gallery.tiles)):
        match_BC[first : first + len(tile)] = tile
    return match_BC


def match_tile(
    backbone: MaskVLM, head: Matching, gallery: Gallery, first: int, wanted_PC: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Log-odds [P, C] of the wanted pairs of the tile that starts at row `first`, in host memory; NaN elsewhere.

    Pairs are ordered by caption, so that a chunk has few captions. Keys and values of the tile's images are projected
    once, those of captions once per chunk, as is the first self-attention of both. With or without autocast, features
    take the dtype of the weights on the device.
    """
    weight = next(backbone.parameters())
    image_PLD = gallery.tiles[first].to(weight)
    # Keys and values of the images, once for all captions.
    image_context = backbone.cross_text.context(image_PLD)
    # Transposed, so that the pairs of a caption are adjacent.
    text_M, image_M = wanted_PC.T.nonzero(as_tuple=True)
    log_odds: list[Tensor] = []
    for start in range(0, len(text_M), chunk):
        text_m, image_m = text_M[start : start + chunk], image_M[start : start + chunk]
        # The U captions of this chunk, and the index of each pair's caption among them.
        row_U, at_m = text_m.unique(return_inverse=True)
        # Cut to the chunk's longest caption: the gallery is padded to the longest of all.
        length = int(gallery.attention_CT[row_U].sum(1).max())
        attention_UT = gallery.attention_CT[row_U, :length].to(weight.device)
        text_UTD = gallery.text_CTD[row_U, :length].to(weight)
        # Images as well: the self-attention of the first block, which pairs share, is computed once.
        used_X, of_m = image_m.unique(return_inverse=True)
        used_X, of_m, at_m = used_X.to(weight.device), of_m.to(weight.device), at_m.to(weight.device)
        context = backbone.cross_image.context(text_UTD, attention_UT, at_m)
        there = Context(image_context.blocks, None, used_X[of_m])
        fused = Fused(
            backbone.cross_image(image_PLD[used_X], context, num_full=0, row_B=of_m).cls_BD,
            backbone.cross_text(text_UTD, there, attention_UT, num_full=0, row_B=at_m).cls_BD,
        )
        # (m, 2): mismatch, match. Their difference is log p - log(1 - p).
        logits_m2 = head(fused.product_MD).float()
        log_odds.append(logits_m2[:, 1] - logits_m2[:, 0])
    log_odds_PC = torch.full(wanted_PC.shape, torch.nan, dtype=torch.float32)
    if log_odds:
        # One copy per tile, so that no chunk waits for the one before it.
        log_odds_PC[image_M, text_M] = torch.cat(log_odds).cpu()
    return log_odds_PC
