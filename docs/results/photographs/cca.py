r"""The baseline that trains nothing: canonical correlation of frozen features of images and captions, in closed form.

    .venv/bin/python docs/results/photographs/cca.py --data data/flickr8k \
        --image-weights encoders/vit_small_patch14 --text encoders/minilm

Fitted on the training pairs, measured as every other row is: all captions of the validation images, both ways. Image
features are class token and mean patch of the ViT's last four blocks, each after its last norm (Klein et al. 2015 fit
the same model to features of VGG and mean word vectors). Without the two options the encoders come from the hub.

Shapes: N images, C captions, X and Y features, K of the shared space.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from maskvlm.data.batch import InputSpec
from maskvlm.data.images import safe_open
from maskvlm.data.prepared.source import Prepared
from maskvlm.data.text import Captioner
from maskvlm.data.transforms import eval_transform
from maskvlm.model.encoders import ImageEncoder, TextEncoder
from maskvlm.objectives.retrieval_metrics import Scores, contrast_scores, rankings, retrieval_metrics

BLOCKS = 4  # of the ViT that are read, from the top


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a prepared set with train and val")
    parser.add_argument("--image", default="vit_small_patch14_dinov2.lvd142m", help="timm's name of the ViT")
    parser.add_argument("--image-weights", help="file or folder of its weights")
    parser.add_argument("--image-size", type=int, default=112, help="pixels")
    parser.add_argument("--text", default="sentence-transformers/all-MiniLM-L6-v2", help="name or folder")
    parser.add_argument("--batch", type=int, default=100, help="images at a time")
    parser.add_argument("--ridge", type=float, default=0.3, help="share of the mean variance that is added")
    parser.add_argument("--width", type=int, default=256, help="of the shared space")
    parser.add_argument("--out", type=Path, help="metrics.json to be written")
    return parser.parse_args()


@torch.no_grad()
def features(pairs: Any, image: ImageEncoder, text: TextEncoder, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features [N, X] of a split's images and [C, Y] of its captions, and the image of each caption [C]."""
    transform, captioner = eval_transform(spec_of(image, text)), Captioner(text.tokenizer, text.text_length)
    states: list[Tensor] = []
    for block in image.vit.blocks[-BLOCKS:]:
        block.register_forward_hook(lambda _module, _inputs, hidden: states.append(image.vit.norm(hidden.float())))
    image_NX, text_CY, owner = [], [], []
    for first in track(range(0, len(pairs), batch), description=pairs.name):
        rows = [pairs[at] for at in range(first, min(first + batch, len(pairs)))]
        states.clear()
        image(torch.stack([transform(safe_open(row["image"], row["origin"])) for row in rows]))
        image_NX.append(torch.cat([part for h in states for part in (h[:, 0], h[:, 1:].mean(1))], 1))
        tokens = captioner([caption for row in rows for caption in row["captions"]])
        words_CTD = text(tokens[0], tokens[1]).float() * tokens[1][..., None]
        text_CY.append(words_CTD.sum(1) / tokens[1].sum(1, keepdim=True))
        owner += [first + at for at, row in enumerate(rows) for _ in row["captions"]]
    for block in image.vit.blocks[-BLOCKS:]:
        block._forward_hooks.clear()
    return torch.cat(image_NX), torch.cat(text_CY), torch.tensor(owner)


def spec_of(image: ImageEncoder, text: TextEncoder) -> InputSpec:
    """What the transform and the captioner must know."""
    return InputSpec(image.image_size, image.mean, image.std, text.text_length, text.vocab_size, text.tokenizer)


def fit(x_CX: Tensor, y_CY: Tensor, ridge: float, width: int) -> tuple[Tensor, Tensor]:
    """Projections [X, K] and [Y, K] of centred features onto their canonical directions, each times its correlation."""

    def whiten(z: Tensor) -> Tensor:
        covariance = z.T @ z / len(z)
        covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=z.dtype)
        values, vectors = torch.linalg.eigh(covariance)
        return vectors @ torch.diag(values.rsqrt()) @ vectors.T

    white_x, white_y = whiten(x_CX), whiten(y_CY)
    left, correlation_K, right = torch.linalg.svd(white_x @ (x_CX.T @ y_CY / len(x_CX)) @ white_y)
    correlation_K = correlation_K[:width]
    return white_x @ left[:, :width] * correlation_K, white_y @ right[:width].T * correlation_K


def main() -> None:
    """Fit, measure, print."""
    options = parse()
    image = ImageEncoder(options.image, options.image_size, options.image_weights)
    text = TextEncoder(options.text)
    for encoder in (image, text):
        encoder.load_pretrained()
        encoder.eval()
    source = Prepared(options.data)
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
        x_NX, y_CY, owner_C = features(source.split("train"), image, text, options.batch)
        held_x, held_y, held_owner = features(source.split("val"), image, text, options.batch)
    x_CX, y_CY = x_NX[owner_C].double(), y_CY.double()
    mean_x, mean_y = x_CX.mean(0), y_CY.mean(0)
    to_x, to_y = fit(x_CX - mean_x, y_CY - mean_y, options.ridge, options.width)
    image_NK = F.normalize((held_x.double() - mean_x) @ to_x, dim=1)
    text_CK = F.normalize((held_y.double() - mean_y) @ to_y, dim=1)
    scores = Scores(contrast_scores(image_NK, text_CK), None, held_owner)
    metrics = retrieval_metrics(scores, rankings(scores, [0]), 0)
    for way in ("tr", "ir"):
        print(way, *(f"R@{k} {metrics[f'retrieval/itc_{way}_r{k}']:.1f}" for k in (1, 5, 10)))
    if options.out:
        options.out.write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main()
