"""The order of samples: pure functions of seed, epoch and rank."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from training_framework.data.draws import Purpose, keyed_generator
from training_framework.errors import UserError

__all__ = ["BatchPlan", "Indices", "epoch_order", "evaluation_share", "training_batches"]

Indices = NDArray[np.int64]


def epoch_order(count: int, *, seed: int, epoch: int, shuffle: bool) -> Indices:
    """The order of an epoch: (count,) int64, a permutation of 0..count-1.

    A shuffled order depends only on (seed, epoch), so it is the same on every rank and in every
    resumed run.
    """
    if not shuffle:
        return np.arange(count, dtype=np.int64)
    generator = keyed_generator(seed, Purpose.ORDER, epoch)
    return generator.permutation(count).astype(np.int64, copy=False)


def training_batches(
    order: Indices,
    *,
    global_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
    drop_last: bool = True,
) -> list[Indices]:
    """One rank's part of every global batch of an epoch.

    The global batches are the same for every world size: consecutive parts of the order. Each rank
    takes a contiguous share of each one.

    Args:
        order: (count,) positions in the split.
        global_batch_size: Samples of a batch over all ranks.
        rank: Number of this process, from 0.
        world_size: Number of processes.
        start_batch: Batches of the epoch that are already done.
        drop_last: Drop an incomplete last batch, unless it is the only one. An incomplete batch
            with fewer samples than ranks is always dropped.

    Returns:
        One (n,) int64 view of `order` per batch.

    Raises:
        UserError: A batch would leave a rank without a sample.
    """
    count = len(order)
    if min(count, global_batch_size) < world_size:
        raise UserError(
            f"{count} training images in batches of {global_batch_size} leave some of "
            f"{world_size} processes without a sample",
            "use fewer processes or a larger batch",
        )
    whole = count // global_batch_size * global_batch_size
    end = whole if drop_last and whole else count
    if 0 < end - whole < world_size:
        end = whole
    starts = range(start_batch * global_batch_size, end, global_batch_size)
    batches = [order[start : min(start + global_batch_size, end)] for start in starts]
    return batches if world_size == 1 else [_share(batch, rank, world_size) for batch in batches]


def evaluation_share(count: int, rank: int = 0, world_size: int = 1) -> Indices:
    """The samples that a rank evaluates: every sample is in exactly one rank's share.

    Shares are contiguous and differ by at most one sample. Nothing is padded, so the ranks may have
    different numbers of batches, and evaluation must not communicate within a batch.
    """
    return _share(np.arange(count, dtype=np.int64), rank, world_size)


def _share(samples: Indices, rank: int, world_size: int) -> Indices:
    count = len(samples)
    return samples[count * rank // world_size : count * (rank + 1) // world_size]


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The samples of each batch of an epoch on one rank.

    Attributes:
        sample_count: Samples in the split.
        global_batch_size: Samples of a batch over all ranks.
        train: Shuffled global batches, without an incomplete last one; otherwise the rank's share
            of the split in order, in batches of `global_batch_size // world_size`, the last one
            perhaps incomplete.
        seed: Draws the order.
        rank: Number of this process, from 0.
        world_size: Number of processes.
    """

    sample_count: int
    global_batch_size: int
    train: bool
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    @cached_property
    def batch_count(self) -> int:
        """Batches per whole epoch on this rank."""
        return len(self._cut(np.arange(self.sample_count, dtype=np.int64), 0))

    def batches(self, epoch: int, start_batch: int = 0) -> list[Indices]:
        """The epoch's batches from `start_batch` on: (n,) int64 positions in the split each."""
        order = epoch_order(self.sample_count, seed=self.seed, epoch=epoch, shuffle=self.train)
        return self._cut(order, start_batch)

    def _cut(self, order: Indices, start_batch: int) -> list[Indices]:
        if self.train:
            return training_batches(
                order,
                global_batch_size=self.global_batch_size,
                rank=self.rank,
                world_size=self.world_size,
                start_batch=start_batch,
            )
        share = evaluation_share(self.sample_count, self.rank, self.world_size)
        size = max(1, self.global_batch_size // self.world_size)
        return [
            share[start : start + size] for start in range(start_batch * size, len(share), size)
        ]
