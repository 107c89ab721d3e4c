"""Optimizers, their parameter groups, learning-rate schedules and weight averages."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

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
from training_framework.optimizers.lookahead import Lookahead
from training_framework.optimizers.muon import Muon
from training_framework.optimizers.parameter_groups import parameter_groups
from training_framework.optimizers.rates import TrainedFor, set_rates
from training_framework.schedules import SCHEDULES, Schedule, build_schedule

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "EvenAverage",
    "Lookahead",
    "Muon",
    "MuonOptions",
    "Schedule",
    "TrainedFor",
    "WeightAverage",
    "build_optimizer",
    "build_schedule",
    "has_fused_optimizer",
    "parameter_groups",
    "set_rates",
]

_FUSED_ON_CPU: dict[type[torch.optim.Optimizer], type[torch.optim.Optimizer]] = {
    torch.optim.SGD: FusedSGDOnCpu,
    torch.optim.Adam: FusedAdamOnCpu,
    torch.optim.AdamW: FusedAdamWOnCpu,
}
# The names in `config.schema` are those of the classes in lower case.
OPTIMIZERS = {kind.__name__.lower(): kind for kind in (*_FUSED_ON_CPU, Muon)}


class MuonOptions(NamedTuple):
    """What muon needs besides the options of the optimizer beside it; see `Muon`.

    Attributes:
        rest: Name of the optimizer of all parameters that are no convolution's weight.
        rest_lr: Its peak learning rate.
        momentum: Of the convolutions.
        iterations: Newton-Schulz iterations.
        normalize: Whether weights are scaled before an update.
    """

    rest: str = "sgd"
    rest_lr: float = 0.1
    momentum: float = 0.6
    iterations: int = 3
    normalize: bool = True


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
    bias_lr_factor: float = 1.0,
    trained_for: Mapping[nn.Parameter, TrainedFor] = MappingProxyType({}),
    muon: MuonOptions | None = None,
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of `model`.

    Args:
        model: The network, on the device it will train on.
        name: A key of OPTIMIZERS.
        lr: Peak learning rate, which a schedule multiplies.
        momentum: For sgd, also beside muon; the others ignore it.
        nesterov: Nesterov momentum, only for sgd.
        weight_decay: Weight decay: added to the gradient by sgd and adam, decoupled from it in
            adamw (arXiv 1711.05101) and muon.
        decay_norm_and_bias: Apply weight decay to norms and biases too; see `parameter_groups`.
        beta1: Decay of the first moment, for adam and adamw.
        beta2: Decay of the second moment, for adam and adamw.
        eps: Keeps the denominators of adam and adamw above zero.
        fused: Use torch's fused implementation: one pass over the weights instead of one per
            arithmetic operation. Otherwise, torch's foreach implementation. Muon has only the
            latter; this is for what is beside it.
        bias_lr_factor: Learning rate of norms and biases, as a multiple of the others'.
        trained_for: Parameters that are not trained to the end.
        muon: For muon only; None: its defaults.

    Raises:
        UserError: Unknown optimizer, nesterov without sgd or momentum, nothing to train, no
            convolution for muon, or fused on a device without such an implementation.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {name!r}", f"choose one of {', '.join(OPTIMIZERS)}")
    muon = muon or MuonOptions()
    rest_name = muon.rest if name == "muon" else name
    if nesterov and rest_name != "sgd":
        raise UserError(
            f"nesterov is for sgd but optimizer is {rest_name}", "remove nesterov or use sgd"
        )
    if nesterov and momentum == 0:
        raise UserError("nesterov needs momentum above 0", "raise momentum or remove nesterov")
    groups = parameter_groups(
        model,
        weight_decay=weight_decay,
        decay_norm_and_bias=decay_norm_and_bias,
        bias_lr_factor=bias_lr_factor,
        trained_for=trained_for,
        separate_convolutions=name == "muon",
    )
    if not groups:
        raise UserError("the model has no trainable parameter", "unfreeze a part of it")
    options: dict[str, Any] = {"lr": lr}
    if rest_name == "sgd":
        options |= {"momentum": momentum, "nesterov": nesterov}
    else:
        options |= {"betas": (beta1, beta2), "eps": eps}
    if name != "muon":
        return _torch_optimizer(name, groups, options, fused=fused)
    convolutions = [group for group in groups if group.pop("is_convolution", False)]
    others = groups[len(convolutions) :]
    if not convolutions:
        raise UserError("muon is for convolutions, and the model trains none", "use sgd or adamw")
    for group in others:
        group["lr_factor"] = group.get("lr_factor", 1.0) * muon.rest_lr / lr
    rest = _torch_optimizer(rest_name, others, options, fused=fused) if others else None
    return Muon(
        convolutions,
        rest,
        lr=lr,
        momentum=muon.momentum,
        iterations=muon.iterations,
        normalize=muon.normalize,
    )


def _torch_optimizer(
    name: str, groups: list[dict[str, Any]], options: dict[str, Any], *, fused: bool
) -> torch.optim.Optimizer:
    device_type = groups[0]["params"][0].device.type
    if fused and not has_fused_optimizer(name, device_type):
        raise UserError(
            f"fused_optimizer is on but this PyTorch has no fused {name} for {device_type}",
            "set fused_optimizer to auto or false",
        )
    kind = OPTIMIZERS[name]
    if fused and device_type == "cpu":
        return _FUSED_ON_CPU[kind](groups, fused=True, **options)  # type: ignore[call-arg]
    # foreach is explicit because fused=False alone selects the loop over single tensors.
    implementation = {"fused": True} if fused else {"foreach": True}
    optimizer = kind(groups, **implementation, **options)
    if name == "sgd" and fused and options["momentum"]:
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
        name: A key of OPTIMIZERS; for muon, the optimizer beside it counts.
        device_type: `cpu`, `cuda`, `mps`, ...
    """
    if name == "muon":
        return has_fused_optimizer("sgd", device_type)
    try:
        weight = torch.zeros(1, device=device_type, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        OPTIMIZERS[name]([weight], lr=1.0, fused=True).step()
    except (RuntimeError, NotImplementedError, AssertionError):
        # AssertionError: "Torch not compiled with CUDA enabled".
        return False
    return True
