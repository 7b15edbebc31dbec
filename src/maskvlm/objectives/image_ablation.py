"""Image ablation: noise instead of images, a control that separates what the image contributes from guessing."""

import torch
from torch import Tensor, nn

from maskvlm.objectives.masking import Uniform
from maskvlm.utils.distributed import gather


class ImageAblation(nn.Module):
    """Normal noise with the mean and variance of the training images in each channel.

    The statistics cover all images seen in training so far: those of one batch, let alone one image, would reveal its
    background. All processes hold the same values. Before the first training step they are 0 and 1, the target of
    normalisation.
    """

    seen: Tensor
    mean_C: Tensor
    square_C: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean_C", torch.zeros(3))
        self.register_buffer("square_C", torch.ones(3))

    def forward(self, image: Tensor, uniform: Uniform) -> Tensor:
        """Noise with the shape of `image`, [rows, ..., 3, H, W]; in training, `image` updates the statistics."""
        if self.training:
            self._take(image)
        first, second = uniform(len(image), *image.shape[1:]), uniform(len(image), *image.shape[1:])
        noise = (-2 * first.clamp(min=1e-7).log()).sqrt() * (2 * torch.pi * second).cos()  # Box-Muller
        # Rounding can make the variance of a single colour slightly negative.
        mean, std = self.mean_C, (self.square_C - self.mean_C.square()).clamp(min=0).sqrt()
        return (noise * std[:, None, None] + mean[:, None, None]).to(image)

    @torch.no_grad()
    def _take(self, image: Tensor) -> None:
        # (rows, ..., 3, H, W) -> (3, all pixels of this process)
        channels = image.detach().float().flatten(0, -4).transpose(0, 1).flatten(1)
        mean_C, square_C = gather(torch.stack([channels.mean(1), channels.square().mean(1)])[None]).mean(0)
        known = square_C.isfinite().all()  # non-finite images must not affect later steps
        self.seen += known
        # Running means over steps. Processes hold equally many images, so the mean of their means is the overall mean.
        self.mean_C += torch.where(known, (mean_C - self.mean_C) / self.seen, 0.0)
        self.square_C += torch.where(known, (square_C - self.square_C) / self.seen, 0.0)
