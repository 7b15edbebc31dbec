"""Whether an image lies within what a model was trained on, told by the model's own features of its patches.

The features of a validation split's images, each the mean over its patches, have a mean and a covariance; a new image
is as far as its Mahalanobis distance to them (Lee et al., NeurIPS 2018, with a single class). Far is what is beyond
nearly all images of the split, measured on images that the covariance was not fitted to. Contrast vectors tell less:
they are trained to forget what no caption names. Of the split a sample is kept, so that it fits into a checkpoint; the
threshold follows from the sample.

Shapes: N images of the sample, B images asked about, D width, L tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MOST = 500  # images of a sample: 400 KB at width 384
LEAST = 50  # below that their distances have no upper end to speak of
FAR = 0.01
"""Share of images like the sample's that lie beyond the threshold."""
SHRINKAGE = 0.1
"""Share of the mean variance that is added along each axis: with fewer images than axes some have no variance."""


PARTS = 4
"""Number of parts of a sample; the distances of each part are measured with a range fitted to the others."""


class FarFromTraining(UserWarning):
    """An image is unlike those that the model was trained on."""


class KnownRange(NamedTuple):
    """Range of the features that a model was trained on.

    Attributes:
        mean_D: of the sample's features.
        axis_DD: orthonormal, one a column: along them the features vary independently.
        variance_D: along each axis.
        most: the distance beyond which an image is far.
    """

    mean_D: Tensor
    axis_DD: Tensor
    variance_D: Tensor
    most: float


def mean_patch(image_BLD: Tensor) -> Tensor:
    """Features of images, the mean over their patches, [B, D], float32.

    Args:
        image_BLD: of the image encoder, the class token first.
    """
    return image_BLD[:, 1:].float().mean(1)


def sample_of(feature_ND: Tensor, most: int = MOST) -> Tensor:
    """Sample of at most `most` of a split's features, evenly spaced, as float16 in host memory, for checkpoints."""
    return feature_ND.detach().cpu()[evenly_spaced(len(feature_ND), most)].half()


def evenly_spaced(count: int, most: int = MOST) -> list[int]:
    """At most `most` of the numbers from 0 to below `count`, the first and the last among them."""
    places: list[int] = torch.linspace(0, count - 1, min(most, count)).round().long().tolist()
    return places


def fit_range(sample_ND: Tensor, share: float = FAR) -> KnownRange | None:
    """The range of a sample; None where it has fewer than LEAST images.

    Args:
        sample_ND: by `sample_of`.
        share: of images like these that lie beyond the threshold.
    """
    if len(sample_ND) < LEAST:
        return None
    part_N = torch.arange(len(sample_ND)) % PARTS
    # An image is nearer to a mean and a covariance that it is itself a part of.
    parts = [distance_to(sample_ND[part_N == part], _fit(sample_ND[part_N != part])) for part in range(PARTS)]
    distance_N = torch.cat(parts)
    return _fit(sample_ND)._replace(most=float(distance_N.quantile(1 - share)))


def _fit(sample_ND: Tensor) -> KnownRange:
    feature_ND = sample_ND.double()
    mean_D = feature_ND.mean(0)
    variance_D, axis_DD = torch.linalg.eigh(torch.cov(feature_ND.T))
    # Where all images are alike nothing varies; any other is far then.
    added = SHRINKAGE * variance_D.mean().clamp(min=1e-12)
    return KnownRange(mean_D, axis_DD, variance_D.clamp(min=0) + added, 0.0)


def distance_to(feature_BD: Tensor, known: KnownRange) -> Tensor:
    """The distance of each image to those of the sample, [B], float64.

    Args:
        feature_BD: by `mean_patch` of the same model.
    """
    along_BD = (feature_BD.double().cpu() - known.mean_D) @ known.axis_DD
    return (along_BD.square() / known.variance_D).sum(1).sqrt()


def far_line(measured: float, known: KnownRange) -> str:
    """The line for people; `measured` by `distance_to`."""
    times = measured / max(known.most, 1e-12)  # 0 where all of them are alike
    return (
        f"this image is unlike those that the model was trained on: {times:.1f} times as far from them "
        f"as {100 * (1 - FAR):g} % of such images are; take the answers with care"
    )
