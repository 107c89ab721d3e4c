"""Test-time augmentation: the scores of several views of an image, averaged."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TestTimeAugmentation", "averaged_logits"]

TestTimeAugmentation = Literal["none", "mirror", "mirror-translate"]
_SHIFT = 1


def averaged_logits(
    model: nn.Module, images: Tensor, logits: Tensor, kind: TestTimeAugmentation
) -> Tensor:
    """Mean scores of the views of each image.

    `mirror` averages an image and its mirror image. `mirror-translate` does so for the image and
    for its shifts by one pixel down and right, and up and left, filled by reflection; the image
    itself has half of the weight, the two shifts have the other half together. This is how
    airbench evaluates (K. Jordan, arXiv 2404.00498, section 3.5).

    Args:
        model: In evaluation mode.
        images: (N, C, H, W) float.
        logits: (N, classes), the model's for these images.
        kind: Which views.

    Returns:
        (N, classes) float32.
    """
    averaged = _with_mirror(model, images, logits)
    if kind == "mirror":
        return averaged
    height, width = images.shape[2:]
    padded = F.pad(images, (_SHIFT,) * 4, mode="reflect")
    shifted = torch.zeros_like(averaged)
    for view in (padded[:, :, :height, :width], padded[:, :, 2 * _SHIFT :, 2 * _SHIFT :]):
        shift = torch.empty_like(images).copy_(view)  # in the memory format of the images
        shifted += _with_mirror(model, shift, model(shift))
    return 0.5 * averaged + 0.25 * shifted


def _with_mirror(model: nn.Module, images: Tensor, logits: Tensor) -> Tensor:
    return 0.5 * (logits.float() + model(images.flip(3)).float())
