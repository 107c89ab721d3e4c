"""Activation functions, and a norm with the shortcut and the activation after it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from training_framework.config.architectures import Activation
from training_framework.kernels import fused_norm

__all__ = ["ACTIVATIONS", "activated"]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "mish": functional.mish,
}


def activated(
    norm: nn.Module, input: Tensor, shortcut: Tensor | None = None, *, activation: Activation
) -> Tensor:
    """The activation of the sum of a norm's output and the shortcut, if there is one.

    Args:
        norm: Any module from (N, C, H, W) to the same.
        input: (N, C, H, W).
        shortcut: (N, C, H, W).
        activation: A key of ACTIVATIONS.
    """
    return fused_norm.activated(norm, input, shortcut, activation, ACTIVATIONS[activation])
