import time

import pytest
import torch

from training_framework.measure.profile.step_clock import PHASES, StepClock

CPU = torch.device("cpu")


def test_phases_hold_the_time_inside_them_and_add_up_to_the_wall_clock():
    clock = StepClock(CPU)
    with clock.phase("forward"):  # before it runs
        time.sleep(0.03)
    for _ in range(2):
        clock.begin()
        with clock.phase("forward"):
            time.sleep(0.02)
        time.sleep(0.015)
        with clock.phase("backward"):
            time.sleep(0.01)
        clock.end()
        time.sleep(0.03)
    with clock.phase("forward"):
        time.sleep(0.03)
    assert 0.04 <= clock.seconds["forward"] < clock.wall_seconds
    assert 0.02 <= clock.seconds["backward"] < clock.wall_seconds
    assert 0.03 <= clock.seconds["rest"] < clock.wall_seconds
    assert abs(sum(clock.seconds.values()) / clock.wall_seconds - 1) < 0.01


def test_a_phase_that_an_error_ends_is_counted():
    clock = StepClock(CPU)
    clock.begin()
    with pytest.raises(KeyError), clock.phase("data"):
        time.sleep(0.01)
        raise KeyError
    clock.end()
    assert clock.seconds["data"] >= 0.01
    assert clock.seconds.keys() == PHASES.keys()
