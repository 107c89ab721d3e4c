"""ResNet and its variants, with torchvision's parameter names and a choice of two stems."""

import difflib
import functools
from typing import Final, Literal

import torch
from torch import Tensor, nn

from training_framework.config.architectures import MODELS, Architecture, Variation, unfit_options
from training_framework.errors import UserError
from training_framework.models.activations import activated
from training_framework.models.blocks import BasicBlock, Bottleneck, ResidualBlock
from training_framework.models.blur_pool import BlurPool
from training_framework.models.deep_stem import DeepStem
from training_framework.models.dirac import start_as_identity
from training_framework.models.pooled_resnet import PooledResNet
from training_framework.models.preactivated import PreactivatedBlock

__all__ = ["MODELS", "ResNet", "Stem", "build_model"]

Stem = Literal["cifar", "imagenet"]

STAGE_CHANNELS: Final = (64, 128, 256, 512)


class ResNet(nn.Module):
    """A residual network: stem, three or four stages, global average, linear head.

    Deterministic given `torch.manual_seed`; the random numbers are drawn in torchvision's order.

    Args:
        architecture: Kind, number and width of its blocks, and their variation.
        num_classes: Number of outputs of the head.
        stem: `imagenet`: 7x7 convolution of stride 2 and 3x3 max-pool of stride 2; `cifar`: 3x3
            convolution of stride 1 and no pool.
    """

    def __init__(
        self, architecture: Architecture, *, num_classes: int, stem: Stem = "imagenet"
    ) -> None:
        super().__init__()
        self._activation = architecture.variation.activation
        self._is_preactivated = architecture.block == "preactivated"
        stage_channels = architecture.stage_channels or STAGE_CHANNELS
        width = architecture.first_channels or stage_channels[0]
        self.conv1 = _first_convolution(width, stem, architecture.variation)
        self.maxpool = _first_pool(stem, architecture.variation)
        # Preactivated blocks leave their sum without norm and activation: these come at the end.
        self.bn1 = nn.BatchNorm2d(stage_channels[-1] if self._is_preactivated else width)
        stages: list[nn.Sequential] = []
        for number, (channels, blocks) in enumerate(
            zip(stage_channels, architecture.blocks_per_stage, strict=True)
        ):
            make = functools.partial(_block, architecture, channels=channels)
            first = make(width, stride=2 if number else 1)
            width = channels * first.expansion
            stages.append(nn.Sequential(first, *(make(width) for _ in range(1, blocks))))
        # An empty stage is the identity.
        stages += [nn.Sequential()] * (len(STAGE_CHANNELS) - len(stages))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalized, to logits (N, num_classes)."""
        x = self.conv1(x)
        if not self._is_preactivated:
            x = activated(self.bn1, x, activation=self._activation)
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.maxpool(x)))))
        if self._is_preactivated:
            x = activated(self.bn1, x, activation=self._activation)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _first_convolution(width: int, stem: Stem, variation: Variation) -> nn.Module:
    stride = 2 if stem == "imagenet" else 1
    if variation.deep_stem:
        return DeepStem(width, stride, activation=variation.activation)
    if stem == "imagenet":
        return nn.Conv2d(3, width, 7, stride=stride, padding=3, bias=False)
    return nn.Conv2d(3, width, 3, padding=1, bias=False)


def _first_pool(stem: Stem, variation: Variation) -> nn.Module:
    if stem == "cifar":
        return nn.Identity()
    if variation.blur_pool:
        return nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), BlurPool())
    return nn.MaxPool2d(3, stride=2, padding=1)


def _block(
    architecture: Architecture, in_channels: int, *, channels: int, stride: int = 1
) -> ResidualBlock:
    groups, base_width = architecture.cardinality, architecture.base_width
    variation = architecture.variation
    if architecture.block == "preactivated":
        return PreactivatedBlock(in_channels, channels, stride, variation=variation)
    if architecture.block == "basic":
        plain = Architecture._field_defaults
        if (groups, base_width) != (plain["cardinality"], plain["base_width"]):
            raise UserError(
                f"a basic block has no cardinality ({groups}) or base_width ({base_width})",
                "use bottleneck blocks",
            )
        return BasicBlock(in_channels, channels, stride, variation=variation)
    return Bottleneck(
        in_channels, channels, stride, groups=groups, base_width=base_width, variation=variation
    )


def _share_early_weights(model: ResNet | PooledResNet) -> None:
    for block in model.layer1:
        if not isinstance(block, BasicBlock):
            basic = [name for name, variant in MODELS.items() if variant.block == "basic"]
            raise UserError(
                "share_early_weights needs two convolutions of the same shape in a block, which "
                "these blocks lack",
                f"choose {', '.join(basic[:-1])} or {basic[-1]}, or turn it off",
            )
        block.conv2.weight = block.conv1.weight


def build_model(
    name: str,
    *,
    num_classes: int,
    stem: Stem,
    share_early_weights: bool = False,
    zero_init_last_norm: bool = False,
    dirac_init: bool = False,
    variation: Variation | None = None,
) -> ResNet | PooledResNet:
    """Build a variant of `MODELS`, freshly initialized.

    Args:
        name: Key of `MODELS`.
        num_classes: Number of outputs of the head, at least 1.
        stem: `cifar` or `imagenet`; see `ResNet`. Networks of pooled blocks have a stem of their
            own.
        share_early_weights: In every block of the first stage, both convolutions use the same
            weight: one Parameter under two names. Only with basic blocks.
        zero_init_last_norm: Start each block as the identity (Goyal et al., arXiv 1706.02677,
            section 5.1).
        dirac_init: See `start_as_identity`.
        variation: Replaces the variation of `MODELS`; None: that one.

    Raises:
        UserError: Unknown name or stem, `num_classes` below 1, a variation that needs other
            blocks, or `share_early_weights` without basic blocks.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        cure = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(MODELS)}"
        raise UserError(f"unknown model '{name}'", cure)
    if stem not in ("cifar", "imagenet"):
        raise UserError(f"unknown stem '{stem}'", "choose cifar or imagenet")
    if num_classes < 1:
        raise UserError(f"num_classes is {num_classes}", "give the number of classes, 1 or more")
    architecture = MODELS[name]
    if variation is not None:
        architecture = architecture._replace(variation=variation)
    unfit = ", ".join(unfit_options(architecture))
    if unfit:
        raise UserError(f"{name} has no {unfit}", "turn it off, or choose another model")
    model = (
        PooledResNet(architecture, num_classes=num_classes)
        if architecture.block == "pooled"
        else ResNet(architecture, num_classes=num_classes, stem=stem)
    )
    if share_early_weights:
        _share_early_weights(model)
    if zero_init_last_norm:
        for module in model.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.last_norm.weight)
    if dirac_init:
        start_as_identity(model)
    return model
