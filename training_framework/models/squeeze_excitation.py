"""Squeeze and excitation: weigh channels by what their averages say."""

import torch
from torch import Tensor, nn

__all__ = ["SqueezeExcitation"]

REDUCTION = 16
CHANNEL_MULTIPLE = 8


class SqueezeExcitation(nn.Module):
    """Multiplies each channel by a number from 0 to 1 (Hu et al., arXiv 1709.01507).

    The numbers come from two 1x1 convolutions over the channels' averages. Names, shapes and the
    number of inner channels (a sixteenth, rounded to a multiple of 8) are timm's.

    Args:
        channels: Of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        rounded = int(channels / REDUCTION + CHANNEL_MULTIPLE / 2)
        inner = max(CHANNEL_MULTIPLE, rounded // CHANNEL_MULTIPLE * CHANNEL_MULTIPLE)
        self.fc1 = nn.Conv2d(channels, inner, 1)
        self.fc2 = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        weights = self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(weights)
