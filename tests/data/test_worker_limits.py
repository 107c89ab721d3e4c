"""What loader processes need is found out before they start; tests/reliability has whole runs."""

import errno
import multiprocessing
import resource

import pytest

from training_framework.data.worker_limits import check_worker_limits
from training_framework.errors import UserError


@pytest.fixture
def limits(monkeypatch):
    """Limits of open files, soft and hard, which only this test sees."""
    limits = [1024, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(2), new))
    return limits


def test_a_limit_that_is_high_enough_stays(limits):
    check_worker_limits(2, 4)
    assert limits == [1024, 4096]


def test_a_low_limit_is_raised_as_far_as_needed(limits):
    limits[:] = [40, 4096]
    check_worker_limits(2, 4)
    assert 40 < limits[0] < 200
    assert limits[1] == 4096
    needed_by_two = limits[0]
    check_worker_limits(16, 4)
    assert needed_by_two < limits[0] < 1000


def test_without_a_limit_nothing_is_asked(limits):
    limits[:] = [resource.RLIM_INFINITY] * 2
    check_worker_limits(64, 8)
    limits[:] = [64, resource.RLIM_INFINITY]
    check_worker_limits(64, 8)
    assert limits[0] > 1000


def test_more_than_the_system_allows_is_one_line(limits):
    limits[:] = [40, 40]
    expected = r"up to \d+ open files, and only 40 are allowed; allow more \(ulimit -n \d+\), lower"
    with pytest.raises(UserError, match=expected):
        check_worker_limits(2, 4)
    assert limits == [40, 40]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ENOENT])
def test_a_shared_memory_that_gives_nothing_is_named(limits, monkeypatch, number):
    def no_queue() -> None:
        raise OSError(number, "what the system says")

    monkeypatch.setattr(multiprocessing, "Queue", no_queue)
    with pytest.raises(UserError, match=r"/dev/shm gives none \(what the .*--num-workers 0"):
        check_worker_limits(2, 4)
