"""Computes a step's passes once for every image size before the run's first step.

The first batch of a new shape is slow on a GPU: kernels are chosen and compiled for it. Progressive
resolution would pay that in the middle of the run, where its clock is read.
"""

import torch

from training_framework.plan import TrainPlan
from training_framework.training.micro_batching import StepStart
from training_framework.training.step import TrainStep

__all__ = ["warm_up_shapes"]


def warm_up_shapes(step: TrainStep, plan: TrainPlan, device: torch.device) -> int:
    """Run forward and backward on zeros of each size of the plan; everything stays as it was.

    It does nothing where all sizes are equal, and on a CPU without torch.compile, where the first
    batch of a shape is like any other.

    Args:
        step: At the start of the run, or of its resumption.
        plan: The sizes.
        device: Where the network is.

    Returns:
        Shapes that were computed.
    """
    if plan.resolutions is None or (device.type == "cpu" and not plan.compile):
        return 0
    count = plan.device_batch_size
    if plan.train_on_hardest:
        count = max(1, round(plan.train_on_hardest * count))
    layout = torch.channels_last if plan.channels_last else torch.contiguous_format
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    mixed = (labels, torch.ones((), device=device)) if plan.mixup or plan.cutmix else None
    sizes = sorted({size for _, size in plan.resolutions.sizes})
    was_training = step.model.training
    step.model.train()
    start = StepStart(step, device)
    start.keep()
    for size in sizes:
        images = torch.zeros(count, 3, size, size, device=device).contiguous(memory_format=layout)
        step.accumulate(images, labels, mixed, last_of_group=False)
        start.restore()
    step.model.train(was_training)
    return len(sizes)
