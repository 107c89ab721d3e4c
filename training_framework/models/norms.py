"""Batch norm with a momentum of its own, or with scales that are not trained."""

import warnings

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["freeze_norm_scales", "set_norm_momentum"]


def set_norm_momentum(model: nn.Module, momentum: float) -> int:
    """Set the share that one step has in the running statistics of batch norm.

    Args:
        model: Its batch norms change.
        momentum: As PyTorch has it, 0 to 1: the larger, the shorter the memory.

    Returns:
        Number of norms changed; 0 comes with a warning.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = momentum
    _warn_if_none(len(norms), "norm_momentum")
    return len(norms)


def freeze_norm_scales(model: nn.Module) -> int:
    """Do not train the scales of batch norm: only its shifts (airbench94, arXiv 2404.00498).

    Returns:
        Number of norms changed; 0 comes with a warning.
    """
    norms = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine
    ]
    for norm in norms:
        norm.weight.requires_grad_(False)
    _warn_if_none(len(norms), "freeze_norm_scales")
    return len(norms)


def _warn_if_none(changed: int, key: str) -> None:
    if not changed:
        warnings.warn(f"{key}: the model has no batch norm; nothing changed", stacklevel=3)
