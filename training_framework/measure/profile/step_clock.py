"""A clock that divides optimizer steps into the phases that the step and the trainer enter."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from training_framework.measure.profile.run_parts import synchronize
from training_framework.training.phases import Phase

__all__ = ["PHASES", "StepClock"]

PHASES = {
    "data": "wait for data, copy to the device",
    "transform": "augment and normalize",
    "forward": "forward and loss",
    "backward": "backward",
    "optimizer": "optimizer, and what follows it",
    "logging": "metrics and logging",
    "rest": "the rest",
}
"""The phases of a step in order, and what they contain."""


class StepClock:
    """Adds up the time of each phase, from each `begin` to its `end`.

    Args:
        device: The clock waits for it between phases, so that its work counts in the right phase.

    Attributes:
        seconds: Seconds of each phase.
        wall_seconds: Seconds of the same steps, by separate readings of the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.wall_seconds = 0.0
        self._device = device
        self._running = False

    def begin(self) -> None:
        """Begin, or resume."""
        synchronize(self._device)
        self._started = time.perf_counter()
        self._running = True
        self._last = time.perf_counter()

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Count time inside as `phase`; time between two phases counts as the rest."""
        self._read("rest")
        try:
            yield
        finally:
            self._read(phase)

    def end(self) -> None:
        """Pause; until the next `begin`, phases cost nothing."""
        self._read("rest")
        self.wall_seconds += time.perf_counter() - self._started
        self._running = False

    def _read(self, phase: str) -> None:
        """Count the time since the last reading as `phase`."""
        if not self._running:
            return
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now
