"""Cross-entropy of class logits, in fp32 whatever precision the network computes in."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MixedWith", "StepInput", "classification_loss", "per_sample_losses"]

MixedWith = tuple[Tensor, Tensor]
"""Of mixed images: the other labels, (N,) int64, and the own labels' share, a scalar."""

StepInput = tuple[Tensor, Tensor, MixedWith | None]
"""Of a step: images, (N, C, H, W) float; labels, (N,) int64; the other labels, if mixed."""


def _at_least_fp32(logits: Tensor) -> Tensor:
    # The log-sum-exp of bf16 logits keeps two to three digits: too few for a loss.
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    mixed: tuple[Tensor, Tensor | float] | None = None,
) -> Tensor:
    """Cross-entropy, its mean over the batch, with smoothed and mixed labels.

    With mixed labels it equals torch's cross_entropy against the soft labels
    `lam * one_hot(labels) + (1 - lam) * one_hot(other_labels)`, without making them.

    Args:
        logits: Class scores, shape (batch, classes), any floating dtype.
        labels: Classes, shape (batch,), int64.
        label_smoothing: Share of the label that is spread evenly over all classes, 0 to 1
            (Szegedy et al., arXiv 1512.00567, section 7).
        mixed: For images mixed by mixup or cutmix (arXiv 1710.09412, 1905.04899): the other
            images' classes, shape (batch,), and lam, the share of `labels` in the mixture.

    Returns:
        The loss, a scalar tensor: fp32, or fp64 for fp64 logits.
    """
    logits = _at_least_fp32(logits)
    if mixed is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    other_labels, lam = mixed
    log_probabilities = F.log_softmax(logits, dim=1)
    loss = lam * F.nll_loss(log_probabilities, labels)
    loss = loss + (1 - lam) * F.nll_loss(log_probabilities, other_labels)
    if label_smoothing == 0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * log_probabilities.mean()


def per_sample_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every sample, as evaluation counts it: no smoothing, nothing mixed.

    Args:
        logits: Class scores, shape (batch, classes), any floating dtype.
        labels: Classes, shape (batch,), int64.

    Returns:
        The losses, shape (batch,): fp32, or fp64 for fp64 logits.
    """
    return F.cross_entropy(_at_least_fp32(logits), labels, reduction="none")
