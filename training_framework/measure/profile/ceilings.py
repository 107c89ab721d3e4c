"""Three ceilings of a run's speed, and which of them limits it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from training_framework.data import Batch, Loader
from training_framework.measure.profile.run_parts import step_on, synchronize
from training_framework.training.parts import Parts

__all__ = ["Ceilings", "Limit", "find_limit", "measure_loader_alone", "measure_model_alone"]

Limit = Literal["loader-bound", "launch-bound", "compute-bound"]

# A smaller loss is noise, or not worth fixing.
LOADER_SLOWDOWN = 1.1
SMALLEST_DATA_SHARE = 0.05
BUSY_DEVICE_SHARE = 0.85
DISTURBED = 1.25


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Images per second of parts of the run, and of the whole run.

    Attributes:
        loader: The loader alone: batches on the device, with nothing else to do.
        model: Everything after the loader (augmentation, forward, backward, update), on one batch
            that is already on the device.
        both: The run itself.
        device_busy: Share of the run's time in which the device computes; None on a CPU, which
            launches its own work.
    """

    loader: float
    model: float
    both: float
    device_busy: float | None = None

    def agree(self, model_share: float) -> bool:
        """Whether all the figures are plausible for one undisturbed machine.

        Args:
            model_share: Share of a step that `model` covers too, 0 to 1.
        """
        expected = self.model * model_share
        return self.model >= self.both / DISTURBED and expected <= DISTURBED * self.both


def find_limit(ceilings: Ceilings, data_share: float) -> Limit:
    """What limits a run.

    It is the loader if the run would gain at least 10% without it and also waits for data for at
    least 5% of a step (two signs, so that noise in one measurement is not enough). It is the
    launches if the device idles for over 15% of the time although the data is there. Otherwise it
    is the computation.

    Args:
        ceilings: As measured.
        data_share: Share of a step spent waiting for data, 0 to 1.
    """
    waits = data_share >= SMALLEST_DATA_SHARE
    if waits and ceilings.model >= LOADER_SLOWDOWN * ceilings.both:
        return "loader-bound"
    if ceilings.device_busy is not None and ceilings.device_busy < BUSY_DEVICE_SHARE:
        return "launch-bound"
    return "compute-bound"


def measure_model_alone(parts: Parts, *, steps: int, warmup: int) -> float:
    """Images per second of steps on one batch that is already on the device.

    Args:
        parts: The run; its weights stay as they are.
        steps: Optimizer steps to time.
        warmup: Steps before them.
    """
    batches = parts.loaders.train.epoch(0)
    batch = next(batches)
    del batches
    # Otherwise its processes would keep preparing batches beside the steps.
    parts.loaders.train.close()
    parts.step.model.train()
    for _ in range(warmup):
        step_on(parts, batch)
    synchronize(parts.device)
    start = time.perf_counter()
    for _ in range(steps):
        step_on(parts, batch)
    synchronize(parts.device)
    images = steps * parts.plan.accumulate_grad_batches * len(batch.labels)
    return images / (time.perf_counter() - start)


def measure_loader_alone(parts: Parts, *, steps: int, warmup: int) -> float:
    """Images per second of batches that are loaded and not used.

    Args:
        parts: The run.
        steps: Time the batches of this many optimizer steps.
        warmup: Steps whose batches are dropped first, in addition to the head start of the
            loader processes.
    """
    group = parts.plan.accumulate_grad_batches
    batches = _endless(parts.loaders.train)
    for _ in range((warmup + parts.plan.steps_loaded_ahead) * group):
        next(batches)
    synchronize(parts.device)
    start = time.perf_counter()
    images = sum(len(next(batches).labels) for _ in range(steps * group))
    synchronize(parts.device)
    return images / (time.perf_counter() - start)


def _endless(loader: Loader) -> Iterator[Batch]:
    # Epoch 0 has just been read, and its files may still be in the system's cache.
    epoch = 1
    while True:
        yield from loader.epoch(epoch)
        epoch += 1
