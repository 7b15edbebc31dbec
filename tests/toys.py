"""Small stand-ins for the tests of the core: encoders 16 wide, made-up batches, slow re-implementations.

Shapes: B images, C captions, L and S positions, T tokens, D width, K masked positions.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from maskvlm.data.batch import Batch
from maskvlm.model.cross_attention import Attention, CrossEncoder
from maskvlm.model.encoders import ImageEncoder, TextEncoder
from maskvlm.model.maskvlm import MaskVLM

WIDTH, SIZE, PATCH, LENGTH, VOCAB = 16, 32, 8, 10, 40
CLS, SEP, MASK = 2, 3, 4


def toy_backbone(
    seed: int = 0,
    width: int = WIDTH,
    length: int = LENGTH,
    vocab: int = VOCAB,
    size: int = SIZE,
    depth: int = 1,
    **settings: Any,
) -> MaskVLM:
    """32-px images in 4 x 4 patches, captions of at most `length` tokens, `depth` blocks of each encoder, two cross
    blocks."""
    torch.manual_seed(seed)
    vit = {"patch_size": PATCH, "embed_dim": width, "depth": depth, "num_heads": 2}
    bert = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    image = ImageEncoder("vit_tiny_patch16_224", size, random_init=True, config=vit)
    text = TextEncoder("bert", length, random_init=True, vocab_size=vocab, config=bert)
    if settings.get("start") is None:  # a checkpoint brings its own
        text.tokenizer = SimpleNamespace(mask_token_id=MASK, pad_token_id=0)
    return MaskVLM(image, text, **{"cross_layers": 2, "cross_heads": 2, **settings})


def tokens(captions: list[list[int]], length: int | None = None) -> dict[str, Tensor]:
    """The text columns of a Batch: start and end token added, padded to the longest or to `length`."""
    longest = length or max(map(len, captions)) + 2
    token_CT = torch.zeros(len(captions), longest, dtype=torch.long)
    special_CT = torch.ones(len(captions), longest, dtype=torch.bool)
    attention_CT = torch.zeros(len(captions), longest, dtype=torch.bool)
    word_CT = torch.full((len(captions), longest), -1)
    for row, ids in enumerate(captions):
        end = len(ids) + 1
        token_CT[row, : end + 1] = torch.tensor([CLS, *ids, SEP])
        special_CT[row, 1:end] = False
        attention_CT[row, : end + 1] = True
        word_CT[row, 1:end] = torch.arange(len(ids)) // 2  # words of two pieces
    return {"token_CT": token_CT, "attention_CT": attention_CT, "special_CT": special_CT, "word_CT": word_CT}


def toy_batch(rows: int = 6, seed: int = 0, captions: int = 1, holes: tuple[int, ...] = ()) -> Batch:
    """Noise images, each with `captions` random captions of three to eight tokens; holes as data/pairs.py
    makes them."""
    generator = torch.Generator().manual_seed(seed)
    words = []
    for row in range(rows * captions):
        length = int(torch.randint(3, LENGTH - 1, (), generator=generator))
        ids = torch.randint(5, VOCAB, (length,), generator=generator).tolist()
        words.append([] if row // captions in holes else ids)
    image_BCHW = torch.randn(rows, 3, SIZE, SIZE, generator=generator)
    valid_B = torch.ones(rows, dtype=torch.bool)
    for hole in holes:
        image_BCHW[hole], valid_B[hole] = 0.0, False
    same = torch.tensor([-1 if not ids else row for row, ids in enumerate(words)])
    return Batch(
        image_BCHW=image_BCHW,
        **tokens(words),
        owner_C=torch.arange(rows).repeat_interleave(captions),
        image_id_B=torch.arange(rows) + 100,
        text_id_C=same + 1000,
        valid_B=valid_B,
        index_B=torch.arange(rows),
    )


def take(batch: Batch, rows: Tensor) -> Batch:
    """These images with their captions, trimmed to the longest that is left."""
    captions = torch.cat([(batch.owner_C == row).nonzero().flatten() for row in rows])
    longest = int(batch.attention_CT[captions].sum(1).max())
    text = {
        name: getattr(batch, name)[captions, :longest] for name in ("token_CT", "attention_CT", "special_CT", "word_CT")
    }
    images = {name: getattr(batch, name)[rows] for name in ("image_BCHW", "image_id_B", "valid_B", "index_B")}
    owner_C = (batch.owner_C[captions][:, None] == rows).long().argmax(1)
    return Batch(**images, **text, owner_C=owner_C, text_id_C=batch.text_id_C[captions])


def torch_attention(attention: Attention) -> nn.MultiheadAttention:
    """torch's own module with the weights of ours."""
    width, context_width = attention.query.in_features, attention.key_value.in_features
    other = nn.MultiheadAttention(width, attention.heads, kdim=context_width, vdim=context_width, batch_first=True)
    if context_width != width:
        other.q_proj_weight.data = attention.query.weight
        other.k_proj_weight.data, other.v_proj_weight.data = attention.key_value.weight.chunk(2)
    else:
        other.in_proj_weight.data = torch.cat([attention.query.weight, attention.key_value.weight])
    other.in_proj_bias.data = torch.cat([attention.query.bias, attention.key_value.bias])
    other.out_proj.weight.data, other.out_proj.bias.data = attention.out.weight, attention.out.bias
    return other


def slow_cross(encoder: CrossEncoder, x_LD: Tensor, context_SD: Tensor) -> Tensor:
    """One pair without padding through a cross encoder, written out with torch's attention: [L, D]."""
    x = x_LD
    place = torch.zeros_like(x) if encoder.pos_embed is None else encoder.pos_embed[0]
    for block in encoder.blocks:
        own, other = torch_attention(block.self_attention), torch_attention(block.cross_attention)
        x = block.norms[0](x + own(x + place, x, x)[0])
        x = block.norms[1](x + other(x + place, context_SD, context_SD)[0])
        x = block.norms[2](x + block.feed_forward[2](nn.functional.gelu(block.feed_forward[0](x))))
    return x


def slow_causal_block(block: Any, x: Tensor, context: Tensor) -> Tensor:
    """One block of a decoder written out, [S, D]; every position is computed from the positions up to it alone."""
    own, other = torch_attention(block.self_attention), torch_attention(block.cross_attention)
    rows = []
    for at in range(len(x)):
        past = x[: at + 1]
        y = block.norms[0](x[at : at + 1] + own(x[at : at + 1], past, past)[0])
        y = block.norms[1](y + other(y, context, context)[0])
        rows.append(block.norms[2](y + block.feed_forward[2](nn.functional.gelu(block.feed_forward[0](y)))))
    return torch.cat(rows)
