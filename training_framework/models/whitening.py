"""A first convolution that whitens patches of the training images, and is not trained."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["first_convolution", "freeze_first_convolution", "whiten_first_convolution"]

# Added to the variances, which are near zero for the finest patterns (airbench94's value).
SMALLEST_VARIANCE = 5e-4
# Patches of so many images are unfolded at a time.
IMAGES_AT_ONCE = 64


def first_convolution(model: nn.Module) -> nn.Conv2d | None:
    """The network's `conv1`, if it is one convolution of colour images; None otherwise."""
    found = getattr(model, "conv1", None)
    return found if isinstance(found, nn.Conv2d) and found.in_channels == 3 else None


def freeze_first_convolution(model: nn.Module) -> int:
    """Do not train the filters of the first convolution; its bias, if any, is still trained.

    Returns:
        1, or 0 with a warning if `model` has no `conv1` of colour images.
    """
    convolution = first_convolution(model)
    if convolution is None:
        warnings.warn(
            "whitening: the network has no single first convolution; nothing changed", stacklevel=2
        )
        return 0
    convolution.weight.requires_grad_(False)
    return 1


@torch.no_grad()
def whiten_first_convolution(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the filters so that their outputs over the images are uncorrelated, with variance 1.

    A filter is an eigenvector of the covariance of all patches as large as it, divided by the
    root of the eigenvalue: Page, "How to Train Your ResNet 8" (2019), and Jordan,
    arXiv 2404.00498, section 3.1. Each is there twice, with both signs, since the activation that
    follows cuts one of them. The eigenvectors are those of the largest eigenvalues, as many as
    there are pairs of filters; filters that are left over keep their weights.

    Args:
        model: Its `conv1` changes; see `first_convolution`.
        batches: (n, 3, H, W) normalized images.
    """
    convolution = first_convolution(model)
    assert convolution is not None
    weight = convolution.weight
    eigenvalues, eigenvectors = torch.linalg.eigh(_patch_covariance(batches, weight))
    pairs = min(len(weight) // 2, len(eigenvalues))
    scales = (eigenvalues[-pairs:] + SMALLEST_VARIANCE).rsqrt()
    filters = (eigenvectors[:, -pairs:] * scales).T.flip(0).reshape(pairs, *weight.shape[1:])
    weight[: 2 * pairs] = torch.cat((filters, -filters)).to(weight)
    if convolution.bias is not None:
        convolution.bias.zero_()


def _patch_covariance(batches: Iterable[Tensor], weight: Tensor) -> Tensor:
    """Mean product of the values of a patch, (D, D) in float64; D is channels x height x width."""
    size = weight[0].numel()
    total, patches = torch.zeros(size, size, dtype=torch.float64), 0
    for batch in batches:
        for images in batch.split(IMAGES_AT_ONCE):
            kernel = (weight.shape[2], weight.shape[3])
            columns = functional.unfold(images.float(), kernel).transpose(0, 1).flatten(1)
            total += (columns @ columns.T).double().cpu()
            patches += columns.shape[1]
    return total / max(patches, 1)
