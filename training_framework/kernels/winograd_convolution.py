"""3x3 convolutions by Winograd's algorithm on CPUs: 2.25 to 4 times fewer multiplications.

With a stride of 2, there are 1.44 times fewer.

Lavin and Gray, "Fast algorithms for convolutional neural networks", arXiv 1509.09308. In fp32 the
result is nearly as exact as that of an ordinary convolution: the largest error is up to 4
millionths of the largest value, compared with 3 for oneDNN (docs/experiments.md).
"""

import torch
from torch import Tensor, nn

from training_framework.kernels.operands import is_readable
from training_framework.kernels.winograd import CHANNEL_MULTIPLE, winograd_convolution

__all__ = ["SMALLEST_MAP", "Bf16WinogradConv2d", "WinogradConv2d", "winograd_applies"]

# On smaller maps, much of the work is on the border; SmallMapConv2d handles them.
SMALLEST_MAP = 3


class WinogradConv2d(nn.Conv2d):
    """Conv2d that runs by Winograd's algorithm on CPUs in fp32.

    Otherwise it runs `nn.Conv2d`, which also raises the errors for wrong inputs. Its parameters are
    the same in name, shape and gradient. It is fastest in channels_last, the only layout that the
    kernels read. It can be differentiated once, not twice.
    """

    bf16_products = False

    def forward(self, input: Tensor) -> Tensor:
        """(N, Cin, H, W) to (N, Cout, H, W)."""
        if (
            not (is_readable(input) and is_readable(self.weight))
            or input.dim() != 4
            or input.shape[1] != self.in_channels
            or self.weight.shape != (self.out_channels, self.in_channels, 3, 3)
            or torch.is_autocast_enabled("cpu")
            or not winograd_applies(self, *input.shape[2:])
        ):
            return super().forward(input)
        output = winograd_convolution(input, self.weight, self.stride[0], self.bf16_products)
        in_channels_last = input.is_contiguous(memory_format=torch.channels_last)
        return output if in_channels_last else output.contiguous()


class Bf16WinogradConv2d(WinogradConv2d):
    """The same with products in bf16 and sums in fp32, in the gradients too.

    The rounding of the transformed tiles adds an error of 1.2% (root mean square) at stride 1, and
    0.4% for small maps and stride 2, where a convolution of bf16 tensors has 0.3%.
    """

    bf16_products = True


def winograd_applies(convolution: nn.Conv2d, height: int, width: int) -> bool:
    """Whether the kernels can compute a convolution of such maps, and faster.

    Args:
        convolution: It must be 3x3, of stride 1 or 2, with padding 1 and no bias, groups or
            dilation.
        height: Height of the input in pixels.
        width: Width of the input in pixels.
    """
    return (
        convolution.kernel_size == (3, 3)
        and convolution.stride in ((1, 1), (2, 2))
        and convolution.padding == (1, 1)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.bias is None
        and convolution.padding_mode == "zeros"
        and convolution.in_channels % CHANNEL_MULTIPLE == 0
        and convolution.out_channels % CHANNEL_MULTIPLE == 0
        and min(height, width) >= SMALLEST_MAP
    )
