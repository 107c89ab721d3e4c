"""Count the loss and hits of an evaluation's batches: in parts that fit, and recorded on a GPU."""

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from training_framework.data import Batch
from training_framework.errors import UserError
from training_framework.machine.memory_shortage import memory_shortage
from training_framework.machine.precision import Precision, autocast
from training_framework.training.loss import per_sample_losses
from training_framework.training.metrics import ClassificationSums
from training_framework.training.recording import Record, reason_of, root_cause
from training_framework.training.test_time_augmentation import (
    TestTimeAugmentation,
    averaged_logits,
)

__all__ = ["BatchCounter", "Transform"]

# An estimate: recording takes as long as the launches of about so many forward passes.
RECORD_AFTER_BATCHES = 32

Transform = Callable[[Batch], tuple[Tensor, Tensor]]
"""From a batch to normalized images and labels."""


class BatchCounter:
    """Computes batches with a network in evaluation mode, and sums up loss and hits.

    A batch that does not fit in memory is divided, and so are all that follow: without batch
    statistics the parts give the same results. With `record`, the forward pass of batches of one
    size is recorded once enough of them have passed, and replayed; other batches run normally.

    Args:
        model: The network itself, not wrapped in DDP.
        transform: Its input; when recorded, a function of the batch's tensors alone.
        device: Where the model is.
        num_classes: Classes of the logits.
        precision: What the forward pass computes in.
        tta: Test-time augmentation whose accuracy is measured too.
        record: How the forward pass is recorded; None: it is not.

    Attributes:
        sums: What was counted.
        sums_tta: The same with test-time augmentation; None without it.
        max_images: Maximum images of a forward pass; None: no limit.
        report: Shows a line to the user; a warning, unless set.
    """

    def __init__(
        self,
        model: nn.Module,
        transform: Transform,
        *,
        device: torch.device,
        num_classes: int,
        precision: Precision,
        tta: TestTimeAugmentation = "none",
        record: Record | None = None,
    ) -> None:
        self.model = model
        self.sums = ClassificationSums(device, num_classes=num_classes)
        self._tta: TestTimeAugmentation = tta
        self.sums_tta: ClassificationSums | None = None
        if tta != "none":
            self.sums_tta = ClassificationSums(device, num_classes=num_classes)
        self.max_images: int | None = None
        self.report: Callable[[str], None] = _warn
        self._transform = transform
        self._device = device
        self._precision: Precision = precision
        self._record = record
        self._replay: Callable[[], None] | None = None
        self._recorded: Batch | None = None  # the memory that a replay reads
        self._seen: Counter[tuple[torch.Size, torch.dtype]] = Counter()

    def reset(self) -> None:
        """Start again at zero."""
        self.sums.reset()
        if self.sums_tta is not None:
            self.sums_tta.reset()

    def count(self, batch: Batch) -> None:
        """Add a batch to the sums. Does not wait for the device, unless it records.

        Raises:
            UserError: Memory is too small for one image.
        """
        start, images = 0, len(batch.labels)
        while start < images:
            stop = min(images, start + (self.max_images or images))
            part = batch if stop - start == images else _rows(batch, start, stop)
            try:
                self._count(part)
            except (RuntimeError, MemoryError) as error:
                shortage = memory_shortage(error)
                if shortage is None:
                    raise
            else:
                start = stop
                continue
            # Outside the handler, so that no traceback keeps the memory alive.
            self._make_room(shortage, stop - start)

    def limit(self, max_images: int | None) -> None:
        """Compute at most so many images at once from now on; None: as many as so far."""
        if max_images is not None:
            self.max_images = min(self.max_images or max_images, max_images)

    def _make_room(self, shortage: str, at_once: int) -> None:
        if at_once == 1:
            raise UserError(
                f"memory is full in an evaluation with one image at once: {shortage}",
                "lower batch_size or img_size: training takes memory from the evaluation",
            )
        self.max_images = (at_once + 1) // 2
        self._forget_recording()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.report(
            f"note: memory is full in an evaluation with {at_once} images at once; from now on "
            f"it computes at most {self.max_images} (the results are the same)"
        )

    def _count(self, batch: Batch) -> None:
        if self._replays(batch):
            recorded = self._recorded
            assert recorded is not None and self._replay is not None
            recorded.images.copy_(batch.images, non_blocking=True)
            recorded.labels.copy_(batch.labels, non_blocking=True)
            self._replay()
        else:
            self._compute(batch)

    def _compute(self, batch: Batch) -> None:
        images, labels = self._transform(batch)
        with autocast(self._device.type, self._precision):
            logits = self.model(images)
            if self.sums_tta is not None:
                views = averaged_logits(self.model, images, logits, self._tta)
        losses = per_sample_losses(logits, labels)
        self.sums.count(logits, labels, losses, valid=batch.valid)
        if self.sums_tta is not None:
            self.sums_tta.count(views, labels, losses, valid=batch.valid)

    def _replays(self, batch: Batch) -> bool:
        if self._record is None or batch.valid is not None:
            return False
        kind = (batch.images.shape, batch.images.dtype)
        if self._recorded is not None:
            return kind == (self._recorded.images.shape, self._recorded.images.dtype)
        self._seen[kind] += 1
        return self._seen[kind] > RECORD_AFTER_BATCHES and self._record_batch(batch)

    def _record_batch(self, batch: Batch) -> bool:
        """Record the forward pass; afterwards, a failed recording is not tried again."""
        assert self._record is not None
        self._recorded = batch._replace(images=batch.images.clone(), labels=batch.labels.clone())
        recorded = self._recorded
        try:
            self._replay = self._record(lambda: self._compute(recorded))
            return True
        except RuntimeError as error:
            reason = reason_of(root_cause(error))
        self._forget_recording()
        self._record = None
        self.report(f"note: the evaluation cannot be recorded: {reason}; it runs without")
        return False

    def _forget_recording(self) -> None:
        self._recorded = self._replay = None
        self._seen.clear()


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    valid = None if batch.valid is None else batch.valid[start:stop]
    images, labels, indices = (part[start:stop] for part in batch[:3])
    return Batch(images, labels, indices, valid)


def _warn(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=2)
