"""3x3 convolutions from winograd.cpp as operators of PyTorch, with their gradients."""

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
    "CHANNEL_MULTIPLE",
    "load_winograd_kernels",
    "winograd_convolution",
    "winograd_convolution_backward",
]

CHANNEL_MULTIPLE = 16


@functools.cache
def load_winograd_kernels() -> ctypes.CDLL:
    """Compile the kernels, unless they are cached, and load them.

    Raises:
        NativeKernelsError: They cannot be compiled or loaded here.
    """
    library = load_library(Path(__file__).with_name("winograd.cpp"))
    pointer, number, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
    library.winograd_tile.argtypes = [number, number, *[count] * 3]
    library.winograd_tile.restype = number
    library.winograd_scratch.argtypes = [*[number] * 4, *[count] * 5, number, number]
    library.winograd_scratch.restype = count
    library.winograd_forward.argtypes = [
        *[pointer] * 4, *[number] * 3, *[count] * 5, number, number,
    ]  # fmt: skip
    library.winograd_forward.restype = None
    library.winograd_weight.argtypes = [*[pointer] * 4, *[number] * 3, *[count] * 5, number]
    library.winograd_weight.restype = None
    return library


def tile_side(stride: int, batch: int, height: int, width: int, *, weight_gradient: bool) -> int:
    """The faster side of output tiles, 2 or 4, for images of this shape."""
    library = load_winograd_kernels()
    side: int = library.winograd_tile(int(weight_gradient), stride, batch, height, width)
    return side


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _like_images(*shape: int) -> Tensor:
    # With dtype and device, since users may change the defaults for new tensors.
    return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)


def _empty_channels_last(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape).contiguous(memory_format=torch.channels_last)


def _output_size(side: int, stride: int) -> int:
    return (side - 1) // stride + 1


def _convolve(images: Tensor, weight: Tensor, stride: int, bf16: bool) -> Tensor:
    batch, channels, height, width = images.shape
    size = [_output_size(side, stride) for side in (height, width)]
    output = _like_images(batch, len(weight), *size)
    shape = (batch, height, width, channels, len(weight))
    return _run(images, weight, output, stride, shape, bf16=bf16, back=False)


def _image_gradient(
    grad_output: Tensor, images: Tensor, weight: Tensor, stride: int, bf16: bool
) -> Tensor:
    batch, channels, height, width = images.shape
    gradient = _like_images(*images.shape)
    shape = (batch, height, width, len(weight), channels)
    return _run(grad_output, weight, gradient, stride, shape, bf16=bf16, back=True)


def _run(
    source: Tensor,
    weight: Tensor,
    result: Tensor,
    stride: int,
    shape: tuple[int, ...],
    *,
    bf16: bool,
    back: bool,
) -> Tensor:
    """The convolution, or with `back` the gradient by its images.

    Args:
        source: (N, C, H, W), the input: images, or with `back` the gradient of the output.
        weight: Weight of the convolution.
        result: (N, K, H, W) in channels_last, the tensor to write.
        stride: Stride of the convolution.
        shape: N, height and width of the convolution's images, C and K.
        bf16: Whether to compute the products in bf16.
        back: Whether to compute the gradient by the images.
    """
    if not result.numel():
        return result
    library, threads = load_winograd_kernels(), thread_count()
    tile = tile_side(stride, *shape[:3], weight_gradient=False)
    sizes = (int(bf16), stride, tile, *shape)
    scratch = scratch_memory(library.winograd_scratch(0, *sizes, int(back), threads))
    source, weight = _channels_last(source), _channels_last(weight)
    library.winograd_forward(
        source.data_ptr(), weight.data_ptr(), result.data_ptr(), scratch, *sizes, int(back), threads
    )
    return result


def _weight_gradient(
    grad_output: Tensor, images: Tensor, weight: Tensor, stride: int, bf16: bool
) -> Tensor:
    gradient = torch.empty_like(weight, memory_format=torch.channels_last)
    if not grad_output.numel():
        return gradient.zero_()
    library, threads = load_winograd_kernels(), thread_count()
    batch, channels, height, width = images.shape
    tile = tile_side(stride, batch, height, width, weight_gradient=True)
    sizes = (int(bf16), stride, tile, batch, height, width, channels, len(weight))
    scratch = scratch_memory(library.winograd_scratch(1, *sizes, 0, threads))
    images, grad_output = _channels_last(images), _channels_last(grad_output)
    library.winograd_weight(
        images.data_ptr(), grad_output.data_ptr(), gradient.data_ptr(), scratch, *sizes, threads
    )
    return gradient


