"""From a configuration and a plan to the network, on its device and changed as planned."""

import torch
from torch import nn

from training_framework.config import TrainConfig
from training_framework.models import build_model, load_weights
from training_framework.plan import TrainPlan
from training_framework.switches import change_network

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
    model.to(device)
    lines = change_network(
        model,
        plan.switch_values(),
        image_size=plan.image_size,
        device_type=device.type,
        asked={key for key in plan.switch_values() if getattr(config, key) != "auto"},
    )
    return model, lines
