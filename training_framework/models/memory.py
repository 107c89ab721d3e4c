"""The memory that training a network takes, estimated without computing anything."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training_framework.models.flops import meta_copy

__all__ = ["TrainingMemory", "training_memory"]


class TrainingMemory(NamedTuple):
    """What training keeps in memory between the forward and the backward pass, in fp32.

    Attributes:
        activation_bytes: Of one image: what autograd saves, each tensor once.
        weight_bytes: Of the weights, once; gradients and optimizer states come on top.
    """

    activation_bytes: int
    weight_bytes: int


def training_memory(model: nn.Module, image_size: int) -> TrainingMemory:
    """Count what autograd saves in a forward pass of one image, on a copy without storage.

    Args:
        model: Any model from (N, 3, H, W) images to one tensor, without a wrapper of torch.compile
            or DDP. It is not changed.
        image_size: Side in pixels of the square images.
    """
    # Evaluation mode, as norms of one image need it; they save the same input.
    shape_only = meta_copy(model).eval()
    own = itertools.chain(shape_only.parameters(), shape_only.buffers())
    kept_anyway = {tensor.untyped_storage()._cdata for tensor in own}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # The tensor is kept too, so that no later one takes the address of its storage.
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        shape_only(torch.empty(1, 3, image_size, image_size, device="meta"))
    activations = (tensor for storage, tensor in saved.items() if storage not in kept_anyway)
    return TrainingMemory(
        activation_bytes=sum(tensor.untyped_storage().nbytes() for tensor in activations),
        weight_bytes=sum(p.numel() * p.element_size() for p in shape_only.parameters()),
    )
