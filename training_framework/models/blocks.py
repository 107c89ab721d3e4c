"""The two residual blocks of ResNet (He et al., arXiv 1512.03385, figure 5), and their base.

Parameters and buffers have torchvision's names, and timm's where torchvision has no such block, so
that their weight files load.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from training_framework.config.architectures import Variation
from training_framework.models.activations import ACTIVATIONS, activated
from training_framework.models.blur_pool import BlurPool
from training_framework.models.squeeze_excitation import SqueezeExcitation

__all__ = ["BasicBlock", "Bottleneck", "ResidualBlock", "conv1x1", "conv3x3"]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias, padded by one pixel."""
    return nn.Conv2d(
        in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=False
    )


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


@contextmanager
def _running_statistics_unchanged(block: nn.Module) -> Iterator[None]:
    """Within this context, batch norm updates copies of its running statistics.

    They cannot be switched off: autograd expects the same saved tensors both times.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    buffers = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers()]
    for norm, name, buffer in buffers:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in buffers:
            setattr(norm, name, buffer)


class ResidualBlock(nn.Module):
    """The common parts of all blocks: the shortcut, and the recomputation of activations.

    Args:
        variation: Activation, squeeze and excitation, blur and shortcut.

    Attributes:
        expansion: Output channels as a multiple of `channels`.
        recompute_activations: In training, keep only the block's input and recompute the rest in
            the backward pass; set by `surgery.checkpoint_activations`.
        downsample: The projection of the shortcut, or None if the shapes agree.
        se: Squeeze and excitation of the branch parallel to the shortcut, or None.
    """

    expansion: ClassVar[int]
    recompute_activations: bool = False
    downsample: nn.Module | None
    se: SqueezeExcitation | None

    def __init__(self, variation: Variation) -> None:
        super().__init__()
        self.variation = variation

    def _projection(self, in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
        """The shortcut's 1x1 convolution and norm, or None if the shapes agree.

        Blocks build it first, so that a seed draws the same initial weights as in torchvision, and
        register it last, so that the parameters have the same order as there.
        """
        out_channels = channels * self.expansion
        if stride == 1 and in_channels == out_channels:
            return None
        if not self.variation.pooled_shortcut:
            return nn.Sequential(
                conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
            )
        # Maps of an odd side have a border of which only single pixels remain.
        pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
        return nn.Sequential(
            nn.Identity() if stride == 1 else pool,
            conv1x1(in_channels, out_channels),
            nn.BatchNorm2d(out_channels),
        )

    def _register_last(self, channels: int, downsample: nn.Sequential | None) -> None:
        wanted = self.variation.squeeze_excitation
        self.se = SqueezeExcitation(channels * self.expansion) if wanted else None
        self.downsample = downsample

    def _strided(
        self, in_channels: int, channels: int, stride: int, groups: int = 1
    ) -> tuple[nn.Conv2d, BlurPool | None]:
        """A 3x3 convolution that reduces the maps by `stride`, or leaves this to a blur."""
        blurs = self.variation.blur_pool and stride > 1
        convolution = conv3x3(in_channels, channels, 1 if blurs else stride, groups)
        return convolution, BlurPool() if blurs else None

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm before the addition, which `zero_init_last_norm` sets to zero."""
        raise NotImplementedError

    def residual(self, x: Tensor) -> Tensor:
        """The branch parallel to the shortcut, up to the input of its last norm."""
        raise NotImplementedError

    def _activated(self, norm: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        return activated(norm, x, shortcut, activation=self.variation.activation)

    def _output(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        branch = self.residual(x)
        if self.se is None:
            return self._activated(self.last_norm, branch, shortcut)
        weighed = self.se(self.last_norm(branch))
        return ACTIVATIONS[self.variation.activation](weighed + shortcut)

    def _recomputation_contexts(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _running_statistics_unchanged(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, channels * expansion, ceil(H / stride), ...)."""
        if not (self.recompute_activations and self.training and torch.is_grad_enabled()):
            return self._output(x)
        # A block draws no random numbers, so the state of the generators need not be kept. The
        # compiler never repeats buffer updates, so it needs no contexts.
        if torch.compiler.is_compiling():
            out = checkpoint(self._output, x, use_reentrant=False, preserve_rng_state=False)
        else:
            out = checkpoint(
                self._output,
                x,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=self._recomputation_contexts,
            )
        assert isinstance(out, Tensor)
        return out


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (ResNet-10, 18, 34).

    Args:
        in_channels: Channels of the input.
        channels: Channels of both convolutions and of the output.
        stride: Stride of the first convolution and of the shortcut.
        variation: See `Variation`.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        variation: Variation = Variation(),  # noqa: B008 -- it is immutable
    ) -> None:
        super().__init__(variation)
        downsample = self._projection(in_channels, channels, stride)
        self.conv1, self.blur = self._strided(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self._register_last(channels, downsample)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """`bn2`."""
        return self.bn2

    def residual(self, x: Tensor) -> Tensor:
        """3x3, norm, activation, 3x3."""
        x = self._activated(self.bn1, self.conv1(x))
        return self.conv2(x if self.blur is None else self.blur(x))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions (ResNet-50, 101, 152, ResNeXt, wide ResNets).

    As in torchvision ("V1.5"), the 3x3 convolution has the stride, not the first 1x1 convolution as
    in the paper.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the stage; the output has four times as many.
        stride: Stride of the 3x3 convolution and of the shortcut.
        groups: Groups of the 3x3 convolution (ResNeXt, Xie et al., arXiv 1611.05431).
        base_width: Channels per group if `channels` is 64; they grow in proportion to it.
        variation: See `Variation`.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        groups: int = 1,
        base_width: int = 64,
        variation: Variation = Variation(),  # noqa: B008 -- it is immutable
    ) -> None:
        super().__init__(variation)
        width = channels * base_width // 64 * groups
        downsample = self._projection(in_channels, channels, stride)
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2, self.blur = self._strided(width, width, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, channels * self.expansion)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self._register_last(channels, downsample)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """`bn3`."""
        return self.bn3

    def residual(self, x: Tensor) -> Tensor:
        """1x1, norm, activation, 3x3, norm, activation, 1x1."""
        x = self._activated(self.bn1, self.conv1(x))
        x = self._activated(self.bn2, self.conv2(x))
        return self.conv3(x if self.blur is None else self.blur(x))
