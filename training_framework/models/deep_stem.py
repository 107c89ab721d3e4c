"""Three 3x3 convolutions instead of the first convolution."""

from collections import OrderedDict

from torch import Tensor, nn

from training_framework.config.architectures import Activation
from training_framework.models.activations import activated
from training_framework.models.blocks import conv3x3

__all__ = ["DeepStem"]


class DeepStem(nn.Sequential):
    """The stem of ResNet-C and ResNet-D (He et al., arXiv 1812.01187, section 4.2).

    The names of its parameters are timm's, which count the activations between them.

    Args:
        channels: Of the output; the first two convolutions have half of them.
        stride: Of the first convolution.
        activation: After the first two norms.
    """

    def __init__(self, channels: int, stride: int, *, activation: Activation) -> None:
        half = channels // 2
        super().__init__(
            OrderedDict(
                {
                    "0": conv3x3(3, half, stride),
                    "1": nn.BatchNorm2d(half),
                    "3": conv3x3(half, half),
                    "4": nn.BatchNorm2d(half),
                    "6": conv3x3(half, channels),
                }
            )
        )
        self._activation: Activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to (N, channels, ceil(H / stride), ceil(W / stride))."""
        first, norm, second, other_norm, third = self
        x = activated(norm, first(x), activation=self._activation)
        return third(activated(other_norm, second(x), activation=self._activation))
