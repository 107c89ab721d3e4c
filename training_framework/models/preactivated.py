"""The block of wide residual networks: norm and activation before each convolution."""

from torch import Tensor, nn

from training_framework.config.architectures import Variation
from training_framework.models.blocks import ResidualBlock, conv1x1, conv3x3

__all__ = ["PreactivatedBlock"]


class PreactivatedBlock(ResidualBlock):
    """Two 3x3 convolutions, and nothing on the shortcut (He et al., arXiv 1603.05027).

    A projection reads the activated input, as in the wide residual networks of Zagoruyko and
    Komodakis, arXiv 1605.07146.

    Args:
        in_channels: Channels of the input.
        channels: Channels of both convolutions and of the output.
        stride: Stride of the first convolution and of the shortcut.
        variation: Only its activation can differ.
    """

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, *, variation: Variation
    ) -> None:
        super().__init__(variation)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        projects = stride > 1 or in_channels != channels
        self.downsample = conv1x1(in_channels, channels, stride) if projects else None

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """`bn2`: with a scale of zero, the branch starts as zero."""
        return self.bn2

    def _output(self, x: Tensor) -> Tensor:
        activated = self._activated(self.bn1, x)
        shortcut = x if self.downsample is None else self.downsample(activated)
        branch = self._activated(self.bn2, self.conv1(activated))
        return self.conv2(branch) + shortcut
