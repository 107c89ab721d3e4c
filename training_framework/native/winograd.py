"""3x3 convolutions by winograd.cpp as operators of PyTorch, with their gradients."""

import ctypes
import functools
import mmap
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training_framework.native.library import load_library

__all__ = [
    "CHANNEL_MULTIPLE",
    "load_winograd_kernels",
    "winograd_convolution",
    "winograd_convolution_backward",
]

CHANNEL_MULTIPLE = 16
HUGE_PAGE_BYTES = 2**21


@functools.cache
def load_winograd_kernels() -> ctypes.CDLL:
    """Compile the kernels, unless that was done before, and load them.

    Raises:
        NativeKernelsError: That is not possible here.
    """
    library = load_library(Path(__file__).with_name("winograd.cpp"))
    pointer, number, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
    library.winograd_tile.argtypes = [number, *[count] * 3]
    library.winograd_tile.restype = number
    library.winograd_scratch.argtypes = [number, number, *[count] * 5, number]
    library.winograd_scratch.restype = count
    library.winograd_forward.argtypes = [*[pointer] * 4, number, *[count] * 5, number, number]
    library.winograd_forward.restype = None
    library.winograd_weight.argtypes = [*[pointer] * 4, number, *[count] * 5, number]
    library.winograd_weight.restype = None
    return library


def tile_side(batch: int, height: int, width: int, *, weight_gradient: bool) -> int:
    """Side of the tiles of outputs, 2 or 4, that is faster for maps of that shape."""
    side: int = load_winograd_kernels().winograd_tile(int(weight_gradient), batch, height, width)
    return side


class _Scratch(threading.local):
    """Memory of a thread for the kernels, kept: fresh pages would cost more than the work on them.

    It is mapped, not allocated, so that the system may back it with huge pages.
    """

    size = 0
    address = 0

    def of(self, floats: int) -> int:
        """Address of room for so many fp32 numbers."""
        needed = 4 * floats + HUGE_PAGE_BYTES
        if needed > self.size:
            self.memory = mmap.mmap(-1, needed)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self.memory.madvise(mmap.MADV_HUGEPAGE)
            start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
            self.size, self.address = needed, -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        return self.address


_scratch = _Scratch()


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty_channels_last(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape).contiguous(memory_format=torch.channels_last)


def _convolve(images: Tensor, weight: Tensor, out_channels: int, *, transposed: bool) -> Tensor:
    """The convolution of (N, C, H, W), or with `transposed` the one by which gradients go back."""
    batch, channels, height, width = images.shape
    output = torch.empty((batch, out_channels, height, width), memory_format=torch.channels_last)
    if not output.numel():
        return output
    library, threads = load_winograd_kernels(), torch.get_num_threads()
    side = tile_side(batch, height, width, weight_gradient=False)
    sizes = (side, batch, height, width, channels, out_channels)
    scratch = _scratch.of(library.winograd_scratch(0, *sizes, threads))
    images, weight = _channels_last(images), _channels_last(weight)
    library.winograd_forward(
        images.data_ptr(), weight.data_ptr(), output.data_ptr(), scratch,
        *sizes, int(transposed), threads,
    )  # fmt: skip
    return output


def _weight_gradient(grad_output: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    gradient = torch.empty_like(weight, memory_format=torch.channels_last)
    if not grad_output.numel():
        return gradient.zero_()
    library, threads = load_winograd_kernels(), torch.get_num_threads()
    batch, channels, height, width = images.shape
    side = tile_side(batch, height, width, weight_gradient=True)
    sizes = (side, batch, height, width, channels, weight.shape[0])
    scratch = _scratch.of(library.winograd_scratch(1, *sizes, threads))
    images, grad_output = _channels_last(images), _channels_last(grad_output)
    library.winograd_weight(
        images.data_ptr(), grad_output.data_ptr(), gradient.data_ptr(), scratch, *sizes, threads
    )
    return gradient


@torch.library.custom_op("efficient_resnet::winograd_convolution", mutates_args=())
def winograd_convolution(images: Tensor, weight: Tensor) -> Tensor:
    """3x3 convolution of stride 1 with a padding of 1, in fp32 on the CPU.

    Args:
        images: (N, C, H, W), C a multiple of CHANNEL_MULTIPLE.
        weight: (K, C, 3, 3), K likewise.

    Returns:
        (N, K, H, W) in channels_last.
    """
    return _convolve(images, weight, weight.shape[0], transposed=False)


@winograd_convolution.register_fake
def _(images: Tensor, weight: Tensor) -> Tensor:
    return _empty_channels_last(images, images.shape[0], weight.shape[0], *images.shape[2:])


@torch.library.custom_op("efficient_resnet::winograd_convolution_backward", mutates_args=())
def winograd_convolution_backward(
    grad_output: Tensor, images: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of `winograd_convolution` by images and by weight.

    Args:
        grad_output: (N, K, H, W).
        images: (N, C, H, W).
        weight: (K, C, 3, 3).
        wanted: Which of the two are wanted; the other one is an empty tensor.

    Returns:
        (N, C, H, W) in channels_last, and (K, C, 3, 3) with the strides of the weight.
    """
    grad_images, grad_weight = grad_output.new_empty(0), grad_output.new_empty(0)
    if wanted[0]:
        grad_images = _convolve(grad_output, weight, weight.shape[1], transposed=True)
    if wanted[1]:
        grad_weight = _weight_gradient(grad_output, images, weight)
        if weight.is_contiguous():  # DDP wants the strides of the parameter
            grad_weight = grad_weight.contiguous()
    return grad_images, grad_weight


@winograd_convolution_backward.register_fake
def _(
    grad_output: Tensor, images: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    nothing = grad_output.new_empty(0)
    return (
        _empty_channels_last(grad_output, *images.shape) if wanted[0] else nothing,
        torch.empty_like(weight) if wanted[1] else nothing.clone(),
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
    images, weight = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad)
    gradients = winograd_convolution_backward(grad_output, images, weight, wanted)
    return gradients[0] if wanted[0] else None, gradients[1] if wanted[1] else None


winograd_convolution.register_autograd(_backward, setup_context=_keep_for_backward)
