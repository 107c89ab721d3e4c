"""Optimizers, their parameter groups, learning-rate schedules and weight averages."""

import functools
from typing import Any

import torch
from torch import nn

from training_framework.errors import UserError
from training_framework.optimizers.averaging import WeightAverage
from training_framework.optimizers.even_average import EvenAverage
from training_framework.optimizers.fused_on_cpu import (
    FusedAdamOnCpu,
    FusedAdamWOnCpu,
    FusedSGDOnCpu,
)
from training_framework.optimizers.parameter_groups import parameter_groups
from training_framework.schedules import SCHEDULES, Schedule, build_schedule

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "EvenAverage",
    "Schedule",
    "WeightAverage",
    "build_optimizer",
    "build_schedule",
    "has_fused_optimizer",
    "parameter_groups",
]

# The names in `config.schema` are those of the classes in lower case.
_CLASSES: dict[type[torch.optim.Optimizer], type[torch.optim.Optimizer]] = {
    torch.optim.SGD: FusedSGDOnCpu,
    torch.optim.Adam: FusedAdamOnCpu,
    torch.optim.AdamW: FusedAdamWOnCpu,
}
OPTIMIZERS = {kind.__name__.lower(): kind for kind in _CLASSES}


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay_norm_and_bias: bool = False,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """A torch optimizer over the trainable parameters of `model`.

    Args:
        model: The network, on the device it will train on.
        name: A key of OPTIMIZERS.
        lr: Peak learning rate, which a schedule multiplies.
        momentum: For sgd; the others ignore it.
        nesterov: Nesterov momentum, only for sgd.
        weight_decay: Weight decay: added to the gradient by sgd and adam, decoupled from it in
            adamw (arXiv 1711.05101).
        decay_norm_and_bias: Apply weight decay to norms and biases too; see `parameter_groups`.
        beta1: Decay of the first moment, for adam and adamw.
        beta2: Decay of the second moment, for adam and adamw.
        eps: Keeps the denominators of adam and adamw above zero.
        fused: Use torch's fused implementation: one pass over the weights instead of one per
            arithmetic operation. Otherwise, torch's foreach implementation.

    Raises:
        UserError: Unknown optimizer, nesterov without sgd or momentum, nothing to train, or fused
            on a device without such an implementation.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {name!r}", f"choose one of {', '.join(OPTIMIZERS)}")
    if nesterov and name != "sgd":
        raise UserError(
            f"nesterov is for sgd but optimizer is {name}", "remove nesterov or use sgd"
        )
    if nesterov and momentum == 0:
        raise UserError("nesterov needs momentum above 0", "raise momentum or remove nesterov")
    groups = parameter_groups(
        model, weight_decay=weight_decay, decay_norm_and_bias=decay_norm_and_bias
    )
    if not groups:
        raise UserError("the model has no trainable parameter", "unfreeze a part of it")
    device_type = groups[0]["params"][0].device.type
    if fused and not has_fused_optimizer(name, device_type):
        raise UserError(
            f"fused_optimizer is on but this PyTorch has no fused {name} for {device_type}",
            "set fused_optimizer to auto or false",
        )
    # foreach is explicit because fused=False alone selects the loop over single tensors.
    options: dict[str, Any] = {"lr": lr, "fused": True} if fused else {"lr": lr, "foreach": True}
    if name == "sgd":
        options |= {"momentum": momentum, "nesterov": nesterov}
    else:
        options |= {"betas": (beta1, beta2), "eps": eps}
    if fused and device_type == "cpu":
        return _CLASSES[OPTIMIZERS[name]](groups, **options)
    optimizer = OPTIMIZERS[name](groups, **options)
    if name == "sgd" and fused and momentum:
        _start_momentum_at_zero(optimizer)
    return optimizer


def _start_momentum_at_zero(optimizer: torch.optim.Optimizer) -> None:
    """Make the first step like any other.

    torch's fused SGD allocates its momentum in the first step. If fp16's gradient scaling skips
    that step, which is common, the momentum stays uninitialized. Zeros give the same numbers as
    torch's own first step: momentum * 0 + gradient.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


@functools.cache
def has_fused_optimizer(name: str, device_type: str) -> bool:
    """Whether torch's fused implementation of the optimizer runs on that type of device.

    It is tried with one step of one weight: torch's own list of devices is private, and the
    optimizers got their kernels in different versions.

    Args:
        name: A key of OPTIMIZERS.
        device_type: `cpu`, `cuda`, `mps`, ...
    """
    try:
        weight = torch.zeros(1, device=device_type, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        OPTIMIZERS[name]([weight], lr=1.0, fused=True).step()  # type: ignore[call-arg]
    except (RuntimeError, NotImplementedError, AssertionError):
        # AssertionError: "Torch not compiled with CUDA enabled".
        return False
    return True
