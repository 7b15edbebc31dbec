"""Out-of-distribution detection: whether an image resembles the training images, judged by the model's patch features.

A mean and a covariance are fitted to the features of a validation split's images, each the mean over its patches. The
score of a new image is its Mahalanobis distance to them (Lee et al., NeurIPS 2018, with a single class). An image is
far if its distance exceeds that of nearly all images of the split, measured on images that the covariance was not
fitted to. Contrast vectors are less suitable: they are trained to discard what no caption names. The checkpoint keeps
only a sample of the split, which determines the threshold.

Shapes: N images of the sample, B images to score, D width, L tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MOST = 500  # images in a sample: 400 KB at width 384
LEAST = 50  # with fewer images, the upper end of their distances is not well defined
FAR = 0.01
"""Share of images like the sample's that lie beyond the threshold."""
SHRINKAGE = 0.1
"""Share of the mean variance that is added to each axis: with fewer images than axes, some have no variance."""


PARTS = 4
"""Number of parts of a sample; the distances of each part are measured with a range fitted to the others."""


class FarFromTraining(UserWarning):
    """An image is unlike the training images."""


class KnownRange(NamedTuple):
    """Distribution of the features that a model was trained on.

    Attributes:
        mean_D: mean of the sample's features.
        axis_DD: orthonormal axes, one per column, along which the features are uncorrelated.
        variance_D: variance along each axis.
        most: distance beyond which an image is far.
    """

    mean_D: Tensor
    axis_DD: Tensor
    variance_D: Tensor
    most: float


def mean_patch(image_BLD: Tensor) -> Tensor:
    """Image features, averaged over the patches, [B, D], float32.

    Args:
        image_BLD: output of the image encoder, the class token first.
    """
    return image_BLD[:, 1:].float().mean(1)


def sample_of(feature_ND: Tensor, most: int = MOST) -> Tensor:
    """At most `most` evenly spaced features of a split, as float16 in host memory, for checkpoints."""
    return feature_ND.detach().cpu()[evenly_spaced(len(feature_ND), most)].half()


def evenly_spaced(count: int, most: int = MOST) -> list[int]:
    """At most `most` evenly spaced numbers from 0 to below `count`, including the first and the last."""
    places: list[int] = torch.linspace(0, count - 1, min(most, count)).round().long().tolist()
    return places


def fit_range(sample_ND: Tensor, share: float = FAR) -> KnownRange | None:
    """Fit the range to a sample; None if it has fewer than LEAST images.

    Args:
        sample_ND: from `sample_of`.
        share: share of similar images that lie beyond the threshold.
    """
    if len(sample_ND) < LEAST:
        return None
    part_N = torch.arange(len(sample_ND)) % PARTS
    # An image is closer to a mean and a covariance that were fitted to it.
    parts = [distance_to(sample_ND[part_N == part], _fit(sample_ND[part_N != part])) for part in range(PARTS)]
    distance_N = torch.cat(parts)
    return _fit(sample_ND)._replace(most=float(distance_N.quantile(1 - share)))


def _fit(sample_ND: Tensor) -> KnownRange:
    feature_ND = sample_ND.double()
    mean_D = feature_ND.mean(0)
    variance_D, axis_DD = torch.linalg.eigh(torch.cov(feature_ND.T))
    # If all images are identical, nothing varies and any other image is far.
    added = SHRINKAGE * variance_D.mean().clamp(min=1e-12)
    return KnownRange(mean_D, axis_DD, variance_D.clamp(min=0) + added, 0.0)


def distance_to(feature_BD: Tensor, known: KnownRange) -> Tensor:
    """Distance of each image to the sample, [B], float64.

    Args:
        feature_BD: from `mean_patch`, with the same model.
    """
    along_BD = (feature_BD.double().cpu() - known.mean_D) @ known.axis_DD
    return (along_BD.square() / known.variance_D).sum(1).sqrt()


def far_line(measured: float, known: KnownRange) -> str:
    """The warning message; `measured` is from `distance_to`."""
    times = measured / max(known.most, 1e-12)  # `most` is 0 if all images of the sample are identical
    return (
        f"this image is unlike those that the model was trained on: {times:.1f} times as far from them "
        f"as {100 * (1 - FAR):g} % of such images are; take the answers with care"
    )
