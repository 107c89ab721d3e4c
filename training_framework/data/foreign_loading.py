"""A user's own loader behind the interface of ours."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from training_framework.data.batch import Batch, prefetch_to_device
from training_framework.errors import UserError

__all__ = ["ForeignLoader"]


class ForeignLoader:
    """Wraps any sized iterable of (float images NCHW, int labels), such as a torch DataLoader.

    The samples' positions in the split are unknown; `indices` counts them as they come.

    Args:
        loader: Yields (images, labels, ...) and has a length. Where its sampler has a `set_epoch`,
            as DistributedSampler has, that is called.
        device: Where the batches are wanted.
        num_classes: Labels must be below it, where given.
        channels: Channels that the images must have.

    Raises:
        UserError: The loader has no length.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        device: torch.device | str,
        num_classes: int | None = None,
        channels: int = 3,
    ) -> None:
        try:
            self.batch_count = len(loader)  # type: ignore[arg-type]
        except TypeError:
            raise UserError(
                f"the {type(loader).__name__} has no length",
                "pass a loader whose len() is its number of batches",
            ) from None
        self._loader = loader
        self._device = torch.device(device)
        self._num_classes = num_classes
        self._channels = channels

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch; the first `start_batch` are loaded and passed over.

        Raises:
            UserError: A batch is not (float images NCHW, int labels).
        """
        for name in ("sampler", "batch_sampler"):
            set_epoch = getattr(getattr(self._loader, name, None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        return prefetch_to_device(islice(self._host_batches(), start_batch, None), self._device)

    def close(self) -> None:
        """Nothing: the user's loader is the user's to close."""

    def _host_batches(self) -> Iterator[Batch]:
        seen = 0
        for number, item in enumerate(self._loader):
            images, labels = self._checked(number, item)
            indices = torch.arange(seen, seen + len(labels), device=self._device)
            seen += len(labels)
            yield Batch(images, labels, indices)

    def _checked(self, number: int, item: Any) -> tuple[Tensor, Tensor]:
        where = f"batch {number} of the {type(self._loader).__name__}"
        if not (isinstance(item, (tuple, list)) and len(item) >= 2):
            raise UserError(f"{where} is a {type(item).__name__}", "yield (images, labels)")
        images, labels = item[0], item[1]
        if not (isinstance(images, Tensor) and isinstance(labels, Tensor)):
            raise UserError(
                f"{where} holds {type(images).__name__} and {type(labels).__name__}",
                "yield two tensors",
            )
        if not images.is_floating_point():
            raise UserError(
                f"{where}: the images are {images.dtype}", "make them float and normalized"
            )
        if images.ndim != 4 or images.shape[1] != self._channels:
            raise UserError(
                f"{where}: the images have shape {tuple(images.shape)}",
                f"yield (N, {self._channels}, H, W)",
            )
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise UserError(
                f"{where}: the labels are {labels.dtype} of shape {tuple(labels.shape)}",
                f"yield {len(images)} integers",
            )
        self._check_range(number, where, labels)
        images = images.float() if images.dtype == torch.float64 else images
        # Labels are counted some batches later; a loader may fill the same tensor again by then.
        return images, labels.to(torch.int64, copy=True)

    def _check_range(self, number: int, where: str, labels: Tensor) -> None:
        # Reading labels that are on an accelerator waits for it, which one batch can afford.
        if self._num_classes is None or (number > 0 and labels.device.type != "cpu"):
            return
        wrong = labels[(labels < 0) | (labels >= self._num_classes)]
        if len(wrong):
            raise UserError(
                f"{where}: label {int(wrong[0])} is not in 0..{self._num_classes - 1}",
                "number the classes from 0, or set num_classes",
            )
