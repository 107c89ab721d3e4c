"""A digest of the samples of an epoch, their order and their batches."""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["SampleDigest", "digest_of_batches"]

_DIGEST_BYTES = 8
_MAX_UNREAD = 32


class SampleDigest:
    """Grows with every batch and survives a stop, so that two runs can be compared.

    The positions of each batch in the split, as little-endian int64, are hashed with the digest
    before them (BLAKE2b, 64 bits). Other samples, another order or other batches change the digest.

    Adding a batch on an accelerator only keeps a reference to its indices; `read` fetches those
    added since the last call in one copy. So call `read` where the program waits for the device
    anyway.

    Args:
        digest: The result of `read` at the point where the epoch resumes; empty at its start.
    """

    def __init__(self, digest: str = "") -> None:
        self._digest = digest
        self._unread: list[Tensor] = []

    def add(self, indices: Tensor) -> None:
        """Add a batch: (N,) int64 positions in the split, on any device."""
        self._unread.append(indices)
        # Loader processes share tensors through open files, whose number is limited.
        if len(self._unread) >= _MAX_UNREAD and indices.device.type == "cpu":
            self.read()

    def read(self) -> str:
        """The digest of all batches so far, as hexadecimal text; empty before the first one."""
        if self._unread:
            sizes = [indices.shape[0] for indices in self._unread]
            samples = torch.cat(self._unread).cpu().numpy()
            self._digest = _grown(self._digest, samples, sizes)
            self._unread.clear()
        return self._digest


def digest_of_batches(batches: Iterable[Tensor], digest: str = "") -> str:
    """The digest of `SampleDigest` after these batches.

    Args:
        batches: (N,) int64 positions in the split, on the CPU.
        digest: Digest of the batches before them.
    """
    for indices in batches:
        digest = _grown(digest, indices.numpy(), [len(indices)])
    return digest


def _grown(digest: str, samples: NDArray[np.int64], sizes: Iterable[int]) -> str:
    """The digest after `samples`, whose batches have these sizes."""
    # One conversion for all batches: this runs in every step of a training.
    left = memoryview(samples.astype("<i8", copy=False).tobytes())
    grown = bytes.fromhex(digest)
    for size in sizes:
        batch, left = left[: 8 * size], left[8 * size :]
        grown = hashlib.blake2b(grown + batch, digest_size=_DIGEST_BYTES).digest()
    return grown.hex()
