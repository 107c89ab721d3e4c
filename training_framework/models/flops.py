"""Floating-point operations of a model, counted by torch.utils.flop_counter.

A multiplication and an addition count as two. Only convolutions and matrix products count, as is
usual; nothing is computed, since the counting runs on a copy without storage.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["forward_flops_per_image", "meta_copy", "training_flops_per_image"]

# Their arguments are unknown to the type stubs of torch.
LAZY_BUFFER: Any = UninitializedBuffer
LAZY_PARAMETER: Any = UninitializedParameter


def forward_flops_per_image(model: nn.Module, image_size: int) -> int:
    """FLOPs of one forward pass of one image.

    Args:
        model: Any model from (N, 3, H, W) images to one tensor, on any device; not a compiled or
            DDP wrapper of it. It is not changed.
        image_size: Side in pixels of the square images.
    """
    return _count(model, image_size, backward=False)


def training_flops_per_image(model: nn.Module, image_size: int) -> int:
    """FLOPs of one forward and backward pass of one image.

    These are the model's FLOPs, the numerator of model FLOPs utilization: activations computed a
    second time do not count, nor does the optimizer. The first convolution needs no gradient of
    its input, so this is a little below three forward passes.

    Args:
        model: As in `forward_flops_per_image`, or a user's own.
        image_size: Side in pixels of the square images.

    Returns:
        0 where they cannot be counted: some networks do not run without data, such as scripted
        ones, or take only images of another shape.
    """
    try:
        return _count(model, image_size, backward=True)
    except Exception:  # user code may raise anything
        return 0


def _count(model: nn.Module, image_size: int, *, backward: bool) -> int:
    # In evaluation mode neither norms that talk to other processes nor recomputation run.
    shape_only = meta_copy(model).eval()
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = shape_only(image)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device: shapes without storage, no weight is copied."""
    copies: dict[int, object] = {}
    for parameter in model.parameters():
        copies[id(parameter)] = _meta_parameter(parameter)
    for buffer in model.buffers():
        copies[id(buffer)] = (
            LAZY_BUFFER(dtype=buffer.dtype, device="meta")
            if isinstance(buffer, UninitializedBuffer)
            else torch.empty_like(buffer, device="meta")
        )
    # Reparametrized modules keep the weight that they computed last as an attribute.
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
