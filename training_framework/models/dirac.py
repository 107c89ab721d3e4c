"""Convolutions that start by passing their input on."""

import torch
from torch import nn

__all__ = ["start_as_identity"]


def start_as_identity(model: nn.Module) -> int:
    """Let the first filters of each 3x3 convolution pass one channel on, unchanged.

    As many filters as there are input channels become an identity (Zagoruyko and Komodakis,
    DiracNets, arXiv 1706.00388); the others keep their random weights. The first convolution of a
    network, which reads colours, and convolutions in groups or with fewer outputs than inputs stay
    as they are.

    Returns:
        Number of convolutions changed.
    """
    changed = 0
    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (3, 3)
            and module.groups == 1
            and 3 < module.in_channels <= module.out_channels
        ):
            with torch.no_grad():
                nn.init.dirac_(module.weight[: module.in_channels])
            changed += 1
    return changed
