"""Random draws from counters, never from a running state.

Every draw is a function of (seed, purpose, epoch, sample) or (seed, purpose, step). So the draws do
not depend on resumption, the number of workers or the number of processes.
"""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

__all__ = ["BatchDraws", "Purpose", "SampleGenerators", "keyed_generator"]


class Purpose(IntEnum):
    """The purpose of a stream of draws; two purposes never share a stream."""

    ORDER = 0
    AUGMENTATION = 1
    FIRST_SIDE = 2
    MIXING = 3
    DECODING = 4
    SUBSET = 5


def keyed_generator(seed: int, purpose: Purpose, *counters: int) -> np.random.Generator:
    """A generator whose stream is a function of the arguments alone.

    Philox is counter-based (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).

    Args:
        seed: The run's seed, 0 or more.
        purpose: What is drawn.
        counters: Epoch, step or sample, 0 or more; always the same number of them per purpose.
    """
    entropy = np.random.SeedSequence((seed, int(purpose), *counters))
    return np.random.Generator(np.random.Philox(entropy))


class SampleGenerators:
    """Generators for single samples: streams that are functions of (seed, purpose, epoch, sample).

    One Philox serves all samples of an epoch, and the sample is its counter: building a generator
    for each sample takes ten times as long as setting a counter.

    Args:
        seed: The run's seed.
        purpose: What is drawn.
    """

    def __init__(self, seed: int, purpose: Purpose) -> None:
        self._seed = seed
        self._purpose = purpose
        self._epoch: int | None = None
        self._philox = np.random.Philox(0)
        self._generator = np.random.Generator(self._philox)

    def of(self, epoch: int, sample: int) -> np.random.Generator:
        """The generator of a sample in an epoch, valid until the next call."""
        if epoch != self._epoch:
            entropy = np.random.SeedSequence((self._seed, int(self._purpose), epoch))
            self._start = np.random.Philox(entropy).state
            self._epoch = epoch
        # The lowest of the counter's four words counts the draws.
        self._start["state"]["counter"][1] = sample
        self._philox.state = self._start
        return self._generator


class BatchDraws:
    """Uniform draws for the samples of a batch, on the device.

    The draws of an epoch for all samples are made at once on the host and copied to the device, so
    a step costs one gather. They depend only on seed, epoch and position in the split, not on
    batch, rank or device. They take 4 bytes per draw and sample.

    Args:
        seed: The run's seed.
        sample_count: Samples in the split.
        draws_per_sample: Draws that each sample needs in an epoch. Further draws do not change the
            first ones.
        device: The device of the draws.
    """

    def __init__(
        self, *, seed: int, sample_count: int, draws_per_sample: int, device: torch.device | str
    ) -> None:
        self._seed = seed
        self._shape = (draws_per_sample, sample_count)
        self._device = torch.device(device)
        self._epoch: int | None = None
        self._epoch_draws = torch.empty(0)
        self._first_sides: Tensor | None = None

    def uniforms(self, indices: Tensor, *, epoch: int) -> Tensor:
        """The samples' draws in this epoch.

        Args:
            indices: (N,) int64 on the device, positions in the split.
            epoch: Counted from 0.

        Returns:
            (draws_per_sample, N) float32 in [0, 1).
        """
        if epoch != self._epoch:
            generator = keyed_generator(self._seed, Purpose.AUGMENTATION, epoch)
            draws = generator.random(self._shape, dtype=np.float32)
            self._epoch_draws = torch.from_numpy(draws).to(self._device)
            self._epoch = epoch
        return self._epoch_draws.index_select(1, indices)

    def first_sides(self, indices: Tensor) -> Tensor:
        """Which samples start mirrored: (N,) bool, the same in every epoch, half of them true."""
        if self._first_sides is None:
            sides = keyed_generator(self._seed, Purpose.FIRST_SIDE).random(self._shape[1]) < 0.5
            self._first_sides = torch.from_numpy(sides).to(self._device)
        return self._first_sides.index_select(0, indices)

    def for_step(self, step: int) -> np.random.Generator:
        """The step's generator for values that all ranks share, such as mixup's lam.

        It draws on the host, so that nothing waits for the device.
        """
        return keyed_generator(self._seed, Purpose.MIXING, step)