def _check(images: Tensor, weight: Tensor, stride: int) -> None:
    """Raise a RuntimeError, as torch's convolution would, for operands the kernels cannot take."""
    operator = "winograd_convolution"
    check_operand(operator, "images", images, (None, None, None, None))
    check_operand(operator, "weight", weight, (None, images.shape[1], 3, 3))
    if stride not in (1, 2):
        raise RuntimeError(f"{operator}: expected a stride of 1 or 2, got {stride}")
    if any(channels % CHANNEL_MULTIPLE or not channels for channels in weight.shape[:2]):
        raise RuntimeError(
            f"{operator}: expected channels in multiples of {CHANNEL_MULTIPLE}, "
            f"got a weight of shape {tuple(weight.shape)}"
        )
    if not all(images.shape[2:]):
        raise RuntimeError(f"{operator}: images of shape {tuple(images.shape)} have no pixels")


@torch.library.custom_op("efficient_resnet::winograd_convolution", mutates_args=())
def winograd_convolution(images: Tensor, weight: Tensor, stride: int, bf16: bool = False) -> Tensor:
    """3x3 convolution with a padding of 1, in fp32 on the CPU.

    Args:
        images: (N, C, H, W), C a multiple of CHANNEL_MULTIPLE.
        weight: (K, C, 3, 3), K a multiple of CHANNEL_MULTIPLE too.
        stride: 1 or 2.
        bf16: Whether to compute the products of the transformed tiles, here and in the gradients,
            in bf16, with sums in fp32. (Without avx512_bf16 the CPU emulates that, slowly.)

    Returns:
        (N, K, (H - 1) // stride + 1, (W - 1) // stride + 1) in channels_last.

    Raises:
        RuntimeError: A tensor has another shape or dtype, or is on another device.
    """
    _check(images, weight, stride)
    return _convolve(images, weight, stride, bf16)


@winograd_convolution.register_fake
def _(images: Tensor, weight: Tensor, stride: int, bf16: bool = False) -> Tensor:
    size = [_output_size(side, stride) for side in images.shape[2:]]
    return _empty_channels_last(images, images.shape[0], weight.shape[0], *size)


@torch.library.custom_op("efficient_resnet::winograd_convolution_backward", mutates_args=())
def winograd_convolution_backward(
    grad_output: Tensor,
    images: Tensor,
    weight: Tensor,
    stride: int,
    wanted: list[bool],
    bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of `winograd_convolution` by images and by weight.

    Args:
        grad_output: Gradient of the output, with the same shape.
        images: (N, C, H, W).
        weight: (K, C, 3, 3).
        stride: 1 or 2.
        wanted: Whether to compute each of the two; a gradient that is not wanted is empty.
        bf16: Whether to compute the products in bf16, with sums in fp32.

    Returns:
        The gradients (N, C, H, W) in channels_last and (K, C, 3, 3) with the strides of the weight.

    Raises:
        RuntimeError: A tensor has another shape or dtype, or is on another device.
    """
    _check(images, weight, stride)
    size = [_output_size(side, stride) for side in images.shape[2:]]
    expected = (len(images), len(weight), *size)
    check_operand("winograd_convolution_backward", "grad_output", grad_output, expected)
    grad_images, grad_weight = grad_output.new_empty(0), grad_output.new_empty(0)
    if wanted[0]:
        grad_images = _image_gradient(grad_output, images, weight, stride, bf16)
    if wanted[1]:
        grad_weight = _weight_gradient(grad_output, images, weight, stride, bf16)
        if weight.is_contiguous():  # DDP needs the strides of the parameter
            grad_weight = grad_weight.contiguous()
    return grad_images, grad_weight


@winograd_convolution_backward.register_fake
def _(
    grad_output: Tensor,
    images: Tensor,
    weight: Tensor,
    stride: int,
    wanted: list[bool],
    bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    nothing = grad_output.new_empty(0)
    return (
        _empty_channels_last(grad_output, *images.shape) if wanted[0] else nothing,
        torch.empty_like(weight) if wanted[1] else nothing.clone(),
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    images, weight = ctx.saved_tensors
    stride, bf16 = ctx.options
    wanted = list(ctx.needs_input_grad[:2])
    gradients = winograd_convolution_backward(grad_output, images, weight, stride, wanted, bf16)
    by_images, by_weight = (
        gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)
    )
    return by_images, by_weight, None, None


winograd_convolution.register_autograd(_backward, setup_context=_keep_for_backward)
