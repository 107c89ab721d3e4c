"""ResNet and its variants, with torchvision's parameter names and a choice of two stems."""

import difflib
import functools
from typing import Final, Literal

import torch
from torch import Tensor, nn

from training_framework.config.architectures import MODELS, Architecture
from training_framework.errors import UserError
from training_framework.kernels.fused_norm import rectified
from training_framework.models.blocks import BasicBlock, Bottleneck, ResidualBlock

__all__ = ["MODELS", "ResNet", "Stem", "build_model"]

Stem = Literal["cifar", "imagenet"]

STAGE_CHANNELS: Final = (64, 128, 256, 512)


class ResNet(nn.Module):
    """A residual network: stem, four stages, global average, linear head.

    Deterministic given `torch.manual_seed`; the random numbers are drawn in torchvision's order.

    Args:
        architecture: Kind, number and width of its blocks.
        num_classes: Number of outputs of the head.
        stem: `imagenet`: 7x7 convolution of stride 2 and 3x3 max-pool of stride 2; `cifar`: 3x3
            convolution of stride 1 and no pool.
        share_early_weights: In every block of the first stage, both convolutions use the same
            weight: one Parameter under two names. Only with `BasicBlock`.
        zero_init_last_norm: Start each block as the identity (Goyal et al., arXiv 1706.02677,
            section 5.1).
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        num_classes: int,
        stem: Stem = "imagenet",
        share_early_weights: bool = False,
        zero_init_last_norm: bool = False,
    ) -> None:
        super().__init__()
        width = STAGE_CHANNELS[0]
        self.conv1: nn.Conv2d
        self.maxpool: nn.Module
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        stages: list[nn.Sequential] = []
        for channels, blocks, stride in zip(
            STAGE_CHANNELS, architecture.blocks_per_stage, (1, 2, 2, 2), strict=True
        ):
            make = functools.partial(_block, architecture, channels=channels)
            first = make(width, stride=stride)
            width = channels * first.expansion
            stages.append(nn.Sequential(first, *(make(width) for _ in range(1, blocks))))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width, num_classes)
        self._initialize(zero_init_last_norm=zero_init_last_norm)
        if share_early_weights:
            self._share_early_weights()

    def _initialize(self, *, zero_init_last_norm: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, ResidualBlock) and zero_init_last_norm:
                nn.init.zeros_(module.last_norm.weight)

    def _share_early_weights(self) -> None:
        for block in self.layer1:
            if not isinstance(block, BasicBlock):
                basic = [name for name, variant in MODELS.items() if variant.block == "basic"]
                raise UserError(
                    "share_early_weights needs two convolutions of the same shape in a block, "
                    "which a bottleneck block lacks",
                    f"choose {', '.join(basic[:-1])} or {basic[-1]}, or turn it off",
                )
            block.conv2.weight = block.conv1.weight

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalized, to logits (N, num_classes)."""
        x = self.maxpool(rectified(self.bn1, self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _block(
    architecture: Architecture, in_channels: int, *, channels: int, stride: int = 1
) -> ResidualBlock:
    groups, base_width = architecture.cardinality, architecture.base_width
    if architecture.block == "basic":
        plain = Architecture._field_defaults
        if (groups, base_width) != (plain["cardinality"], plain["base_width"]):
            raise UserError(
                f"a basic block has no cardinality ({groups}) or base_width ({base_width})",
                "use bottleneck blocks",
            )
        return BasicBlock(in_channels, channels, stride)
    return Bottleneck(in_channels, channels, stride, groups=groups, base_width=base_width)


def build_model(
    name: str,
    *,
    num_classes: int,
    stem: Stem,
    share_early_weights: bool = False,
    zero_init_last_norm: bool = False,
) -> ResNet:
    """Build a variant of `MODELS`, freshly initialized.

    Args:
        name: Key of `MODELS`.
        num_classes: Number of outputs of the head, at least 1.
        stem: `cifar` or `imagenet`; see `ResNet`.
        share_early_weights: See `ResNet`.
        zero_init_last_norm: See `ResNet`.

    Raises:
        UserError: Unknown name or stem, `num_classes` below 1, or `share_early_weights` with
            bottleneck blocks.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        cure = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(MODELS)}"
        raise UserError(f"unknown model '{name}'", cure)
    if stem not in ("cifar", "imagenet"):
        raise UserError(f"unknown stem '{stem}'", "choose cifar or imagenet")
    if num_classes < 1:
        raise UserError(f"num_classes is {num_classes}", "give the number of classes, 1 or more")
    return ResNet(
        MODELS[name],
        num_classes=num_classes,
        stem=stem,
        share_early_weights=share_early_weights,
        zero_init_last_norm=zero_init_last_norm,
    )
