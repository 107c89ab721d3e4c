"""A residual network of eight layers for images of about 32 px, made for trainings of seconds.

It has as much to compute as the network of K. Jordan's cifar10-airbench (airbench94,
arXiv 2404.00498), from which it takes the whitening first layer, the pool after the first
convolution of a stage, GELU, and the small output. Its own are the shortcut of each stage, and maps
and channels that suit the kernels for CPUs: maps of 32, 16, 8 and 4 px, and channels in multiples
of 16.
"""

from typing import Final

from torch import Tensor, nn
from torch.nn import functional

from training_framework.config.architectures import Architecture, Variation
from training_framework.models.activations import ACTIVATIONS
from training_framework.models.blocks import ResidualBlock, conv3x3

__all__ = ["PooledBlock", "PooledResNet"]

# As in airbench94: small logits at the start, with PyTorch's initial weights of the head.
OUTPUT_SCALE: Final = 1 / 9


class PooledBlock(ResidualBlock):
    """A convolution and max-pool that halve the maps, then a convolution with a shortcut.

    The pool comes before the norm, so that norm and activation see a quarter of the pixels.

    Args:
        in_channels: Channels of the input.
        channels: Channels of both convolutions and of the output.
        variation: Only its activation can differ.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, *, variation: Variation) -> None:
        super().__init__(variation)
        self.conv1 = conv3x3(in_channels, channels)
        self.pool = nn.MaxPool2d(2)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """`bn2`."""
        return self.bn2

    def _output(self, x: Tensor) -> Tensor:
        x = self._activated(self.bn1, self.pool(self.conv1(x)))
        return self._activated(self.bn2, self.conv2(x), x)


class PooledResNet(nn.Module):
    """First convolution with activation, three pooled blocks, global maximum, small head.

    Deterministic given `torch.manual_seed`. Convolutions start with PyTorch's default weights.

    Args:
        architecture: Widths and activation.
        num_classes: Number of outputs of the head.
    """

    def __init__(self, architecture: Architecture, *, num_classes: int) -> None:
        super().__init__()
        channels, width = architecture.stage_channels, architecture.first_channels
        assert channels is not None and width is not None and len(channels) == len("123")
        variation = architecture.variation
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.activation = ACTIVATIONS[variation.activation]
        self.layer1 = nn.Sequential(PooledBlock(width, channels[0], variation=variation))
        self.layer2 = nn.Sequential(PooledBlock(channels[0], channels[1], variation=variation))
        self.layer3 = nn.Sequential(PooledBlock(channels[1], channels[2], variation=variation))
        self.fc = nn.Linear(channels[2], num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalized, H and W at least 8, to logits (N, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.activation(self.conv1(x)))))
        return self.fc(functional.adaptive_max_pool2d(x, 1).flatten(1)) * OUTPUT_SCALE
