"""From a plan to the network, on its device and changed as planned."""

import torch
from torch import nn

from training_framework.models import build_model, load_weights
from training_framework.plan import TrainPlan
from training_framework.switches import change_network

__all__ = ["assemble_network", "prepare_network"]


def assemble_network(
    plan: TrainPlan, device: torch.device, *, with_weights: bool = True
) -> tuple[nn.Module, list[str]]:
    """The network on its device, changed as planned, and lines to show the user.

    Args:
        plan: Which network, and how it is changed.
        device: Where it goes.
        with_weights: Whether to load the plan's `weights`.
    """
    model: nn.Module = build_model(
        plan.model,
        num_classes=plan.num_classes,
        stem=plan.stem,
        share_early_weights=plan.share_early_weights,
        zero_init_last_norm=plan.zero_init_last_norm,
        dirac_init=plan.dirac_init,
        variation=plan.variation,
    )
    lines = load_weights(model, plan.weights) if plan.weights and with_weights else []
    return prepare_network(plan, model, device), lines


def prepare_network(plan: TrainPlan, model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to its device and change it as planned; its parameters keep their names.

    Raises:
        UserError: Kernels that the plan has cannot be compiled here.
    """
    model.to(device)
    change_network(
        model,
        plan.switch_values(),
        image_size=plan.image_size,
        device_type=device.type,
        asked_for=plan.asked_for,
    )
    return model
