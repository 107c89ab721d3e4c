"""The clock of measured steps: when it waits for a device, and when it does not."""

import time

import pytest
import torch

from training_framework.measure.compare.step_times import time_steps

CUDA = torch.device("cuda", 0)


class Event:
    """Stands for a CUDA event: the device finishes a step 20 ms after each record."""

    made = 0

    def __init__(self, *, enable_timing):
        assert enable_timing
        Event.made += 1
        self.number = Event.made

    def record(self):
        pass

    def elapsed_time(self, later):
        return 20.0 * (later.number - self.number)


def test_on_cuda_the_host_waits_before_the_first_step_and_after_the_last_alone(monkeypatch):
    happened = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "synchronize", happened.append)
    seconds, images = time_steps(lambda: happened.append("step") or 8, 3, CUDA)
    assert happened == [CUDA, "step", "step", "step", CUDA]
    assert (seconds, images) == (pytest.approx([0.02] * 3), 24)


def test_on_a_cpu_the_steps_add_up_to_the_time_that_they_took():
    start = time.perf_counter()
    seconds, images = time_steps(lambda: time.sleep(0.01) or 1, 3, torch.device("cpu"))
    assert 0.03 <= sum(seconds) <= time.perf_counter() - start
    assert min(seconds) >= 0.01 and images == 3


def test_no_steps_take_no_time():
    assert time_steps(lambda: 1, 0, torch.device("cpu")) == ([], 0)
