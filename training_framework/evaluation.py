"""Evaluate a model: every sample once, whatever the number of processes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training_framework.data import Batch, Loader
from training_framework.loss import per_sample_losses
from training_framework.metrics import ClassificationMetrics, ClassificationSums
from training_framework.precision import Precision, autocast

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found, and how long it took (all ranks, loading included)."""

    metrics: ClassificationMetrics
    seconds: float


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    transform: Callable[[Batch], tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    num_classes: int,
    precision: Precision,
) -> Evaluation:
    """Loss (without label smoothing), top-1 and top-5 over a split.

    Each rank counts its own share of the samples and the sums are added up: nothing is padded,
    and no rank waits for another within the pass. The device is waited for once, at the end.

    Args:
        model: The network itself, not wrapped in DDP: ranks may have different numbers of batches.
        loader: Yields this rank's share once.
        transform: From a batch to normalized images and labels.
        device: Where the model is.
        num_classes: Classes of the logits.
        precision: What the forward pass computes in.
    """
    start = time.perf_counter()
    was_training = model.training
    model.eval()
    sums = ClassificationSums(device, num_classes=num_classes)
    try:
        for batch in loader.epoch(0):
            images, labels = transform(batch)
            with autocast(device.type, precision):
                logits = model(images)
            sums.update(logits, labels, per_sample_losses(logits, labels))
    finally:
        model.train(was_training)
    sums.all_reduce()
    return Evaluation(metrics=sums.read(), seconds=time.perf_counter() - start)
