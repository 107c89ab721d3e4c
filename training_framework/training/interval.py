"""The steps since the last logged row: how long they took, and over how many images."""

import time

__all__ = ["Interval"]


class Interval:
    """Times and images of the steps since the last logged row.

    Attributes:
        data_wait: Seconds spent waiting for batches.
        images: Training images, over all processes.
        step_seconds: Seconds a step took in the previous interval; None before the first row.
    """

    def __init__(self) -> None:
        self.step_seconds: float | None = None
        self.restart()

    def restart(self) -> None:
        """Begin the next interval now."""
        self._start = time.perf_counter()
        self.data_wait = 0.0
        self.images = 0

    def seconds(self) -> float:
        """Wall time so far, without the time that was left out."""
        return time.perf_counter() - self._start

    def leave_out(self, seconds: float) -> None:
        """Exclude time that just passed without training, such as the time of a save."""
        self._start += seconds
