"""The batches that loaders yield, and the interface of loaders."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Batch", "Loader", "prefetch_to_device"]


class Batch(NamedTuple):
    """One batch of this process.

    Attributes:
        images: (N, C, H, W); uint8 in channels_last order from the loaders of this package, float
            from a user's own loader.
        labels: (N,) int64.
        indices: (N,) int64, positions in the split.
        valid: (N,) bool, which samples count in an evaluation; None: all. The others could not be
            decoded, and their pixels are zero.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    valid: Tensor | None = None


class Loader(Protocol):
    """The interface that training and evaluation require of a loader."""

    @property
    def batch_count(self) -> int:
        """Batches per whole epoch on this rank."""

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch on the device, from `start_batch` on."""

    def close(self) -> None:
        """Release processes and memory; the loader can be used again."""


def prefetch_to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Move host batches to the device without making it wait.

    On CUDA, the next batch is copied on a separate stream during the computation on the current
    one; batches in pinned memory are copied asynchronously. Elsewhere, each batch is moved as it
    arrives.
    """
    if device.type != "cuda":
        for batch in batches:
            yield _moved(batch, device)
        return
    copies = torch.cuda.Stream(device)
    ahead: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            following = _moved(batch, device)
        if ahead is not None:
            yield ahead
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(copies)
        for tensor in following:
            # The memory belongs to the copying stream, which must not reuse it during the
            # computation.
            if tensor is not None:
                tensor.record_stream(compute)
        ahead = following
    if ahead is not None:
        yield ahead


def _moved(batch: Batch, device: torch.device) -> Batch:
    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    valid = None if batch.valid is None else there(batch.valid)
    return Batch(there(batch.images), there(batch.labels), there(batch.indices), valid)
