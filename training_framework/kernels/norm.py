"""Batch norm with a shortcut and ReLU in one, by norm.cpp, as an operator of PyTorch."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training_framework.kernels.compiler import load_library
from training_framework.kernels.scratch import scratch_memory, thread_count

__all__ = [
    "CHANNEL_MULTIPLE",
    "load_norm_kernels",
    "rectified_norm",
    "rectified_norm_backward",
]

CHANNEL_MULTIPLE = 16
# Rows of the statistics that `rectified_norm` returns, and how many there are.
MEAN, UNBIASED_VARIANCE, STATISTICS = 0, 4, 5


@functools.cache
def load_norm_kernels() -> ctypes.CDLL:
    """Compile the kernels, unless that was done before, and load them.

    Raises:
        NativeKernelsError: That is not possible here.
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


def _like(images: Tensor) -> Tensor:
    return torch.empty(images.shape, memory_format=torch.channels_last)


@torch.library.custom_op("efficient_resnet::rectified_norm", mutates_args=())
def rectified_norm(
    images: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    """Batch norm of a training step, plus a shortcut, through ReLU, in fp32 on the CPU.

    Args:
        images: (N, C, H, W), C a multiple of CHANNEL_MULTIPLE, more than one value a channel.
        weight: (C,), the scale.
        bias: (C,).
        shortcut: (N, C, H, W), added before ReLU; None adds nothing.
        eps: Added to the variance.
        relu: Whether negative numbers become zero at the end.

    Returns:
        (N, C, H, W) in channels_last, and (STATISTICS, C): the mean in row MEAN, the unbiased
        variance in row UNBIASED_VARIANCE, and what the backward pass needs.
    """
    batch, channels, height, width = images.shape
    library, threads = load_norm_kernels(), thread_count()
    images = _channels_last(images)
    shortcut = None if shortcut is None else _channels_last(shortcut)
    output, statistics = _like(images), torch.empty(STATISTICS, channels)
    library.norm_forward(
        images.data_ptr(), None if shortcut is None else shortcut.data_ptr(),
        weight.data_ptr(), bias.data_ptr(), eps, relu, output.data_ptr(), statistics.data_ptr(),
        scratch_memory(library.norm_scratch(channels, threads)),
        batch * height * width, channels, threads,
    )  # fmt: skip
    return output, statistics


@rectified_norm.register_fake
def _(
    images: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(images, memory_format=torch.channels_last),
        images.new_empty(STATISTICS, images.shape[1]),
    )


@torch.library.custom_op("efficient_resnet::rectified_norm_backward", mutates_args=())
def rectified_norm_backward(
    grad_output: Tensor,
    images: Tensor,
    output: Tensor | None,
    weight: Tensor,
    statistics: Tensor,
    relu: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `rectified_norm`.

    Args:
        grad_output: (N, C, H, W).
        images: Its input.
        output: What it returned, where there was ReLU and a shortcut; else None will do.
        weight: (C,).
        statistics: What it returned.
        relu: As given to it.
        wanted: Whether the gradient by images and the one by shortcut are; else they are empty.

    Returns:
        By images and by shortcut, (N, C, H, W) in channels_last; by weight and by bias, (C,).
    """
    batch, channels, height, width = images.shape
    library, threads = load_norm_kernels(), thread_count()
    grad_output, images = _channels_last(grad_output), _channels_last(images)
    grads = [_like(images) if want else grad_output.new_empty(0) for want in wanted]
    grad_weight, grad_bias = torch.empty(channels), torch.empty(channels)
    library.norm_backward(
        grad_output.data_ptr(), images.data_ptr(), None if output is None else output.data_ptr(),
        weight.data_ptr(), statistics.data_ptr(), relu,
        *(grad.data_ptr() if want else None for grad, want in zip(grads, wanted, strict=True)),
        grad_weight.data_ptr(), grad_bias.data_ptr(),
        scratch_memory(library.norm_scratch(channels, threads)),
        batch * height * width, channels, threads,
    )  # fmt: skip
    return grads[0], grads[1], grad_weight, grad_bias


@rectified_norm_backward.register_fake
def _(
    grad_output: Tensor,
    images: Tensor,
    output: Tensor | None,
    weight: Tensor,
    statistics: Tensor,
    relu: bool,
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
    images, weight, _, shortcut, _, relu = inputs
    ctx.relu = relu
    # Without a shortcut, the backward pass finds the zeros of ReLU again from the images.
    kept = output[0] if relu and shortcut is not None else None
    ctx.save_for_backward(images, weight, output[1], kept)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_output: Tensor | None, _grad_statistics: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 6
    images, weight, statistics, output = ctx.saved_tensors
    by_images, by_weight, by_bias, by_shortcut = ctx.needs_input_grad[:4]
    # Without ReLU the gradient goes to the shortcut as it is.
    wanted = [by_images, by_shortcut and ctx.relu]
    grads = rectified_norm_backward(
        grad_output, images, output, weight, statistics, ctx.relu, wanted
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


rectified_norm.register_autograd(_backward, setup_context=_keep_for_backward)
