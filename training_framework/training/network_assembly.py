"""From a plan to the network, on its device and changed as planned."""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import nn

from training_framework.errors import UserError
from training_framework.kernels import NativeKernelsError
from training_framework.models import (
    build_model,
    checkpoint_activations,
    fuse_norms,
    keep_small_maps_from_compiler,
    load_weights,
    synchronize_norms,
    use_small_map_convolutions,
    use_winograd_convolutions,
)
from training_framework.plan import TrainPlan

__all__ = ["assemble_network", "prepare_network"]


def assemble_network(
    plan: TrainPlan, device: torch.device, *, with_weights: bool = True
) -> tuple[nn.Module, list[str]]:
    """The network on its device, changed as planned, and lines to show the user.

    Args:
        plan: Which network, and how it is changed.
        device: Where it goes.
        with_weights: Whether the plan's `weights` are wanted.
    """
    model: nn.Module = build_model(
        plan.model,
        num_classes=plan.num_classes,
        stem=plan.stem,
        share_early_weights=plan.share_early_weights,
        zero_init_last_norm=plan.zero_init_last_norm,
    )
    lines = load_weights(model, plan.weights) if plan.weights and with_weights else []
    return prepare_network(plan, model, device), lines


def prepare_network(plan: TrainPlan, model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to its device and change it as planned; its parameters keep their names.

    Raises:
        UserError: Kernels that the plan has cannot be compiled here.
    """
    if plan.small_map_convolutions:
        use_small_map_convolutions(model, plan.image_size)
        if plan.compile:
            keep_small_maps_from_compiler()
    if plan.winograd_convolutions:
        change = functools.partial(use_winograd_convolutions, model, plan.image_size)
        _with_kernels(plan, "winograd_convolutions", change)
    if plan.synchronize_norms:
        synchronize_norms(model, device.type)
    if plan.fused_norms:
        _with_kernels(plan, "fused_norms", functools.partial(fuse_norms, model))
    if plan.activation_checkpointing:
        checkpoint_activations(model)
    model.to(device)
    if plan.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _with_kernels(plan: TrainPlan, key: str, change: Callable[[], object]) -> None:
    """Make a change that needs compiled kernels.

    Where nobody asked for it, it may find nothing to change, as in a very narrow network.
    """
    try:
        with warnings.catch_warnings():
            if key not in plan.asked_for:
                warnings.filterwarnings("ignore", message=".*nothing changed")
            change()
    except NativeKernelsError as error:
        cure = f"install a C++ compiler (g++), or set {key} to false"
        raise UserError(f"{key}: {error}", cure) from None
