"""Convolutions over maps of a few pixels, as matrix products.

On a map of a few pixels, a 3x3 convolution with padding spends most of its time on the padding: at
1x1, only one of nine taps matters; at 2x2, sixteen of thirty-six products. Here each output pixel
is a matrix product over only the input pixels in its window, so the result is the same up to
rounding.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["SmallMapConv2d", "is_small_map", "keep_small_maps_from_compiler"]


# The dtypes that autocast casts, unlike integers and fp64.
AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


class _Window(NamedTuple):
    """Along one axis: the input pixels [start, stop) in the window of the outputs [first, last).

    `taps` gives, for each of these outputs, the index of the kernel tap at `start`.
    """

    start: int
    stop: int
    first: int
    last: int
    taps: tuple[int, ...]


def _windows(size: int, kernel: int, stride: int, padding: int) -> list[_Window]:
    """The windows of all outputs along an axis; outputs with the same input pixels share one."""
    windows: list[_Window] = []
    for output in range((size + 2 * padding - kernel) // stride + 1):
        origin = output * stride - padding
        start, stop = max(0, origin), min(size, origin + kernel)
        tap = start - origin
        if windows and (windows[-1].start, windows[-1].stop) == (start, stop):
            before = windows.pop()
            windows.append(_Window(start, stop, before.first, output + 1, (*before.taps, tap)))
        else:
            windows.append(_Window(start, stop, output, output + 1, (tap,)))
    return windows


def _tap_slices(rows: _Window, columns: _Window) -> list[tuple[slice, slice]]:
    """For each output pixel of a pair of windows, the part of the kernel that covers the input."""
    height, width = rows.stop - rows.start, columns.stop - columns.start
    return [
        (slice(row, row + height), slice(column, column + width))
        for row in rows.taps
        for column in columns.taps
    ]


class _WindowedConvolution(torch.autograd.Function):
    """Convolution of (N, Cin, H, W) as one matrix product for each set of equal windows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        batch, _, height, width = x.shape
        out_channels, kernel = weight.shape[0], weight.shape[2]
        rows = _windows(height, kernel, stride, padding)
        columns = _windows(width, kernel, stride, padding)
        pixels = x.permute(0, 2, 3, 1)
        taps = weight.permute(0, 2, 3, 1)
        if len(rows[0].taps) * len(columns[0].taps) * len(rows) * len(columns) > 1:
            # Making the taps contiguous pays if they are read several times.
            taps = taps.contiguous()
        output = x.new_empty(batch, rows[-1].last, columns[-1].last, out_channels)
        matrices = []
        for row in rows:
            for column in columns:
                parts = [taps[:, down, across] for down, across in _tap_slices(row, column)]
                # A single part is not copied: at 1x1 in channels_last, the product can read the
                # centre tap in place.
                stacked = parts[0] if len(parts) == 1 else torch.stack(parts)
                matrix = stacked.reshape(len(parts) * out_channels, -1).to(x.dtype)
                seen = pixels[:, row.start : row.stop, column.start : column.stop]
                product = seen.reshape(batch, -1) @ matrix.t()
                output[:, row.first : row.last, column.first : column.last] = product.view(
                    batch, len(row.taps), len(column.taps), out_channels
                )
                matrices.append(matrix)
        ctx.save_for_backward(x, weight, *matrices)
        ctx.windows = [(row, column) for row in rows for column in columns]
        return output.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *matrices = ctx.saved_tensors
        batch, out_channels = grad_output.shape[:2]
        grads = grad_output.permute(0, 2, 3, 1)
        pixels = x.permute(0, 2, 3, 1)
        grad_pixels = torch.zeros_like(pixels)
        grad_weight = torch.zeros_like(weight)
        grad_taps = grad_weight.permute(0, 2, 3, 1)
        for (row, column), matrix in zip(ctx.windows, matrices, strict=True):
            grad = grads[:, row.first : row.last, column.first : column.last].reshape(batch, -1)
            seen = pixels[:, row.start : row.stop, column.start : column.stop]
            if ctx.needs_input_grad[0]:
                grad_pixels[:, row.start : row.stop, column.start : column.stop] += (
                    grad @ matrix
                ).view_as(seen)
            if ctx.needs_input_grad[1]:
                slices = _tap_slices(row, column)
                product = (grad.t() @ seen.reshape(batch, -1)).view(
                    len(slices), out_channels, *seen.shape[1:]
                )
                for (down, across), part in zip(slices, product, strict=True):
                    grad_taps[:, down, across] += part
        grad_x = grad_pixels.permute(0, 3, 1, 2) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight if ctx.needs_input_grad[1] else None, None, None


