"""Reads the training images that a whitening first convolution is made from."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from training_framework.data import BadImages, Dataset, EvalTransform
from training_framework.models.whitening import first_convolution, whiten_first_convolution
from training_framework.plan import PlannedRun
from training_framework.training.loaders import split_loader

__all__ = ["whiten"]

# Of 32 px they have two million patches, for a covariance of 27 values a side.
LARGEST_SAMPLE = 2000


def whiten(model: nn.Module, planned: PlannedRun, device: torch.device) -> None:
    """Set the filters of the first convolution, if the network has one; else do nothing.

    The images are drawn evenly over the classes by the plan's seed, and are not augmented. With
    several processes each reads its share; they train with the filters of the first one.

    Args:
        model: On the device.
        planned: Its data set is read.
        device: Where the images are normalized.

    Raises:
        UserError: An image cannot be read, and the run does not skip such images.
    """
    source, plan = planned.source, planned.plan
    if first_convolution(model) is None or not isinstance(source, Dataset):
        return
    count = min(len(source.train), LARGEST_SAMPLE)
    loader = split_loader(
        source.train.limited(count, seed=plan.seed),
        train=False,
        plan=plan,
        processes=planned.processes,
        device=device,
        # Images that the run skips are reported where it trains on them.
        bad_images=(
            BadImages(train=0, val=len(source.train), report=lambda line: None)
            if plan.on_bad_image == "skip"
            else None
        ),
    )
    transform = EvalTransform(
        mean=planned.facts.mean,
        std=planned.facts.std,
        device=device,
        channels_last=plan.channels_last,
    )

    def images() -> Iterator[Tensor]:
        for batch in loader.epoch(0):
            normalized, _ = transform(batch)
            yield normalized if batch.valid is None else normalized[batch.valid]

    try:
        whiten_first_convolution(model, images())
    finally:
        loader.close()
