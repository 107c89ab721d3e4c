"""What loader processes need of the system, checked before they start.

Where a file or a semaphore cannot be made, torch and multiprocessing print tracebacks from threads
and from half-made objects. So it is found out before, and said in one line.
"""

import errno
import multiprocessing
import os
import resource

from training_framework.errors import UserError

__all__ = ["check_worker_limits"]

_TENSORS_PER_BATCH = 3
_FILES_PER_WORKER = 4  # in the parent: two ends of a queue's pipe, two of the process's
_OTHER_FILES = 16  # what is opened now and then: images, checkpoints, the connections of a worker
_OTHER_LOADERS = 1  # training and validation have a loader each


def check_worker_limits(num_workers: int, prefetch_factor: int) -> None:
    """Check that loader processes can start; raise the limit of open files if they need more.

    Args:
        num_workers: Loader processes to start, at least 1.
        prefetch_factor: Batches that each of them prepares in advance.

    Raises:
        UserError: The limit of open files or the shared memory is too small.
    """
    _allow_open_files(_needed_files(num_workers, prefetch_factor) * (1 + _OTHER_LOADERS))
    _check_semaphores(num_workers)


def _needed_files(num_workers: int, prefetch_factor: int) -> int:
    """Files that the process needs which opens more of them: this one, or a loader process."""
    pipes = _FILES_PER_WORKER * num_workers + 2
    # A tensor that is handed over occupies one file here, and two in the worker, until it is taken.
    here = num_workers * prefetch_factor * _TENSORS_PER_BATCH
    in_worker = (prefetch_factor + 1) * _TENSORS_PER_BATCH * 2
    return pipes + max(here, in_worker)


def _allow_open_files(more: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _open_files() + more + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"loader processes need up to {needed} open files, and only {hard} are allowed",
            f"allow more (ulimit -n {needed}), lower num_workers or prefetch_factor, or load "
            "without processes (--num-workers 0)",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _open_files() -> int:
    try:
        return len(os.listdir("/dev/fd"))  # noqa: PTH208  # names alone: a path for each is dear
    except FileNotFoundError:  # /proc is not mounted
        return 0


def _check_semaphores(num_workers: int) -> None:
    """Make what a DataLoader makes of queues and events, and drop it."""
    try:
        made: list[object] = [multiprocessing.Event()]  # kept until all of them are there
        made += [multiprocessing.Queue() for _ in range(num_workers + 1)]
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise UserError(
            f"loader processes need shared memory, and /dev/shm gives none ({error.strerror})",
            "free or enlarge the shared memory (docker run --shm-size=1g), or load without "
            "processes (--num-workers 0)",
        ) from None
