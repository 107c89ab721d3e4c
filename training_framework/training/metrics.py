"""Loss and accuracy, gathered on the device and read rarely."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ClassificationMetrics", "ClassificationSums"]

BATCHES_AT_ONCE = 64
MAX_WAITING_SCORES = 2**22


@dataclass(frozen=True, kw_only=True)
class ClassificationMetrics:
    """Means over the samples that were counted.

    Attributes:
        loss: Mean loss of a sample; NaN where no sample was counted.
        acc1: Top-1 accuracy in percent; NaN where no sample was counted.
        acc5: Top-5 accuracy in percent, top-k with k the number of classes where that is below 5;
            NaN where no sample was counted.
        count: Samples counted.
    """

    loss: float
    acc1: float
    acc5: float
    count: int


class ClassificationSums:
    """Running sums of loss, top-1 and top-5 hits and samples, on the device.

    `update` never waits for the device; `read` does, once, with one copy of a few numbers. Batches
    are kept and counted several at a time, since launching a dozen operations on a few numbers
    costs more than their work. `update` runs no operation until `BATCHES_AT_ONCE` are collected.

    A sample's rank is the number of classes that score above its label. A class that scores the
    same as the label stands above it if its index is lower. So a tie has one winner, the lowest
    index, as with torch.argmax on a CPU: a network whose output is constant scores what always
    answering class 0 scores, not 100% (which counting strictly higher scores alone would give it),
    and ties, which are frequent in bf16, are not all counted as wrong either. NaN stands above
    every number, and a label whose own score is NaN is never a hit.

    The sums are float64, so counts are exact and the loss is good to about 15 digits. On a device
    without float64 (mps) they are float32: counts are exact up to 16.7 million samples between two
    resets, and the loss loses digits as an interval grows.

    Args:
        device: Where the logits will be.
        num_classes: Classes of the logits.
    """

    def __init__(self, device: torch.device | str, *, num_classes: int) -> None:
        device = torch.device(device)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # Loss, top-1 hits, top-5 hits, samples: one tensor, so that reading is one copy.
        self._sums = torch.zeros(4, dtype=dtype, device=device)
        self._loss_sum = self._sums[0]
        self._hit_sums = self._sums[1:]
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._class_indices = torch.arange(num_classes, device=device)
        # A sample is a top-k hit if more than num_classes - k classes do not rank above its label
        # (the label included). More than -1 is true for every sample, so this counts them.
        self._thresholds = torch.tensor(
            [num_classes - 1, num_classes - min(5, num_classes), -1], device=device
        )

    def update(
        self, logits: Tensor, labels: Tensor, loss: Tensor, *, valid: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            logits: Class scores, shape (batch, num_classes), any floating dtype. They,
                labels and loss are kept for a while: change none of them in place.
            labels: Classes, shape (batch,), int64.
            loss: The samples' losses, shape (batch,), or their mean, a scalar tensor: with `valid`,
                the mean over the valid ones.
            valid: Which samples to count, shape (batch,), bool; unset: all. The rest is padding:
                its logits, labels (classes still) and losses change nothing, NaN included.
        """
        if valid is not None:
            self._count_valid(logits, labels, loss, valid)
            return
        self._waiting.append(
            (logits.detach(), labels, loss.detach() if loss.requires_grad else loss)
        )
        waiting_scores = len(self._waiting) * logits.numel()
        if len(self._waiting) == BATCHES_AT_ONCE or waiting_scores > MAX_WAITING_SCORES:
            self._count_waiting()

    @torch.no_grad()
    def count(
        self, logits: Tensor, labels: Tensor, loss: Tensor, *, valid: Tensor | None = None
    ) -> None:
        """Add a batch at once, so that a CUDA graph can hold it; see `update` for the arguments."""
        if valid is not None:
            self._count_valid(logits, labels, loss, valid)
            return
        not_above = self._not_above(logits, labels)
        hits = (not_above > self._thresholds).sum(dim=0)
        total = loss if loss.ndim == 0 else loss.sum(dtype=self._sums.dtype)
        self._hit_sums.add_(hits)
        self._loss_sum.add_(total, alpha=len(labels) if loss.ndim == 0 else 1)

    def _count_waiting(self) -> None:
        if not self._waiting:
            return
        logits, labels, losses = zip(*self._waiting, strict=True)
        self._waiting.clear()
        not_above = self._not_above(torch.cat(logits), torch.cat(labels))
        self._hit_sums.add_((not_above > self._thresholds).sum(dim=0))
        sizes = [len(batch) for batch in labels]
        if len(set(sizes)) == 1 and all(loss.ndim == 0 for loss in losses):
            total = torch.stack(losses).sum(dtype=self._sums.dtype)
            self._loss_sum.add_(total, alpha=sizes[0])
            return
        for loss, size in zip(losses, sizes, strict=True):
            if loss.ndim == 0:
                self._loss_sum.add_(loss, alpha=size)
            else:
                self._loss_sum.add_(loss.sum(dtype=self._sums.dtype))

    @torch.no_grad()
    def _count_valid(self, logits: Tensor, labels: Tensor, loss: Tensor, valid: Tensor) -> None:
        not_above = self._not_above(logits, labels)
        # Below every threshold: neither a hit nor a sample.
        not_above.masked_fill_(~valid.unsqueeze(1), -1)
        hits = (not_above > self._thresholds).sum(dim=0)
        self._hit_sums.add_(hits)
        if loss.ndim == 1:
            self._loss_sum.add_(loss.masked_fill(~valid, 0).sum(dtype=self._sums.dtype))
        else:
            valid_count = hits[-1]
            # The mean over no sample is NaN, and counts nothing.
            self._loss_sum.add_(torch.where(valid_count > 0, loss * valid_count, 0))

    def _not_above(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How many classes do not stand above each label, the label included: (batch, 1)."""
        labels = labels.unsqueeze(1)
        label_scores = logits.gather(1, labels)
        # Not torch.where: on a CPU it is slower for booleans than these.
        not_above = logits <= label_scores
        not_above &= self._class_indices >= labels
        not_above |= logits < label_scores
        return not_above.sum(dim=1, keepdim=True)

    def read(self) -> ClassificationMetrics:
        """The means so far. Waits for the device."""
        self._count_waiting()
        return _means(self._sums.tolist())

    def read_over_processes(self, *numbers: Tensor) -> tuple[ClassificationMetrics, list[float]]:
        """The means over all processes, and further numbers, by one copy. Waits for the device.

        As after `all_reduce`, call `reset` before the next `update`.

        Args:
            *numbers: Scalars on the device.
        """
        self.all_reduce()
        self._count_waiting()
        further = [number.detach().to(self._sums.dtype).view(1) for number in numbers]
        values = torch.cat([self._sums, *further]).tolist()
        return _means(values[:4]), values[4:]

    def reset(self) -> None:
        """Start again at zero."""
        self._waiting.clear()
        self._sums.zero_()

    def all_reduce(self) -> None:
        """Replace every rank's sums by the sums over all ranks, where torch.distributed runs.

        Call it once, before `read`, and `reset` before the next `update`: a second call would
        count the other ranks again.
        """
        if dist.is_available() and dist.is_initialized():
            self._count_waiting()
            dist.all_reduce(self._sums)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the sums, for a checkpoint in the middle of an interval."""
        self._count_waiting()
        return {"sums": self._sums.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from sums that `state_dict` returned, on any device."""
        self._waiting.clear()
        self._sums.copy_(state["sums"])


def _means(sums: Sequence[float]) -> ClassificationMetrics:
    loss_sum, hits1, hits5, count = sums
    if count == 0:
        return ClassificationMetrics(loss=math.nan, acc1=math.nan, acc5=math.nan, count=0)
    return ClassificationMetrics(
        loss=loss_sum / count,
        acc1=100 * hits1 / count,
        acc5=100 * hits5 / count,
        count=int(count),
    )
