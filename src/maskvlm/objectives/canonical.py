"""Where contrast can start from: the canonical directions of the pairs' features, in closed form (CCA).

The encoders are pretrained, but not on each other: random projections first have to find which direction of the one
corresponds to which of the other, and send noise into the encoders until then. Canonical correlation analysis
(Hotelling 1936; of images and sentences: Klein et al. 2015) finds these directions from means and covariances alone.
Projections that fit before the encoders are trained change the encoders less (Kumar et al., ICLR 2022).

Shapes: C pairs, X and Y features of image and text, E width of the contrast space.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maskvlm.data.batch import Batch
from maskvlm.model.heads import Projection
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.utils.errors import UserError

IMAGES = 10_000
"""Largest number of training images whose features are read."""
CAPTIONS = 5
"""Captions read with each image."""
RIDGE = 0.3
"""Share of the mean variance that is added to every direction: with few pairs, the covariances are noisy. 0.1 is as
good on 6,000 photos, and 1 on 500 (docs/results/photographs)."""
SPREAD = 0.18
"""Root mean square of the weights. Vectors are normalised, so it changes no similarity, but AdamW moves every weight by
the same amount, whatever its size: at a quarter of this, training soon undoes the start (docs/results/photographs)."""
WHERE = "model.task.contrast_start"


class Directions(NamedTuple):
    """Two linear maps into the contrast space: weights [E, X] and [E, Y], biases [E], and the canonical correlations of
    the E directions, which scale them, strongest first."""

    image_EX: Tensor
    image_bias_E: Tensor
    text_EY: Tensor
    text_bias_E: Tensor
    correlation_E: Tensor


class PairMoments:
    """Sums over pairs of features, in double precision, from which `directions` are computed.

    Args:
        image_width, text_width: X and Y.
    """

    def __init__(self, image_width: int, text_width: int) -> None:
        self.pairs = 0
        self.widths = [image_width, text_width]
        # (X + Y,) and (X + Y, X + Y): sums of all features, and of their products.
        self.sum_Z = torch.zeros(image_width + text_width, dtype=torch.float64)
        self.product_ZZ = torch.zeros(len(self.sum_Z), len(self.sum_Z), dtype=torch.float64)

    def add(self, image_CX: Tensor, text_CY: Tensor) -> None:
        """Add pairs; row by row, image and text belong together."""
        both_CZ = torch.cat([image_CX, text_CY], 1).double().cpu()
        self.pairs += len(both_CZ)
        self.sum_Z += both_CZ.sum(0)
        self.product_ZZ += both_CZ.T @ both_CZ

    def directions(self, width: int) -> Directions:
        """The first `width` pairs of canonical directions.

        Raises:
            UserError: there are fewer features than `width`, or the pairs are all the same.
        """
        if width > min(self.widths):
            what = f"contrast_dim {width} is larger than the {min(self.widths)} features that contrast reads"
            raise UserError(WHERE, what, "Set model.task.contrast_dim to fewer, or contrast_start to random")
        mean_Z = self.sum_Z / max(1, self.pairs)
        covariance_ZZ = self.product_ZZ / max(1, self.pairs) - mean_Z.outer(mean_Z)
        image_XZ, text_YZ = covariance_ZZ.split(self.widths, 0)
        image_XX, cross_XY = image_XZ.split(self.widths, 1)
        text_YY = text_YZ.split(self.widths, 1)[1]
        if not all(float(part.diagonal().mean()) > 1e-12 for part in (image_XX, text_YY)):
            what = f"the features of {self.pairs} training pairs do not differ"
            raise UserError(WHERE, what, "Look at the data, or set it to random")
        white_XX, white_YY = whitening(image_XX), whitening(text_YY)
        left_XK, correlation_K, right_KY = torch.linalg.svd(white_XX @ cross_XY @ white_YY, full_matrices=False)
        # Weak directions, which are mostly noise, count less.
        image_EX = (white_XX @ left_XK[:, :width] * correlation_K[:width]).T
        text_EY = (white_YY @ right_KY[:width].T * correlation_K[:width]).T
        image_EX, text_EY = (weight * SPREAD / weight.square().mean().sqrt() for weight in (image_EX, text_EY))
        image_mean_X, text_mean_Y = mean_Z.split(self.widths)
        return Directions(
            image_EX, -(image_EX @ image_mean_X), text_EY, -(text_EY @ text_mean_Y), correlation_K[:width]
        )


def whitening(covariance_XX: Tensor) -> Tensor:
    """The inverse square root of a covariance with RIDGE added, [X, X]."""
    ridge = RIDGE * covariance_XX.diagonal().mean()
    value_X, vector_XX = torch.linalg.eigh(covariance_XX)
    # The smallest eigenvalues of a covariance of few pairs are 0, or slightly below.
    return vector_XX * (value_X.clamp(min=0) + ridge).rsqrt() @ vector_XX.T


@torch.no_grad()
def start_from_pairs(projection: Projection, backbone: MaskVLM, batches: Iterable[Batch]) -> str:
    """Set the projections to the canonical directions of what contrast reads from the encoders.

    Args:
        projection: is changed in place, except for its temperature.
        batches: training pairs on the backbone's device, normalised, without augmentation.

    Returns:
        A line on the result.

    Raises:
        UserError: as `PairMoments.directions`.
    """
    moments, images = PairMoments(projection.image.in_features, projection.text.in_features), 0
    # The image encoder reads its feature cache in training mode only; dropout would be noise in the text encoder.
    modes = [(module, module.training) for module in (backbone.image, backbone.text)]
    backbone.image.train(backbone.image.frozen_blocks.cache is not None)
    backbone.text.eval()
    for batch in batches:
        row_B = batch.index_B.masked_fill(~batch.valid_B, -1)
        image_BX = projection.read_image(backbone.image(batch.image_BCHW, row_W=row_B))
        text_CY = projection.read_text(backbone.text(batch.token_CT, batch.attention_CT), batch.attention_CT)
        valid_C = batch.valid_B[batch.owner_C]
        moments.add(image_BX[batch.owner_C[valid_C]], text_CY[valid_C])
        images += int(batch.valid_B.sum())
    for module, training in modes:
        module.train(training)
    found = moments.directions(projection.image.out_features)
    assign(projection.image, found.image_EX, found.image_bias_E)
    assign(projection.text, found.text_EY, found.text_bias_E)
    strongest, weakest = float(found.correlation_E[0]), float(found.correlation_E[-1])
    return (
        f"contrast starts from the canonical directions of {moments.pairs:,} pairs ({images:,} images); their "
        f"correlations are {strongest:.2f} to {weakest:.2f}"
    )


def assign(linear: nn.Linear, weight_EX: Tensor, bias_E: Tensor) -> None:
    """Copy weight and bias into a linear layer."""
    linear.weight.copy_(weight_EX)
    linear.bias.copy_(bias_E)
