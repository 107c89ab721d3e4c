"""Wait for a quiet machine: other users of its cores, outside the virtual machine, are not counted.

A neighbour on the other hardware thread of a core takes up to half of its speed, for seconds or
minutes, and the system counts no stolen time. The time of a fixed task reveals it.
"""

import time

import torch
from torch.nn import functional

from training_framework.measure.compare.result import Measurement
from training_framework.measure.compare.workers import Worker

__all__ = ["QUIET", "QuietMachine", "SpeedProbe"]

# Slowdown of the probe up to which the machine counts as quiet.
QUIET = 1.20
PROBE_CALLS = 2
CALIBRATION_PROBES = 20
# Available from the start, so that the first sample can wait too.
FIRST_PATIENCE_SECONDS = 20.0
SECONDS_BETWEEN_PROBES = 0.1


class SpeedProbe:
    """A convolution on all of this process's threads, timed over about 20 ms.

    Its arrays are as large as those of a training step: smaller ones would fit into a cache and
    suffer more from a neighbour than training does.

    Attributes:
        fastest: Seconds of the fastest probe so far.
    """

    def __init__(self) -> None:
        layout = torch.channels_last
        self._images = torch.randn(32, 64, 32, 32).contiguous(memory_format=layout)
        self._weight = torch.randn(64, 64, 3, 3).contiguous(memory_format=layout)
        self.fastest = float("inf")
        for _ in range(CALIBRATION_PROBES):
            self.seconds()

    def seconds(self) -> float:
        """Time the work once more."""
        self._call()  # wakes the threads
        start = time.perf_counter()
        for _ in range(PROBE_CALLS):
            self._call()
        seconds = time.perf_counter() - start
        self.fastest = min(self.fastest, seconds)
        return seconds

    def _call(self) -> None:
        functional.conv2d(self._images, self._weight, padding=1)


class QuietMachine:
    """Waits until the probe is nearly as fast as it ever was, as long as the patience lasts.

    Args:
        patience: Seconds of waiting allowed for each second of a sample that counts.
        probe: The probe; None: a new one.

    Attributes:
        waited: Seconds spent so far on waiting and on dropped samples.
    """

    def __init__(self, patience: float, probe: SpeedProbe | None = None) -> None:
        self._patience = patience
        self._probe = SpeedProbe() if probe is None else probe
        self._left = FIRST_PATIENCE_SECONDS if patience else 0.0
        self.waited = 0.0

    def sample(self, worker: Worker, number: int, *, may_retake: bool) -> Measurement:
        """A sample between two quiet moments or, when the patience ends, the one nearest to that.

        The probe decides, never the sample, so no sample is selected by its outcome.

        Args:
            worker: Takes the sample.
            number: Number of the round.
            may_retake: Whether the sample may be repeated.
        """
        retakes = 0
        best: tuple[float, Measurement] | None = None
        while True:
            before = self._wait()
            measurement = worker.sample(number)
            measurement.probe_seconds = (before, self._probe.seconds())
            slower = max(measurement.probe_seconds)
            if best is None or slower < best[0]:
                best = (slower, measurement)
            if self._is_quiet(slower) or not may_retake or self._left <= 0:
                break
            self._spend(measurement.seconds)
            retakes += 1
        self._left += self._patience * best[1].seconds
        best[1].retakes = retakes
        return best[1]

    def _wait(self) -> float:
        """Wait for a quiet moment. Returns the seconds of the last probe."""
        while True:
            start = time.perf_counter()
            seconds = self._probe.seconds()
            if self._is_quiet(seconds) or self._left <= 0:
                return seconds
            time.sleep(SECONDS_BETWEEN_PROBES)
            self._spend(time.perf_counter() - start)

    def _spend(self, seconds: float) -> None:
        self._left -= seconds
        self.waited += seconds

    def _is_quiet(self, seconds: float) -> bool:
        return seconds <= QUIET * self._probe.fastest
