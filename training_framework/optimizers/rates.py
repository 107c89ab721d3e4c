"""The learning rate of each parameter group at a step."""

from typing import NamedTuple

import torch

__all__ = ["TrainedFor", "set_rates"]


class TrainedFor(NamedTuple):
    """How long a parameter is trained.

    Attributes:
        steps: Optimizer steps until its rate, which falls linearly from the start, is zero.
        then_freezes: Whether the backward pass leaves it out from then on. Not with DDP, which
            waits for its gradient, nor with torch.compile, which would compile again.
    """

    steps: int
    then_freezes: bool


def set_rates(optimizer: torch.optim.Optimizer, lr: float, step: int) -> None:
    """Set the learning rates of a step; the gradients of what is no longer trained are dropped.

    Args:
        optimizer: Its groups may have `lr_factor`, a multiple of `lr`, and the values of a
            `TrainedFor`, as `trained_steps` and `then_freezes`.
        lr: Learning rate of a group without these.
        step: Optimizer steps made before.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"] if "lr_factor" in group else lr
        if "trained_steps" in group:
            group["lr"] *= max(0.0, 1 - step / max(1, group["trained_steps"]))
            if step >= group["trained_steps"]:
                for parameter in group["params"]:
                    parameter.grad = None
                    parameter.requires_grad_(not group["then_freezes"])
