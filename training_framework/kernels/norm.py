"""Fused batch norm, shortcut and activation from norm.cpp, as an operator of PyTorch."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training_framework.kernels.compiler import load_library
from training_framework.kernels.operands import check_operand
from training_framework.kernels.scratch import scratch_memory, thread_count

__all__ = [
    "ACTIVATION_NUMBERS",
    "CHANNEL_MULTIPLE",
    "activated_norm",
    "activated_norm_backward",
    "load_norm_kernels",
]

CHANNEL_MULTIPLE = 16
# The activations, by their numbers in norm.cpp.
ACTIVATION_NUMBERS = {"none": 0, "relu": 1, "gelu": 2, "silu": 3}
# Rows of the statistics that `activated_norm` returns, and their number.
MEAN, UNBIASED_VARIANCE, STATISTICS = 0, 4, 5


@functools.cache
def load_norm_kernels() -> ctypes.CDLL:
    """Compile the kernels, unless they are cached, and load them.

    Raises:
        NativeKernelsError: They cannot be compiled or loaded here.
    """
    library = load_library(Path(__file__).with_name("norm.cpp"))
    pointer, number, count, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
    library.norm_scratch.argtypes = [count, number]
    library.norm_scratch.restype = count
    library.norm_forward.argtypes = [
        *[pointer] * 4, real, number, *[pointer] * 3, count, count, number
    ]  # fmt: skip
    library.norm_forward.restype = None
    library.norm_backward.argtypes = [
        *[pointer] * 5, number, *[pointer] * 5, count, count, number
    ]  # fmt: skip
    library.norm_backward.restype = None
    return library


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


# With dtype and device, since users may change the defaults for new tensors.
def _like(images: Tensor) -> Tensor:
    return torch.empty(
        images.shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last
    )


def _per_channel(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _check(
    images: Tensor, per_channel: dict[str, Tensor], others: dict[str, Tensor | None]
) -> None:
    """Raise a RuntimeError, as torch's batch norm would, for operands that the kernels cannot take.

    Args:
        images: (N, C, H, W).
        per_channel: Tensors that must have shape (C,), by name for the message.
        others: Tensors that must have the shape of the images, or None.
    """
    operator = "activated_norm"
    check_operand(operator, "images", images, (None, None, None, None))
    channels = images.shape[1]
    if channels % CHANNEL_MULTIPLE or images.numel() <= channels:
        raise RuntimeError(
            f"{operator}: expected channels in multiples of {CHANNEL_MULTIPLE} and more than one "
            f"value in each, got images of shape {tuple(images.shape)}"
        )
    for name, tensor in per_channel.items():
        check_operand(operator, name, tensor, (channels,))
    for name, other in others.items():
        if other is not None:
            check_operand(operator, name, other, images.shape)


@torch.library.custom_op("efficient_resnet::activated_norm", mutates_args=())
def activated_norm(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Batch norm of a training step, plus a shortcut, then an activation, in fp32 on the CPU.

    Args:
        images: (N, C, H, W), C a multiple of CHANNEL_MULTIPLE, more than one value per channel.
        weight: (C,), the scale.
        bias: (C,), the shift.
        shortcut: (N, C, H, W), added before the activation; None: nothing is added.
        eps: Added to the variance.
        activation: A key of ACTIVATION_NUMBERS.

    Returns:
        (N, C, H, W) in channels_last, and (STATISTICS, C): the mean in row MEAN, the unbiased
        variance in row UNBIASED_VARIANCE, and further values for the backward pass.

    Raises:
        RuntimeError: A tensor has another shape or dtype, or is on another device.
    """
    _check(images, {"weight": weight, "bias": bias}, {"shortcut": shortcut})
    batch, channels, height, width = images.shape
    library, threads = load_norm_kernels(), thread_count()
    images = _channels_last(images)
    shortcut = None if shortcut is None else _channels_last(shortcut)
    weight, bias = weight.contiguous(), bias.contiguous()
    output, statistics = _like(images), _per_channel(STATISTICS, channels)
    library.norm_forward(
        images.data_ptr(), None if shortcut is None else shortcut.data_ptr(),
        weight.data_ptr(), bias.data_ptr(), eps, ACTIVATION_NUMBERS[activation],
        output.data_ptr(), statistics.data_ptr(),
        scratch_memory(library.norm_scratch(channels, threads)),
        batch * height * width, channels, threads,
    )  # fmt: skip
    return output, statistics


