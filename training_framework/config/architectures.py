"""The networks that `model` can name, as plain data: a variant is one line.

They are kept apart from torch, so that checking a configuration and `--help` are quick;
`models.resnet` builds them.
"""

from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

__all__ = ["MODELS", "Activation", "Architecture", "Block", "Variation", "unfit_options"]

Activation = Literal["relu", "gelu", "silu", "mish"]
Block = Literal["basic", "bottleneck", "preactivated", "pooled"]


class Variation(NamedTuple):
    """What a setting of the same name can change in a network; these values are plain ResNet's.

    Attributes:
        activation: The function after norms and additions.
        squeeze_excitation: Each block weighs its output channels by a small network over their
            averages (Hu et al., arXiv 1709.01507).
        blur_pool: Blur before every reduction of the maps (Zhang, arXiv 1904.11486).
        deep_stem: Three 3x3 convolutions instead of the first one (ResNet-C: He et al.,
            arXiv 1812.01187, section 4.2).
        pooled_shortcut: Reduce a projected shortcut by an average, not by a stride (ResNet-D,
            same section).
    """

    activation: Activation = "relu"
    squeeze_excitation: bool = False
    blur_pool: bool = False
    deep_stem: bool = False
    pooled_shortcut: bool = False


class Architecture(NamedTuple):
    """The parameters by which networks differ.

    Attributes:
        block: `basic` has two 3x3 convolutions, `bottleneck` has 1x1, 3x3 and 1x1, `preactivated`
            is basic with norm and activation before each convolution, and `pooled` has a
            convolution with max-pool and one with a shortcut.
        blocks_per_stage: Number of blocks in each of the three or four stages.
        cardinality: Groups of each 3x3 convolution of a bottleneck (ResNeXt, Xie et al.,
            arXiv 1611.05431).
        base_width: Channels of each of these groups in the first stage (64 in one group is a
            plain ResNet, 128 is twice as wide: Zagoruyko and Komodakis, arXiv 1605.07146).
        stage_channels: Channels of the stages; None: 64, 128, 256 and 512.
        first_channels: Channels of the first convolution; None: those of the first stage.
        variation: What settings can change.
        whitening: Whether the first convolution whitens its input, unless a setting says otherwise.
        dirac_init: Whether 3x3 convolutions start as the identity; likewise.
        freeze_norm_scales: Whether the scales of norms stay as they start; likewise.
        norm_momentum: Share of a step in batch norm's running statistics; None: PyTorch's 0.1;
            likewise.
    """

    block: Block
    blocks_per_stage: tuple[int, ...]
    cardinality: int = 1
    base_width: int = 64
    stage_channels: tuple[int, ...] | None = None
    first_channels: int | None = None
    variation: Variation = Variation()
    whitening: bool = False
    dirac_init: bool = False
    freeze_norm_scales: bool = False
    norm_momentum: float | None = None


_C: Final = Variation(deep_stem=True)
_D: Final = Variation(deep_stem=True, pooled_shortcut=True)
_SE: Final = Variation(squeeze_excitation=True)
_BLUR: Final = Variation(blur_pool=True)

# torchvision's and timm's names.
MODELS: Final[dict[str, Architecture]] = {
    "resnet10": Architecture("basic", (1, 1, 1, 1)),
    "resnet18": Architecture("basic", (2, 2, 2, 2)),
    "resnet34": Architecture("basic", (3, 4, 6, 3)),
    "resnet50": Architecture("bottleneck", (3, 4, 6, 3)),
    "resnet101": Architecture("bottleneck", (3, 4, 23, 3)),
    "resnet152": Architecture("bottleneck", (3, 8, 36, 3)),
    "resnet50c": Architecture("bottleneck", (3, 4, 6, 3), variation=_C),
    "resnet18d": Architecture("basic", (2, 2, 2, 2), variation=_D),
    "resnet34d": Architecture("basic", (3, 4, 6, 3), variation=_D),
    "resnet50d": Architecture("bottleneck", (3, 4, 6, 3), variation=_D),
    "resnet101d": Architecture("bottleneck", (3, 4, 23, 3), variation=_D),
    "seresnet18": Architecture("basic", (2, 2, 2, 2), variation=_SE),
    "seresnet34": Architecture("basic", (3, 4, 6, 3), variation=_SE),
    "seresnet50": Architecture("bottleneck", (3, 4, 6, 3), variation=_SE),
    "resnetblur50": Architecture("bottleneck", (3, 4, 6, 3), variation=_BLUR),
    "resnext50_32x4d": Architecture("bottleneck", (3, 4, 6, 3), cardinality=32, base_width=4),
    "resnext101_32x8d": Architecture("bottleneck", (3, 4, 23, 3), cardinality=32, base_width=8),
    "wide_resnet50_2": Architecture("bottleneck", (3, 4, 6, 3), base_width=128),
    "wide_resnet101_2": Architecture("bottleneck", (3, 4, 23, 3), base_width=128),
    # For small images: Zagoruyko and Komodakis, arXiv 1605.07146, and models/pooled_resnet.py.
    "wrn_16_4": Architecture(
        "preactivated", (2, 2, 2), stage_channels=(64, 128, 256), first_channels=16
    ),
    "wrn_28_10": Architecture(
        "preactivated", (4, 4, 4), stage_channels=(160, 320, 640), first_channels=16
    ),
    "resnet8_fast": Architecture(
        "pooled",
        (1, 1, 1),
        stage_channels=(64, 192, 256),
        first_channels=32,
        variation=Variation(activation="gelu"),
        whitening=True,
        dirac_init=True,
        freeze_norm_scales=True,
        norm_momentum=0.4,
    ),
}


def unfit_options(architecture: Architecture) -> Iterator[str]:
    """The options of its variation that need basic or bottleneck blocks, if it has others."""
    if architecture.block in ("preactivated", "pooled"):
        for option, value in architecture.variation._asdict().items():
            if value is True:
                yield option
