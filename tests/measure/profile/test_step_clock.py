import time

import torch

from training_framework.measure.profile.step_clock import MarkingLoader, StepClock

CPU = torch.device("cpu")


def test_phases_hold_the_time_since_the_mark_before_and_add_up_to_the_wall_clock():
    clock = StepClock(CPU)
    clock.mark("forward")
    for _ in range(2):
        clock.start()
        time.sleep(0.02)
        clock.mark("forward")
        time.sleep(0.01)
        clock.mark("backward")
        clock.stop()
        time.sleep(0.03)
    clock.mark("forward")
    assert 0.04 <= clock.seconds["forward"] < clock.wall_seconds
    assert 0.02 <= clock.seconds["backward"] < clock.wall_seconds
    assert abs(sum(clock.seconds.values()) / clock.wall_seconds - 1) < 0.01


class Loader:
    batch_count = 3

    def __init__(self):
        self.closed = False

    def epoch(self, epoch, start_batch=0):
        try:
            yield from range(start_batch, self.batch_count)
        finally:
            self.closed = True

    def close(self):
        raise AssertionError("not asked for")


def test_a_marked_loader_yields_the_same_batches_and_closes_them():
    marks, inner = [], Loader()
    loader = MarkingLoader(inner, marks.append)
    assert list(loader.epoch(0, start_batch=1)) == [1, 2]
    assert marks == ["rest", "data"] * 3
    assert inner.closed
    inner.closed = False
    batches = loader.epoch(0)
    next(batches)
    batches.close()
    assert inner.closed


def test_a_marked_loader_takes_iterators_that_cannot_be_closed():
    class Plain(Loader):
        def epoch(self, epoch, start_batch=0):
            return iter(range(3))

    assert list(MarkingLoader(Plain(), lambda phase: None).epoch(0)) == [0, 1, 2]
