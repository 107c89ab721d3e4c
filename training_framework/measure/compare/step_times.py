"""The clock of all measured steps, ours and the loops that we are compared with."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["StepTimes", "time_steps"]


class StepTimes:
    """Times steps one after the other, from the moment it is made.

    It waits for the device before the first step and after the last one. On a CUDA device it reads
    no clock in between: the device itself records when it has finished a step, so that no step
    waits for another.

    Args:
        device: Where the steps compute.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        _synchronize(device)
        self._readings = [self._reading()]

    def end_step(self) -> None:
        """Note the end of a step, and with it the start of the next one."""
        self._readings.append(self._reading())

    def seconds(self) -> list[float]:
        """Seconds of each step, once the device has finished all of them."""
        _synchronize(self._device)
        first = self._readings[0]
        if self._device.type == "cuda":
            ends = [first.elapsed_time(reading) / 1000 for reading in self._readings]
        else:
            if len(self._readings) > 1:
                self._readings[-1] = self._reading()
            ends = [reading - first for reading in self._readings]
        return [after - before for before, after in itertools.pairwise(ends)]

    def _reading(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def time_steps(
    make_step: Callable[[], int], count: int, device: torch.device
) -> tuple[list[float], int]:
    """Make steps one after the other.

    Args:
        make_step: Makes a step and returns the number of its images.
        count: Number of steps.
        device: Where they compute.

    Returns:
        Seconds of each step, and the images of all of them.
    """
    times, images = StepTimes(device), 0
    for _ in range(count):
        images += make_step()
        times.end_step()
    return times.seconds(), images


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
