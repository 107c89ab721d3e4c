"""Image sizes: how they grow over a run, and how a batch gets another one on its device."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Resolutions", "resized"]


@dataclass(frozen=True)
class Resolutions:
    """The size of the training images by epoch. A function of the epoch alone, so resuming is too.

    Attributes:
        sizes: The first epoch, from 0, and the side in pixels of each size, in order of epochs.
    """

    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, shares: Iterable[tuple[float, int]], epochs: float) -> "Resolutions":
        """The sizes of a run.

        Args:
            shares: From which share of the run on images have which size; the first share is 0.
            epochs: Of the run. A size starts with a whole epoch.
        """
        # Without the small term, rounding would make 0.6 of 5 epochs one epoch late.
        return cls(tuple((math.ceil(share * epochs - 1e-9), size) for share, size in shares))

    def at(self, epoch: int) -> int:
        """Side in pixels of the images in an epoch, counted from 0."""
        return next(size for first, size in reversed(self.sizes) if first <= epoch)

    def by_epoch(self, epochs: float) -> list[tuple[float, int]]:
        """The length of each epoch, 1 or the last one's share, and its size."""
        return [(min(1, epochs - epoch), self.at(epoch)) for epoch in range(math.ceil(epochs))]


def resized(images: Tensor, size: int) -> Tensor:
    """Square images of another size, bilinear and antialiased.

    Args:
        images: (N, C, H, W) float.
        size: Side of the result in pixels.

    Returns:
        (N, C, size, size) in the memory format of the images; the images themselves if they have
        that size.
    """
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
