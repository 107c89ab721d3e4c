"""A digest of which samples an epoch took, in which order and batches."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["SampleDigest", "digest_of_batches"]

_DIGEST_BYTES = 8
_MAX_UNREAD = 32


class SampleDigest:
    """Grows with every batch and can be carried over a stop, so two runs can be held together.

    Each batch's positions in the split, as little-endian int64, are hashed with the digest before
    them (BLAKE2b, 64 bits): another sample, order or cut into batches gives another digest.

    Adding a batch that is on an accelerator keeps a reference to its indices and computes nothing;
    `read` fetches those that came since the last time in one copy. So it is to be called where the
    device is waited for anyway.

    Args:
        digest: What `read` gave where the epoch was left; empty at an epoch's start.
    """

    def __init__(self, digest: str = "") -> None:
        self._digest = digest
        self._unread: list[Tensor] = []

    def add(self, indices: Tensor) -> None:
        """Add a batch: (N,) int64 positions in the split, on any device."""
        self._unread.append(indices)
        # A loader's processes share their tensors by open files, of which there may be few.
        if len(self._unread) >= _MAX_UNREAD and indices.device.type == "cpu":
            self.read()

    def read(self) -> str:
        """The digest of all batches so far, as hexadecimal text; empty before the first one."""
        if self._unread:
            counts = [len(indices) for indices in self._unread]
            samples = torch.cat(self._unread).cpu()
            self._digest = digest_of_batches(samples.split(counts), self._digest)
            self._unread.clear()
        return self._digest


def digest_of_batches(batches: Iterable[Tensor], digest: str = "") -> str:
    """The digest that `SampleDigest` has after these batches.

    Args:
        batches: (N,) int64 positions in the split, on the CPU.
        digest: Of the batches before them.
    """
    for indices in batches:
        grown = hashlib.blake2b(bytes.fromhex(digest), digest_size=_DIGEST_BYTES)
        grown.update(indices.numpy().astype("<i8", copy=False).tobytes())
        digest = grown.hexdigest()
    return digest
