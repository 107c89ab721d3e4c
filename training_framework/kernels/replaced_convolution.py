"""What the modules that stand in for a convolution share."""

from typing import Self

import torch
from torch import nn

__all__ = ["ReplacedConv2d"]


class ReplacedConv2d(nn.Conv2d):
    """A Conv2d that computes the same in another way where that is faster."""

    @classmethod
    def from_convolution(cls, convolution: nn.Conv2d) -> Self:
        """Take over a convolution's settings, and its parameters themselves."""
        with torch.device("meta"):
            replaced = cls(
                convolution.in_channels,
                convolution.out_channels,
                convolution.kernel_size,  # type: ignore[arg-type]
                convolution.stride,  # type: ignore[arg-type]
                convolution.padding,  # type: ignore[arg-type]
                convolution.dilation,  # type: ignore[arg-type]
                convolution.groups,
                convolution.bias is not None,
                convolution.padding_mode,
            )
        replaced.weight, replaced.bias = convolution.weight, convolution.bias
        return replaced.train(convolution.training)