@activated_norm.register_fake
def _(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(images, memory_format=torch.channels_last),
        images.new_empty(STATISTICS, images.shape[1]),
    )


@torch.library.custom_op("efficient_resnet::activated_norm_backward", mutates_args=())
def activated_norm_backward(
    grad_output: Tensor,
    images: Tensor,
    kept: Tensor | None,
    weight: Tensor,
    statistics: Tensor,
    activation: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `activated_norm`.

    Args:
        grad_output: (N, C, H, W).
        images: The input of the forward pass.
        kept: Its output with ReLU, or its shortcut with another activation; None if there was no
            shortcut or no activation.
        weight: (C,).
        statistics: The statistics that it returned.
        activation: As in the forward pass.
        wanted: Whether to compute the gradients by images and by shortcut; the others are empty.

    Returns:
        The gradients by images and by shortcut, (N, C, H, W) in channels_last, and by weight and by
        bias, (C,).

    Raises:
        RuntimeError: A tensor has another shape or dtype, or is on another device.
    """
    _check(images, {"weight": weight}, {"grad_output": grad_output, "kept": kept})
    check_operand("activated_norm", "statistics", statistics, (STATISTICS, images.shape[1]))
    batch, channels, height, width = images.shape
    library, threads = load_norm_kernels(), thread_count()
    grad_output, images = _channels_last(grad_output), _channels_last(images)
    grads = [_like(images) if want else grad_output.new_empty(0) for want in wanted]
    kept = None if kept is None else _channels_last(kept)
    weight, statistics = weight.contiguous(), statistics.contiguous()
    grad_weight, grad_bias = _per_channel(channels), _per_channel(channels)
    library.norm_backward(
        grad_output.data_ptr(), images.data_ptr(), None if kept is None else kept.data_ptr(),
        weight.data_ptr(), statistics.data_ptr(), ACTIVATION_NUMBERS[activation],
        *(grad.data_ptr() if want else None for grad, want in zip(grads, wanted, strict=True)),
        grad_weight.data_ptr(), grad_bias.data_ptr(),
        scratch_memory(library.norm_scratch(channels, threads)),
        batch * height * width, channels, threads,
    )  # fmt: skip
    return grads[0], grads[1], grad_weight, grad_bias


@activated_norm_backward.register_fake
def _(
    grad_output: Tensor,
    images: Tensor,
    kept: Tensor | None,
    weight: Tensor,
    statistics: Tensor,
    activation: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [
        torch.empty_like(images, memory_format=torch.channels_last)
        if want
        else grad_output.new_empty(0)
        for want in wanted
    ]
    return grads[0], grads[1], torch.empty_like(weight), torch.empty_like(weight)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    images, weight, _, shortcut, _, activation = inputs
    ctx.activation = activation
    # Without a shortcut, the backward pass recomputes the slopes from the images.
    kept = output[0] if activation == "relu" and shortcut is not None else shortcut
    kept = None if activation == "none" else kept
    ctx.save_for_backward(images, weight, output[1], kept)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_output: Tensor | None, _grad_statistics: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 6
    images, weight, statistics, kept = ctx.saved_tensors
    by_images, by_weight, by_bias, by_shortcut = ctx.needs_input_grad[:4]
    # Without an activation, the shortcut receives the gradient unchanged.
    wanted = [by_images, by_shortcut and ctx.activation != "none"]
    grads = activated_norm_backward(
        grad_output, images, kept, weight, statistics, ctx.activation, wanted
    )
    grad_shortcut = grads[1] if wanted[1] else grad_output
    return (
        grads[0] if by_images else None,
        grads[2] if by_weight else None,
        grads[3] if by_bias else None,
        grad_shortcut if by_shortcut else None,
        None,
        None,
    )


activated_norm.register_autograd(_backward, setup_context=_keep_for_backward)
