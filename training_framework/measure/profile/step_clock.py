"""A clock that divides optimizer steps into phases, and the parts of a run that stop it.

The trainer's loop runs unchanged: the loader, transform, scaler, sums and loggers that it is given
mark the borders between the phases.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from training_framework.data import Batch, Loader, MixedLabels
from training_framework.loggers import Logger, LoggerGroup
from training_framework.measure.profile.run_parts import synchronize
from training_framework.training.metrics import ClassificationSums

__all__ = [
    "PHASES",
    "MarkingLoader",
    "MarkingLoggers",
    "MarkingScaler",
    "MarkingSums",
    "StepClock",
    "marking_transform",
]

PHASES = {
    "data": "wait for data, copy to the device",
    "transform": "augment and normalize",
    "forward": "forward and loss",
    "backward": "backward",
    "optimizer": "optimizer, and what follows it",
    "logging": "metrics and logging",
    "rest": "the rest",
}
"""The phases of a step, in their order, and what they hold."""

Mark = Callable[[str], None]


class StepClock:
    """Adds up the time of each phase from each `start` to its `stop`; other marks cost nothing.

    Args:
        device: Waited for at every border, so that its work counts where it was asked for.

    Attributes:
        seconds: Of each phase.
        wall_seconds: Of the same steps, by readings of the clock of their own.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.wall_seconds = 0.0
        self._device = device
        self._running = False

    def start(self) -> None:
        """Begin, or go on."""
        synchronize(self._device)
        self._started = time.perf_counter()
        self._running = True
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """What happened since the last mark was `phase`."""
        if not self._running:
            return
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def stop(self) -> None:
        """End; what happened since the last mark belongs to the rest."""
        self.mark("rest")
        self.wall_seconds += time.perf_counter() - self._started
        self._running = False


class MarkingLoader:
    """A loader that marks the end of each wait for a batch."""

    def __init__(self, loader: Loader, mark: Mark) -> None:
        self._loader = loader
        self._mark = mark

    @property
    def batch_count(self) -> int:
        """As the loader's own."""
        return self._loader.batch_count

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The loader's batches."""
        self._mark("rest")
        batches = self._loader.epoch(epoch, start_batch)
        try:
            while True:
                batch = next(batches, None)
                self._mark("data")
                if batch is None:
                    return
                yield batch
                self._mark("rest")
        finally:
            with suppress(AttributeError):  # an iterator that is no generator has nothing to close
                batches.close()  # type: ignore[attr-defined]

    def close(self) -> None:
        """Close the loader."""
        self._loader.close()


def marking_transform(
    transform: Callable[..., tuple[Tensor, Tensor, MixedLabels | None]], mark: Mark
) -> Callable[..., tuple[Tensor, Tensor, MixedLabels | None]]:
    """The transform, marking its end."""

    def marked(batch: Batch, **where: int) -> tuple[Tensor, Tensor, MixedLabels | None]:
        result = transform(batch, **where)
        mark("transform")
        return result

    return marked


class MarkingScaler(torch.amp.GradScaler):
    """A gradient scaler that marks the end of the forward pass: a step scales the loss next."""

    def __init__(self, device_type: str, *, enabled: bool, mark: Mark) -> None:
        super().__init__(device_type, enabled=enabled)
        self._mark = mark

    def scale(self, outputs: Any) -> Any:
        """Mark, then scale."""
        self._mark("forward")
        return super().scale(outputs)


class MarkingSums(ClassificationSums):
    """Sums that mark the end of the backward pass: a step counts its batch next."""

    def __init__(self, device: torch.device, *, num_classes: int, mark: Mark) -> None:
        super().__init__(device, num_classes=num_classes)
        self._mark = mark

    def update(
        self, logits: Tensor, labels: Tensor, loss: Tensor, *, valid: Tensor | None = None
    ) -> None:
        """Mark, then add."""
        self._mark("backward")
        super().update(logits, labels, loss, valid=valid)
        self._mark("logging")

    def all_reduce(self) -> None:
        """Mark, then gather: with this the trainer begins to log a row."""
        self._mark("rest")
        super().all_reduce()


class MarkingLoggers(LoggerGroup):
    """Loggers that mark the end of each row."""

    def __init__(self, loggers: Sequence[Logger], mark: Mark) -> None:
        super().__init__(loggers)
        self._mark = mark

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log, then mark."""
        super().log(step, values)
        self._mark("logging")
