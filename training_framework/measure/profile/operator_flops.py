"""Floating-point operations of single operators, from their arguments' shapes.

A multiplication and an addition count as two, as in `training_framework.models.flops`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

__all__ = [
    "WINOGRAD",
    "WINOGRAD_BACKWARD",
    "Cost",
    "convolution_output_size",
    "operator_cost",
]

WINOGRAD = "efficient_resnet::winograd_convolution"
WINOGRAD_BACKWARD = "efficient_resnet::winograd_convolution_backward"

Shapes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Cost:
    """The least that one call of an operator takes.

    Attributes:
        flops: Operations.
        elements: Numbers read and written: each input, weight and output, once for each product
            that needs it.
    """

    flops: int
    elements: int


def operator_cost(name: str, shapes: Shapes, values: Sequence[Any]) -> Cost | None:
    """Cost of a convolution, its backward pass or a matrix product; None for anything else.

    Args:
        name: As the profiler writes it: `aten::convolution`.
        shapes: Shapes of the arguments; empty for those that are not tensors.
        values: Values of the arguments that are not tensors.
    """
    if name == "aten::convolution" and len(values) >= 9 and not values[6]:
        return _forward(
            shapes[0], shapes[1], stride=values[3], padding=values[4], dilation=values[5]
        )
    if name == WINOGRAD:  # counted as the convolution that it stands for
        stride = (values[2],) * 2
        return _forward(shapes[0], shapes[1], stride=stride, padding=(1, 1), dilation=(1, 1))
    if name == WINOGRAD_BACKWARD or (
        name == "aten::convolution_backward" and len(values) >= 11 and not values[7]
    ):
        return _backward(*shapes[:3], wanted=values[4 if name == WINOGRAD_BACKWARD else 10])
    if name in ("aten::mm", "aten::bmm"):
        return _product(shapes[0], shapes[1])
    if name in ("aten::addmm", "aten::baddbmm"):
        return _product(shapes[1], shapes[2])
    return None


def convolution_output_size(
    size: int, kernel: int, *, stride: int, padding: int, dilation: int
) -> int:
    """Length of a convolution's output along one axis (torch.nn.Conv2d's formula)."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _forward(
    images: Sequence[int],
    weight: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Cost:
    spatial = [
        convolution_output_size(size, kernel, stride=s, padding=p, dilation=d)
        for size, kernel, s, p, d in zip(
            images[2:], weight[2:], stride, padding, dilation, strict=True
        )
    ]
    output = [images[0], weight[0], *spatial]
    return Cost(_products(output, weight), prod(images) + prod(weight) + prod(output))


def _backward(
    output: Sequence[int], images: Sequence[int], weight: Sequence[int], *, wanted: Sequence[bool]
) -> Cost:
    # Each of the two gradients takes as many products as the forward pass. It reads the output's
    # gradient and one operand, and writes the gradient of the other operand.
    gradients = sum(bool(flag) for flag in wanted[:2])
    each = prod(output) + prod(images) + prod(weight)
    return Cost(gradients * _products(output, weight), gradients * each)


def _products(output: Sequence[int], weight: Sequence[int]) -> int:
    """FLOPs for an output: each of its numbers is a sum over a weight's inputs and kernel."""
    return 2 * prod(output) * prod(weight[1:])


def _product(left: Sequence[int], right: Sequence[int]) -> Cost:
    output = [*left[:-1], right[-1]]
    return Cost(2 * prod(output) * left[-1], prod(left) + prod(right) + prod(output))
