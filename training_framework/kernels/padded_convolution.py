"""A convolution over three channels, computed over four."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CHANNELS", "PaddedConv2d", "can_pad"]

CHANNELS = 4


class PaddedConv2d(nn.Conv2d):
    """An `nn.Conv2d` over three channels that adds a fourth, of zeros, to images and weights.

    A pixel in channels_last then begins at a multiple of 8 bytes (bf16) or 16 (fp32), as the loads
    of tensor-core kernels require. The weight keeps its shape, and the sums only gain zeros.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, 3, H, W) images to (N, out_channels, H', W') maps."""
        if input.device.type == "meta":  # FLOPs are counted there: those of the network itself
            return super().forward(input)
        missing = (0, 0, 0, 0, 0, CHANNELS - self.in_channels)
        return self._conv_forward(F.pad(input, missing), F.pad(self.weight, missing), self.bias)


def can_pad(module: nn.Module) -> bool:
    """Whether a module is a plain convolution over images of three channels."""
    return (
        type(module) is nn.Conv2d
        and module.in_channels == CHANNELS - 1
        and module.groups == 1
        and module.padding_mode == "zeros"
    )
