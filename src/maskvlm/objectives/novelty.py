"""Whether an image lies within what a model was trained on, told by the model's own contrast vectors.

Images of the validation split resemble each other: the highest cosine of each to the others has a distribution, and
a new image whose highest cosine to them is below nearly all of these is unlike everything that the model knows. Of
the split a sample is kept, so that it fits into a checkpoint; the threshold follows from the sample. It is a guess: a
strange image can fall among the known ones, and FAR of the known ones fall outside.

Shapes: N images of the sample, B images asked about, E contrast width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MOST = 500  # images of a sample: 250 KB at width 256
LEAST = 50  # below that their distribution has no lower end to speak of
FAR = 0.01
"""Share of the sample's own images that lie below the threshold."""


class FarFromTraining(UserWarning):
    """An image is unlike those that the model was trained on."""


class KnownRange(NamedTuple):
    """What a model knows.

    Attributes:
        vector_NE: unit vectors of the sample, float32.
        least: the cosine below which an image is far.
    """

    vector_NE: Tensor
    least: float


def sample_of(vector_NE: Tensor, most: int = MOST) -> Tensor:
    """At most `most` of a split's unit vectors, at even distances, as float16 in host memory: what is kept."""
    place_N = torch.linspace(0, len(vector_NE) - 1, min(most, len(vector_NE))).round().long()
    return vector_NE.detach().cpu()[place_N].half()


def fit_range(sample_NE: Tensor, share: float = FAR) -> KnownRange | None:
    """The range of a sample; None where it has fewer than LEAST images.

    Args:
        sample_NE: by `sample_of`.
        share: of the sample that lies below the threshold.
    """
    if len(sample_NE) < LEAST:
        return None
    # float16 has changed their lengths a little.
    vector_NE = torch.nn.functional.normalize(sample_NE.float(), dim=1)
    cosine_NN = vector_NE @ vector_NE.T
    # No image counts as its own neighbour.
    cosine_NN.fill_diagonal_(-1.0)
    return KnownRange(vector_NE, float(cosine_NN.max(1).values.quantile(share)))


def max_cosine(vector_BE: Tensor, known: KnownRange) -> Tensor:
    """The highest cosine of each image to those of the sample, [B], float32.

    Args:
        vector_BE: unit vectors by the same model.
    """
    return (vector_BE.float().cpu() @ known.vector_NE.T).max(1).values


def is_far(vector_BE: Tensor, known: KnownRange) -> Tensor:
    """Of each image whether it is below the range, [B]."""
    return max_cosine(vector_BE, known) < known.least


def far_line(near: float, known: KnownRange) -> str:
    """The line for people."""
    return (
        "this image is unlike those that the model was trained on: its nearest similarity to them is "
        f"{near:.2f}, {100 * (1 - FAR):g} % of them have {known.least:.2f} or more; take the answers with care"
    )
