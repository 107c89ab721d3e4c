"""The parts of a configured run, built as for training, to be driven by measurements."""

import torch

from training_framework.config import TrainConfig
from training_framework.data import Batch
from training_framework.errors import UserError
from training_framework.plan import plan_run
from training_framework.training.parts import Parts, build_parts

__all__ = ["build_profiled_parts", "step_on", "synchronize"]


def build_profiled_parts(config: TrainConfig) -> Parts:
    """Plan and build what `config` trains, in this process alone.

    Raises:
        UserError: Something that is asked for is wrong or cannot be done here.
    """
    planned = plan_run(config)
    if planned.plan.world_size > 1:
        raise UserError(
            f"profile: torchrun started {planned.plan.world_size} processes",
            "start it without torchrun: it measures one device",
        )
    return build_parts(planned)


def step_on(parts: Parts, batch: Batch) -> None:
    """An optimizer step on one loaded batch, taken as often as the run accumulates."""
    group = parts.plan.accumulate_grad_batches
    for position in range(group):
        images, labels, mixed = parts.loaders.train_transform(batch, step=0, epoch=0)
        parts.step.accumulate(
            images,
            labels,
            None if mixed is None else (mixed.other_labels, mixed.lam),
            group_size=group,
            last_of_group=position == group - 1,
        )
    # The weights stay where they are: one batch over and over would lead them astray.
    parts.step.update(0.0, step=0)


def synchronize(device: torch.device) -> None:
    """Wait for the device; the CPU is never ahead of itself."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