class _PointwiseConvolution(torch.autograd.Function):
    """1x1 convolution of (N, Cin, H, W) as one matrix product over the pixels that it reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        read = x.permute(0, 2, 3, 1)[:, ::stride, ::stride]
        matrix = weight.flatten(1).to(x.dtype)
        rows = read.reshape(-1, x.shape[1])
        ctx.save_for_backward(rows, weight)
        ctx.stride, ctx.shape = stride, x.shape
        return (rows @ matrix.t()).view(*read.shape[:3], -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        batch, in_channels, height, width = ctx.shape
        grads = grad_output.permute(0, 2, 3, 1)
        grad = grads.reshape(-1, grads.shape[3])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            product = (grad @ weight.flatten(1).to(grad.dtype)).view(*grads.shape[:3], in_channels)
            if ctx.stride > 1:
                pixels = grad.new_zeros(batch, height, width, in_channels)
                pixels[:, :: ctx.stride, :: ctx.stride] = product
                product = pixels
            grad_x = product.permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            # DDP needs the strides of the parameter; both layouts have the same order in memory.
            product = (grad.t() @ rows).to(weight.dtype)
            if any(weight.is_contiguous(memory_format=layout) for layout in LAYOUTS):
                grad_weight = product.as_strided(weight.shape, weight.stride())
            else:
                grad_weight = torch.empty_like(weight).copy_(product.view(weight.shape))
        return grad_x, grad_weight, None


def _compute_dtype(input: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return input.dtype


class SmallMapConv2d(nn.Conv2d):
    """Conv2d that runs as matrix products on CPUs if the map is so small that this is faster.

    Otherwise it runs `nn.Conv2d`. Its parameters are the same in name, shape and gradient (taps
    that only cover padding have a gradient of zero). It is fastest in channels_last. It can be
    differentiated once, not twice.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, Cin, H, W) to (N, Cout, H', W')."""
        if not self._is_faster_as_products(input):
            return super().forward(input)
        in_channels_last = input.is_contiguous(memory_format=torch.channels_last)
        output = self._as_products(input)
        return output if in_channels_last else output.contiguous()

    def _as_products(self, input: Tensor) -> Tensor:
        # The weight is cast later, and only the taps that are used.
        input = input.to(_compute_dtype(input))
        if self.kernel_size == (1, 1):
            return _PointwiseConvolution.apply(input, self.weight, self.stride[0])
        return _WindowedConvolution.apply(input, self.weight, self.stride[0], self.padding[0])

    def _is_faster_as_products(self, input: Tensor) -> bool:
        tensors = (input, self.weight)
        if (
            any(t.device.type != "cpu" or t.layout != torch.strided for t in tensors)
            or input.dim() != 4
            or not input.numel()
            or input.shape[1] != self.in_channels
            or self.weight.shape != (self.out_channels, self.in_channels, *self.kernel_size)
        ):
            return False  # torch's convolution raises the error
        if torch.is_autocast_enabled("cpu"):
            if any(t.dtype not in AUTOCAST_DTYPES for t in tensors):
                return False
        elif input.dtype != self.weight.dtype or not input.is_floating_point():
            return False
        half = _compute_dtype(input).itemsize < 4
        return is_small_map(self, *input.shape[2:], batch_size=len(input), half_precision=half)


@functools.cache
def keep_small_maps_from_compiler() -> None:
    """Exclude these convolutions from torch.compile, in all networks of this process.

    The compiler turns the sum of each tap's gradient into a copy of the whole weight, which makes
    both the compilation and the result slow (docs/experiments.md). Call it only before compiling:
    it imports the compiler, which takes a second.
    """
    SmallMapConv2d._as_products = torch.compiler.disable(  # type: ignore[method-assign]
        SmallMapConv2d._as_products
    )


def is_small_map(
    convolution: nn.Conv2d,
    height: int,
    width: int,
    *,
    batch_size: int | None = None,
    half_precision: bool = False,
) -> bool:
    """Whether a convolution of such maps is faster as matrix products on a CPU.

    The limits come from measurements on two cores (AVX-512, torch 2.13, batches of 16 to 512).

    Args:
        convolution: The convolution; one with groups, dilation or a bias is left to `nn.Conv2d`.
        height: Height of the input in pixels.
        width: Width of the input in pixels.
        batch_size: Images in a batch; None: possibly many.
        half_precision: Whether it is computed in 16 bits.
    """
    kernel, stride, padding = convolution.kernel_size, convolution.stride, convolution.padding
    if (
        isinstance(padding, str)
        or any(len(set(sides)) > 1 for sides in (kernel, stride, padding))
        or convolution.groups != 1
        or convolution.dilation != (1, 1)
        or convolution.bias is not None
        or convolution.padding_mode != "zeros"
    ):
        return False
    if kernel == (1, 1):
        return padding == (0, 0) and height * width <= (4 if half_precision else 64)
    axes = [_windows(size, kernel[0], stride[0], padding[0]) for size in (height, width)]
    if any(window.start >= window.stop for windows in axes for window in windows) or not all(axes):
        return False
    if all(len(windows) == 1 for windows in axes):
        return True
    # If output pixels have different windows, a product for each only pays for few of them and many
    # images.
    few = all(windows[-1].last <= 2 for windows in axes)
    return few and not half_precision and (batch_size is None or batch_size >= 64)
