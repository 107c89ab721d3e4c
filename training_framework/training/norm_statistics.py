"""New batch-norm statistics for a network whose weights were averaged, not trained."""

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor, nn

from training_framework.data import Batch, Loader, MixedLabels
from training_framework.machine.precision import Precision, autocast

__all__ = ["recompute_norms"]


@torch.no_grad()
def recompute_norms(
    model: nn.Module,
    loader: Loader,
    transform: Callable[..., tuple[Tensor, Tensor, MixedLabels | None]],
    *,
    batches: int,
    epoch: int,
    device_type: str,
    precision: Precision,
) -> None:
    """Replace the running statistics of all batch norms by their mean over training batches.

    The result depends only on the weights and on the arguments, not on the statistics before or
    on the number of evaluations, so a resumed run gets the same.

    Args:
        model: It is changed in place, and ends in the mode that it is in.
        loader: Of the training set.
        transform: As in training: from a batch, with `step` and `epoch`, to images.
        batches: How many to use; all of an epoch where it has fewer.
        epoch: Whose order, draws and image size are used.
        device_type: Of the model's device.
        precision: What the forward pass computes in.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    momenta, was_training = [norm.momentum for norm in norms], model.training
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        taken = islice(loader.epoch(epoch), batches)
        for number, batch in enumerate(taken):
            for norm in norms:  # so that the batches count equally
                norm.momentum = 1 / (number + 1)
            images = _images(transform, batch, number, epoch)
            with autocast(device_type, precision):
                model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(was_training)


def _images(
    transform: Callable[..., tuple[Tensor, Tensor, MixedLabels | None]],
    batch: Batch,
    step: int,
    epoch: int,
) -> Tensor:
    return transform(batch, step=step, epoch=epoch)[0]
