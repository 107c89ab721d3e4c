"""Batch norm over the batches of all processes, for devices that torch.nn.SyncBatchNorm refuses.

torch's own runs only on GPUs. This one needs only an all-gather and an all-reduce, so it also runs
on CPUs with gloo.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SynchronizedBatchNorm2d", "TorchSynchronizedBatchNorm2d"]


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with training statistics over the joined batch of a process group.

    It equals `BatchNorm2d` over the joined batch in outputs and running statistics, and also in
    gradients if DDP averages them and the loss is a mean. The processes may have batches of
    different sizes, but all must run the same norms in the same order. In evaluation mode, and
    without a process group of at least two, it runs `BatchNorm2d`. Parameters and buffers have
    the same names.

    Args:
        num_features: Channels C of inputs (N, C, H, W).
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics; None for the mean of all batches.
        affine: Whether each channel has a weight and a bias.
        track_running_stats: Whether to keep running statistics.
        process_group: The processes that take part; None: all.
    """

    process_group: dist.ProcessGroup | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        uses_batch = self.training or self.running_mean is None
        if not (uses_batch and dist.is_available() and dist.is_initialized()):
            return super().forward(input)
        if dist.get_world_size(self.process_group) == 1:
            return super().forward(input)
        self._check_input_dim(input)
        output, mean, variance, count = _SynchronizedBatchNorm.apply(
            input, self.weight, self.bias, self.eps, self.process_group
        )
        if self.training and self.track_running_stats:
            self._update_running_statistics(mean, variance, count)
        return output

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        unbiased = variance * (count / (count - 1))
        dtype = self.running_mean.dtype
        momentum: float | Tensor | None = self.momentum
        if momentum is None:
            momentum = 1.0 / self.num_batches_tracked.to(dtype)
        self.running_mean.lerp_(mean.to(dtype), momentum)
        self.running_var.lerp_(unbiased.to(dtype), momentum)


class TorchSynchronizedBatchNorm2d(nn.SyncBatchNorm):
    """A BatchNorm2d that was turned into torch.nn.SyncBatchNorm, over all processes.

    The separate class distinguishes it from one that the user built.
    """

    process_group: dist.ProcessGroup | None = None


def _joined_statistics(
    input: Tensor, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and count of the joined batch, in at least fp32.

    Each process sends its count, mean and sum of squared deviations, which are merged (Chan, Golub
    and LeVeque, 1979). Sums of squares would suffer from cancellation if the mean is large.
    """
    dtype = torch.promote_types(input.dtype, torch.float32)
    channels = input.shape[1]
    count = input.numel() // channels
    mine = input.new_zeros(1 + 2 * channels, dtype=dtype)
    if count > 0:
        variance, mean = torch.var_mean(input.to(dtype), dim=(0, 2, 3), correction=0)
        mine[0] = count
        mine[1 : 1 + channels] = mean
        mine[1 + channels :] = variance * count
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(everyone, mine, group=process_group)
    counts, means, deviations = torch.stack(everyone).split([1, channels, channels], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(dim=0) / total
    joined = (deviations + counts * (means - mean).square()).sum(dim=0)
    return mean, joined / total, total


class _SynchronizedBatchNorm(torch.autograd.Function):
    """(input, weight, bias) to (output, mean, biased variance, count) over all processes."""

    @staticmethod
    def forward(  # noqa: PLR0917  autograd passes arguments by position
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        process_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _joined_statistics(input, process_group)
        output = F.batch_norm(input, mean, variance, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(input, weight, mean, torch.rsqrt(variance + eps), count)
        ctx.process_group = process_group
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.set_materialize_grads(False)
        return output, mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        """Gradients: of the input by sums over all processes, of the parameters over this one.

        DDP averages the gradients of the parameters later; that of the input needs all sums now.
        """
        input, weight, mean, inverse_std, count = ctx.saved_tensors
        channel = (1, -1, 1, 1)
        grad = grad_output.to(mean.dtype)
        normalized = (input.to(mean.dtype) - mean.view(channel)) * inverse_std.view(channel)
        sums = torch.stack([grad.sum(dim=(0, 2, 3)), (grad * normalized).sum(dim=(0, 2, 3))])
        grad_bias, grad_weight = sums.clone()
        dist.all_reduce(sums, group=ctx.process_group)
        mean_grad, mean_product = sums / count
        scale = inverse_std if weight is None else inverse_std * weight
        grad_input = grad - mean_grad.view(channel) - normalized * mean_product.view(channel)
        grad_input = (grad_input * scale.view(channel)).to(input.dtype)
        if weight is None:
            return grad_input, None, None, None, None
        dtype = weight.dtype
        return grad_input, grad_weight.to(dtype), grad_bias.to(dtype), None, None
