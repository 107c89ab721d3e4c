"""Floating-point operations of a model, counted by torch.utils.flop_counter.

A multiplication and an addition count as two operations. As usual, only convolutions and matrix
products count. Nothing is computed, since the counting runs on a copy without storage.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["forward_flops_per_image", "meta_copy", "training_flops_per_image"]

# The type stubs of torch do not know their arguments.
LAZY_BUFFER: Any = UninitializedBuffer
LAZY_PARAMETER: Any = UninitializedParameter


def forward_flops_per_image(model: nn.Module, image_size: int) -> int:
    """FLOPs of one forward pass of one image.

    Args:
        model: Any model from (N, 3, H, W) images to one tensor, on any device, without a wrapper
            of torch.compile or DDP. It is not changed.
        image_size: Side in pixels of the square images.
    """
    return _count(model, image_size, backward=False)


def training_flops_per_image(model: nn.Module, image_size: int) -> int:
    """FLOPs of one forward and backward pass of one image.

    These are the model's FLOPs, the numerator of model FLOPs utilization: neither recomputed
    activations nor the optimizer count. The first convolution needs no gradient of its input, so
    the result is slightly below three forward passes.

    Args:
        model: As in `forward_flops_per_image`, or a user's own model.
        image_size: Side in pixels of the square images.

    Returns:
        0 if they cannot be counted: some networks, such as scripted ones, do not run without data,
        and some only accept images of another shape.
    """
    try:
        return _count(model, image_size, backward=True)
    except Exception:  # user code may raise anything
        return 0


def _count(model: nn.Module, image_size: int, *, backward: bool) -> int:
    # Evaluation mode, so that norms do not communicate and activations are not recomputed.
    shape_only = meta_copy(model).eval()
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = shape_only(image)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device: shapes without storage. No weight is copied."""
    copies: dict[int, object] = {}
    for parameter in model.parameters():
        copies[id(parameter)] = _meta_parameter(parameter)
    for buffer in model.buffers():
        copies[id(buffer)] = (
            LAZY_BUFFER(dtype=buffer.dtype, device="meta")
            if isinstance(buffer, UninitializedBuffer)
            else torch.empty_like(buffer, device="meta")
        )
    # Reparametrized modules keep the last computed weight as an attribute.
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor):
                copies[id(value)] = torch.empty_like(value.detach(), device="meta")
    return copy.deepcopy(model, copies)


def _meta_parameter(parameter: nn.Parameter) -> nn.Parameter:
    if isinstance(parameter, UninitializedParameter):
        lazy: nn.Parameter = LAZY_PARAMETER(
            parameter.requires_grad, device="meta", dtype=parameter.dtype
        )
        return lazy
    meta = torch.empty_like(parameter, device="meta")
    return nn.Parameter(meta, requires_grad=parameter.requires_grad)
