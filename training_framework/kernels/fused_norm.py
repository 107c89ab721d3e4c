"""Batch norm, the shortcut's addition and activation: separately, or on CPUs in one pass."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from training_framework.kernels.norm import (
    ACTIVATION_NUMBERS,
    CHANNEL_MULTIPLE,
    MEAN,
    UNBIASED_VARIANCE,
    activated_norm,
)
from training_framework.kernels.operands import is_readable

__all__ = ["FusedBatchNorm2d", "activated", "can_fuse_norm"]


class FusedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that also adds a shortcut and an activation, in training on a CPU in fp32.

    In evaluation, in other precisions and on other devices it runs `nn.BatchNorm2d`, which also
    raises the errors for wrong inputs. Parameters and buffers are the same in name, shape and
    value. It can be differentiated once, not twice.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The norm of (N, C, H, W)."""
        if not self._applies_to(input):
            return super().forward(input)
        return self._normalized(input, None, "none")

    def activated(self, input: Tensor, shortcut: Tensor | None, activation: str) -> Tensor | None:
        """The activation of the sum of the norm of (N, C, H, W) and the shortcut, if there is one.

        Returns:
            (N, C, H, W), or None where the kernels do not apply.
        """
        if (
            activation not in ACTIVATION_NUMBERS
            or not self._applies_to(input)
            or (
                shortcut is not None
                and not (is_readable(shortcut) and shortcut.shape == input.shape)
            )
        ):
            return None
        return self._normalized(input, shortcut, activation)

    def _applies_to(self, input: Tensor) -> bool:
        tensors = (input, self.weight, self.bias, self.running_mean, self.running_var)
        return (
            self.training
            and self.momentum is not None
            and self.num_features % CHANNEL_MULTIPLE == 0
            and all(tensor is not None and is_readable(tensor) for tensor in tensors)
            and input.dim() == 4
            and input.shape[1] == self.num_features
            and input.numel() > self.num_features  # torch raises the error for a single value
        )

    def _normalized(self, input: Tensor, shortcut: Tensor | None, activation: str) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        output, statistics = activated_norm(
            input, self.weight, self.bias, shortcut, self.eps, activation
        )
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(statistics[MEAN], self.momentum)
            self.running_var.lerp_(statistics[UNBIASED_VARIANCE], self.momentum)
        return output


def can_fuse_norm(norm: nn.Module) -> bool:
    """Whether FusedBatchNorm2d can replace a norm."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.num_features % CHANNEL_MULTIPLE == 0
        and norm.weight.dtype == torch.float32
    )


def activated(
    norm: nn.Module,
    input: Tensor,
    shortcut: Tensor | None,
    activation: str,
    function: Callable[[Tensor], Tensor],
) -> Tensor:
    """The activation of the sum of a norm's output and the shortcut, if there is one.

    Args:
        norm: Any module from (N, C, H, W) to the same.
        input: (N, C, H, W).
        shortcut: (N, C, H, W).
        activation: Its name.
        function: The activation itself, for where the kernels do not apply.
    """
    if isinstance(norm, FusedBatchNorm2d) and not _has_hooks(norm):
        fused = norm.activated(input, shortcut, activation)
        if fused is not None:
            return fused
    output: Tensor = norm(input)
    if _has_hooks(norm):  # they may keep the output, so it must not change
        return function(output if shortcut is None else output + shortcut)
    if shortcut is not None:
        output += shortcut
    return torch.relu_(output) if activation == "relu" else function(output)


def _has_hooks(norm: nn.Module) -> bool:
    """Whether a call of the module does more than its `forward`."""
    return bool(
        norm._forward_hooks
        or norm._forward_pre_hooks
        or norm._backward_hooks
        or norm._backward_pre_hooks
    )
