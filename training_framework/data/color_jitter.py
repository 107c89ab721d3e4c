"""Random brightness, contrast and saturation of whole batches on their device."""

import torch
from torch import Tensor

from training_framework.data.auto_augment import luma

__all__ = ["color_jitter"]


def color_jitter(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Change brightness, then contrast, then saturation, each by a factor of the image's own.

    The steps are those of Pillow's ImageEnhance, in one order for all images (torchvision's
    ColorJitter draws the order too, and can turn the hue).

    Args:
        images: (N, 3, H, W) uint8.
        draws: (3, N) uniform in [0, 1), one for each step.
        strength: The factors are even in [max(0, 1 - strength), 1 + strength].

    Returns:
        (N, 3, H, W) uint8, channels_last in memory.
    """
    least = max(0.0, 1 - strength)
    brightness, contrast, saturation = (least + (1 + strength - least) * draws)[
        ..., None, None, None
    ]
    pixels = images.permute(0, 2, 3, 1).contiguous()
    pixels = _towards(torch.zeros((), device=images.device), pixels, brightness)
    gray = (luma(pixels).mean((1, 2)) + 0.5).floor()
    pixels = _towards(gray[:, None, None, None], pixels, contrast)
    pixels = _towards(luma(pixels)[..., None], pixels, saturation)
    return pixels.permute(0, 3, 1, 2)


def _towards(other: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """`other` for a factor of 0, the pixels for 1, and beyond them above that."""
    return (other + (pixels.float() - other) * factor).clamp(0, 255).to(torch.uint8)
