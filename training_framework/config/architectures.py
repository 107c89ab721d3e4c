"""The networks that `model` can name, as plain data: a variant is one line.

They are kept apart from torch, so that checking a configuration and `--help` are quick;
`models.resnet` builds them.
"""

from typing import Final, Literal, NamedTuple

__all__ = ["MODELS", "Architecture"]


class Architecture(NamedTuple):
    """The parameters by which ResNets differ.

    Attributes:
        block: `basic` has two 3x3 convolutions, `bottleneck` has 1x1, 3x3 and 1x1.
        blocks_per_stage: Number of blocks in each of the four stages.
        cardinality: Groups of each 3x3 convolution of a bottleneck (ResNeXt, Xie et al.,
            arXiv 1611.05431).
        base_width: Channels of each of these groups in the first stage (64 in one group is a
            plain ResNet, 128 is twice as wide: Zagoruyko and Komodakis, arXiv 1605.07146).
    """

    block: Literal["basic", "bottleneck"]
    blocks_per_stage: tuple[int, int, int, int]
    cardinality: int = 1
    base_width: int = 64


MODELS: Final[dict[str, Architecture]] = {
    "resnet10": Architecture("basic", (1, 1, 1, 1)),
    "resnet18": Architecture("basic", (2, 2, 2, 2)),
    "resnet34": Architecture("basic", (3, 4, 6, 3)),
    "resnet50": Architecture("bottleneck", (3, 4, 6, 3)),
    "resnet101": Architecture("bottleneck", (3, 4, 23, 3)),
    "resnet152": Architecture("bottleneck", (3, 8, 36, 3)),
    "resnext50_32x4d": Architecture("bottleneck", (3, 4, 6, 3), cardinality=32, base_width=4),
    "resnext101_32x8d": Architecture("bottleneck", (3, 4, 23, 3), cardinality=32, base_width=8),
    "wide_resnet50_2": Architecture("bottleneck", (3, 4, 6, 3), base_width=128),
    "wide_resnet101_2": Architecture("bottleneck", (3, 4, 23, 3), base_width=128),
}
