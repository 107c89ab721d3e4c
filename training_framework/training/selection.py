"""Trains on the hardest images of each batch: those with the largest loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from training_framework.machine.distributed import share_buffers
from training_framework.machine.precision import autocast
from training_framework.plan import TrainPlan
from training_framework.training.loss import MixedWith, per_sample_losses
from training_framework.training.step import TrainStep

__all__ = ["HardestImages", "Select", "all_images", "hardest"]

Select = Callable[[Tensor, Tensor, MixedWith | None], tuple[Tensor, Tensor, MixedWith | None]]
"""From images, labels and the other labels of mixed images to those that are trained on."""


def all_images(
    images: Tensor, labels: Tensor, mixed: MixedWith | None
) -> tuple[Tensor, Tensor, MixedWith | None]:
    """The whole batch."""
    return images, labels, mixed


def hardest(losses: Tensor, share: float) -> Tensor:
    """Positions of the largest losses, in their order in the batch: (n,) int64, at least one.

    Args:
        losses: (N,) float.
        share: n as a share of N, above 0; n is rounded.
    """
    count = max(1, round(share * len(losses)))
    return losses.argsort(descending=True, stable=True)[:count].sort().values


class HardestImages:
    """Chooses from each batch, by a forward pass of the network as it is.

    The pass is in evaluation mode, so that it changes no statistics and draws nothing. A batch is
    computed in parts where training does so too.

    Args:
        step: Whose network judges.
        plan: Gives the share and the precision.
        device_type: Of the network's device.
    """

    def __init__(self, step: TrainStep, plan: TrainPlan, device_type: str) -> None:
        self._step = step
        self._share = plan.train_on_hardest
        self._precision = plan.precision
        self._device_type = device_type

    @torch.no_grad()
    def __call__(
        self, images: Tensor, labels: Tensor, mixed: MixedWith | None
    ) -> tuple[Tensor, Tensor, MixedWith | None]:
        """The chosen images, (n, C, H, W), their labels, and their other labels if mixed."""
        with self._step.phase("forward"):
            chosen = hardest(self._losses(images, labels, mixed), self._share)
            is_channels_last = images.is_contiguous(memory_format=torch.channels_last)
            images = images.index_select(0, chosen)
            if is_channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            labels = labels.index_select(0, chosen)
            if mixed is not None:
                mixed = (mixed[0].index_select(0, chosen), mixed[1])
        return images, labels, mixed

    def _losses(self, images: Tensor, labels: Tensor, mixed: MixedWith | None) -> Tensor:
        network = self._step.network
        # Every rank has norm statistics of its own, and a checkpoint has only rank 0's: with others
        # a resumed run would choose other images.
        share_buffers(network)
        network.eval()
        parts = images.split(self._step.micro_batch_size or len(images))
        with autocast(self._device_type, self._precision):
            logits = torch.cat([network(part) for part in parts])
        network.train()
        losses = per_sample_losses(logits, labels)
        if mixed is None:
            return losses
        other_labels, lam = mixed
        return lam * losses + (1 - lam) * per_sample_losses(logits, other_labels)
