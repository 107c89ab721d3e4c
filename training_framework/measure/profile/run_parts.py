"""The parts of a configured run, built as for training, for measurements."""

import torch

from training_framework.config import TrainConfig
from training_framework.data import Batch
from training_framework.errors import UserError
from training_framework.plan import plan_run
from training_framework.training.parts import Parts, build_parts

__all__ = ["build_profiled_parts", "step_on", "synchronize"]


def build_profiled_parts(config: TrainConfig, *, command: str = "profile") -> Parts:
    """Plan and build what `config` trains, in this process alone.

    Raises:
        UserError: A setting is wrong or cannot be used on this machine.
    """
    planned = plan_run(config)
    if planned.plan.world_size > 1:
        raise UserError(
            f"{command}: torchrun started {planned.plan.world_size} processes",
            f"start it without torchrun: {command} measures one device",
        )
    return build_parts(planned)


def step_on(parts: Parts, batch: Batch) -> None:
    """An optimizer step on one loaded batch, used as often as the run accumulates batches."""
    group = parts.plan.accumulate_grad_batches
    for position in range(group):
        inputs = parts.loaders.train_transform(batch, step=0, epoch=0)
        images, labels, mixed = inputs
        pair = None if mixed is None else (mixed.other_labels, mixed.lam)
        images, labels, pair = parts.select(images, labels, pair)
        parts.step.accumulate(
            images,
            labels,
            pair,
            group_size=group,
            last_of_group=position == group - 1,
        )
    # A rate of 0 keeps the weights: training on one batch again and again would spoil them.
    parts.step.update(0.0, step=0)


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU needs no waiting."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
