"""From a configuration and a plan to the network, on its device and changed as planned."""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import nn

from training_framework.config import TrainConfig
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
    config: TrainConfig, plan: TrainPlan, device: torch.device
) -> tuple[nn.Module, list[str]]:
    """The network on its device, changed as planned, and lines to show the user."""
    model: nn.Module = build_model(
        config.model,
        num_classes=plan.num_classes,
        stem=plan.stem,
        share_early_weights=config.share_early_weights,
        zero_init_last_norm=config.zero_init_last_norm,
    )
    loaded = load_weights(model, config.weights) if config.weights else []
    model, changed = prepare_network(config, plan, model, device)
    return model, [*loaded, *changed]


def prepare_network(
    config: TrainConfig, plan: TrainPlan, model: nn.Module, device: torch.device
) -> tuple[nn.Module, list[str]]:
    """Move a network to its device and change it as planned; its parameters keep their names.

    Returns:
        The network, and lines to show the user.

    Raises:
        UserError: Kernels that are asked for cannot be compiled here.
    """
    lines: list[str] = []
    if plan.small_map_convolutions:
        use_small_map_convolutions(model, plan.image_size)
        if plan.compile:
            keep_small_maps_from_compiler()
    if plan.winograd_convolutions:
        change = functools.partial(use_winograd_convolutions, model, plan.image_size)
        lines += _with_kernels(config, "winograd_convolutions", change)
    if plan.synchronize_norms:
        synchronize_norms(model, device.type)
    if plan.fused_norms:
        lines += _with_kernels(config, "fused_norms", functools.partial(fuse_norms, model))
    if config.activation_checkpointing:
        checkpoint_activations(model)
    model.to(device)
    if plan.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, lines


def _with_kernels(config: TrainConfig, key: str, change: Callable[[], object]) -> list[str]:
    """Make a change that needs compiled kernels; where nobody asked for it, go on without them.

    Where nobody asked for it, it may also find nothing to change, as in a very narrow network.

    Returns:
        Lines to show the user.
    """
    asked_for = getattr(config, key) != "auto"
    try:
        with warnings.catch_warnings():
            if not asked_for:
                warnings.filterwarnings("ignore", message=".*nothing changed")
            change()
    except NativeKernelsError as error:
        if asked_for:
            cure = f"install a C++ compiler (g++), or set {key} to auto"
            raise UserError(f"{key}: {error}", cure) from None
        return [f"note: goes on without {key}: {error}"]
    return []
