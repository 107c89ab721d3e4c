"""What a loader yields, and what every loader can do."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Batch", "Loader", "prefetch_to_device"]


class Batch(NamedTuple):
    """One batch of this process.

    Attributes:
        images: (N, C, H, W); uint8 from the loaders of this package, float from a user's own. uint8
            images lie in channels_last order.
        labels: (N,) int64.
        indices: (N,) int64, positions in the split.
        valid: (N,) bool, which samples count in an evaluation; None: all. The others could not be
            decoded, and their images hold nothing.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    valid: Tensor | None = None


class Loader(Protocol):
    """What the loops need of a loader."""

    @property
    def batch_count(self) -> int:
        """Batches of a whole epoch on this rank."""

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch on the device, from `start_batch` on."""

    def close(self) -> None:
        """Let go of processes and memory; the loader may be used again after it."""


def prefetch_to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Move host batches to the device without making it wait.

    On CUDA the next batch is copied on a stream of its own while the current one is computed with;
    batches in pinned memory are copied asynchronously. Elsewhere each batch is moved as it comes.
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
            # Its memory belongs to the copying stream, which must not reuse it under the
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
