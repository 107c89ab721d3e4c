import itertools

import pytest

from training_framework.measure.compare import quiet
from training_framework.measure.compare.quiet import QuietMachine, SpeedProbe
from training_framework.measure.compare.result import Measurement
from training_framework.measure.compare.validity import variant_marks


class Probe:
    """Plays back seconds of probes, over and over; the fastest is 1."""

    fastest = 1.0

    def __init__(self, *seconds):
        self._seconds = itertools.cycle(seconds)

    def seconds(self):
        return next(self._seconds)


class Worker:
    def __init__(self, seconds=10.0):
        self.taken = 0
        self._seconds = seconds

    def sample(self, round_number):
        self.taken += 1
        return measurement(round_number, images=self.taken, seconds=self._seconds)


def measurement(number=0, *, images=1, seconds=1.0, probes=None):
    return Measurement(
        round=number, seconds=seconds, steps=1, images=images, cpu_seconds=0, other_cpu_share=0,
        peak_memory_bytes=0, probe_seconds=probes,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    monkeypatch.setattr(quiet, "SECONDS_BETWEEN_PROBES", 0.0)


def test_a_sample_waits_for_a_quiet_moment():
    worker = Worker()
    found = QuietMachine(1.0, Probe(1.8, 1.5, 1.05, 1.02)).sample(worker, 3, may_retake=True)
    assert (found.probe_seconds, found.retakes, found.round) == ((1.05, 1.02), 0, 3)


def test_a_sample_that_a_neighbour_disturbed_is_taken_again():
    worker = Worker()
    machine = QuietMachine(1.0, Probe(1.0, 1.7, 1.0, 1.01))
    found = machine.sample(worker, 0, may_retake=True)
    assert (found.images, found.retakes) == (2, 1)
    assert machine.waited >= 10


def test_patience_ends_and_the_least_disturbed_sample_counts():
    worker = Worker()
    found = QuietMachine(1.0, Probe(1.0, 1.7, 1.0, 1.3, 1.0, 1.9)).sample(
        worker, 0, may_retake=True
    )
    assert worker.taken == 3  # 20 seconds of patience, 10 seconds each
    assert (found.images, found.probe_seconds) == (2, (1.0, 1.3))


def test_without_patience_or_leave_a_sample_is_taken_once():
    for patience, may_retake in ((0.0, True), (1.0, False)):
        worker = Worker()
        machine = QuietMachine(patience, Probe(1.0, 1.7))
        machine.sample(worker, 0, may_retake=may_retake)
        assert worker.taken == 1


def test_samples_that_count_grant_patience():
    machine = QuietMachine(2.0, Probe(1.0, 1.5))
    machine.sample(Worker(100.0), 0, may_retake=False)  # grants 200 seconds beside the first 20
    worker = Worker(21.0)
    machine.sample(worker, 1, may_retake=True)
    assert worker.taken == 12  # the last one overdraws


def test_the_probe_knows_its_fastest_time():
    probe = SpeedProbe()
    times = [probe.seconds() for _ in range(3)]
    assert 0 < probe.fastest <= min(times)


def test_a_neighbour_that_no_counter_shows_is_marked():
    slow = [measurement(number, probes=(1.0, 1.4)) for number in range(5)]
    marks = variant_marks(slow, [1.0] * 5, fastest_probe=1.0)
    assert [mark.name for mark in marks] == ["busy machine"]
    assert "1.40 times as long" in marks[0].detail
    calm = [measurement(number, probes=(1.0, 1.05)) for number in range(5)]
    assert variant_marks(calm, [1.0] * 5, fastest_probe=1.0) == []
