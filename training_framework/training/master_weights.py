"""Half-precision copies of weights, made together from their fp32 masters."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["MasterWeights"]


class MasterWeights:
    """Runs a network with half-precision copies of the weights that autocast would cast one by one.

    The parameters stay what the optimizer, the weight average and checkpoints hold: fp32. All
    copies are made by one operation before the forward pass, and all gradients are cast back by one
    after the backward pass. The numbers are those of autocast, which makes the same copies.

    Source: master weights, in Micikevicius et al., Mixed Precision Training, arXiv 1710.03740.

    Args:
        model: The network, run under autocast. Convolutions and linear layers get copies.
        dtype: Of the copies: that of autocast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        cast = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
            for parameter in module.parameters(recurse=False)
            if parameter.dtype == torch.float32
        }
        self._masters = {
            name: parameter for name, parameter in model.named_parameters() if id(parameter) in cast
        }

    def __call__(self, images: Tensor) -> Any:
        """(N, C, H, W) images to the network's output."""
        copies = _CastTogether.apply(self._dtype, *self._masters.values())
        return functional_call(self._model, dict(zip(self._masters, copies, strict=True)), images)


class _CastTogether(torch.autograd.Function):
    """Copies of tensors in another dtype; their gradients come back in the tensors' own."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # the optimizer leaves a weight without gradient alone
        return tuple(_cast(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        present = [gradient for gradient in gradients if gradient is not None]
        copies = iter(_cast(present, torch.float32))
        return None, *(None if gradient is None else next(copies) for gradient in gradients)


def _cast(tensors: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, tensors)
    return copies
