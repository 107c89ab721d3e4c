"""Batches from torch's DataLoader workers, which are restarted if they die."""

import contextlib
import multiprocessing.util
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from training_framework.data.bad_images import BadImages, SplitName
from training_framework.data.batch import Batch, prefetch_to_device
from training_framework.data.host_batches import ArrayBatches, FileBatches, HostBatch, Request
from training_framework.data.resolution import Resolutions
from training_framework.data.sampling import BatchPlan, Indices
from training_framework.data.splits import ArraySplit, EncodedSplit
from training_framework.data.worker_limits import check_worker_limits
from training_framework.errors import UserError

__all__ = ["WorkerLoader"]

_RESTARTS_PER_EPOCH = 2
# The exceptions that a torch DataLoader raises when a worker has died or is dying.
_SIGNS_OF_DEATH = (RuntimeError, ConnectionError, EOFError, FileNotFoundError)


@dataclass(frozen=True)
class _Fault:
    """A UserError from a worker; torch would turn the exception itself into a traceback."""

    fault: str
    cure: str


class _WorkerDied(Exception):
    """A loader process has died; the text is torch's description."""


class WorkerLoader:
    """Loads a split that does not fit on the device, or has to be decoded.

    Workers start with the first epoch and stay. The content of a batch depends only on the plan and
    the seed, not on the number of workers or on where an epoch resumes. So a killed worker costs
    only a few seconds: new workers continue with the missing batch, up to twice per epoch.

    Args:
        split: Encoded images or arrays.
        plan: The samples of each batch; its seed also draws the crops.
        device: The device of the batches.
        image_size: Side in pixels that files are cropped and resized to.
        resolutions: That side by epoch, instead of `image_size`; None: always the same.
        num_workers: Loader processes; 0: load in this process.
        prefetch_factor: Batches that each worker prepares in advance.
        pin_memory: Use page-locked host memory; only for CUDA.
        bad_images: Records images that cannot be decoded; None: each is an error.

    Attributes:
        report: Shows a line to the user; by default as a warning.
    """

    def __init__(
        self,
        split: ArraySplit | EncodedSplit,
        *,
        plan: BatchPlan,
        device: torch.device | str,
        image_size: int,
        resolutions: Resolutions | None = None,
        num_workers: int = 0,
        prefetch_factor: int = 4,
        pin_memory: bool = False,
        bad_images: BadImages | None = None,
    ) -> None:
        self._batches: Dataset[HostBatch]
        if isinstance(split, EncodedSplit):
            self._batches = FileBatches(
                split,
                image_size=image_size,
                resolutions=resolutions,
                train=plan.train,
                seed=plan.seed,
                bad_images=bad_images,
            )
        else:
            self._batches = ArrayBatches(split)
        self.batch_count = plan.batch_count
        self.report: Callable[[str], None] = _warn
        self._plan = plan
        self._split_name: SplitName = "train" if plan.train else "val"
        self._bad_images = bad_images
        self._device = torch.device(device)
        self._num_workers = num_workers
        self._prefetch_factor = prefetch_factor
        self._pins = pin_memory and self._device.type == "cuda"
        self._requests = _Requests()
        self._data_loader: DataLoader[HostBatch | _Fault] | None = None
        self._running: Generator[Batch] | None = None

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from `start_batch` on; ends an unfinished epoch.

        Raises:
            UserError: A file cannot be read or decoded, too many are bad, or workers keep dying.
                The next epoch starts new workers.
        """
        if self._running is not None:
            self._running.close()
        self._running = self._epoch(epoch, start_batch)
        return self._running

    def close(self) -> None:
        """End the workers; the next epoch starts new ones."""
        if self._running is not None:
            self._running.close()
            self._running = None
        self._data_loader = None

    def _epoch(self, epoch: int, start_batch: int) -> Generator[Batch]:
        for batch in prefetch_to_device(self._host_batches(epoch, start_batch), self._device):
            yield batch._replace(images=batch.images.permute(0, 3, 1, 2))

    def _host_batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        wanted = self._plan.batches(epoch, start_batch)
        done = deaths = 0
        while done < len(wanted):
            self._requests.set(epoch, wanted[done:])
            death = ""
            try:
                for batch in self._items():
                    yield batch
                    done += 1
            except _WorkerDied as error:
                death = str(error)
            if not death:
                continue
            # Here, where no traceback refers to the loader, dropping it ends its workers.
            self._data_loader = None
            deaths += 1
            if deaths > _RESTARTS_PER_EPOCH:
                raise UserError(
                    f"data loading processes died {deaths} times in one epoch: {death}",
                    "if memory or /dev/shm was full, lower num_workers (0 needs none of /dev/shm), "
                    "prefetch_factor or the batch size",
                )
            self.report(f"note: {death}; new loader processes continue from there")

    def _items(self) -> Iterator[Batch]:
        """The requested batches, until an error or the death of a worker."""
        if self._data_loader is None:
            self._data_loader = self._start()
        with _deaths_noticed_here(), _deaths_named():
            items = iter(self._data_loader)
        for _ in range(len(self._requests)):
            with _deaths_named():
                item = next(items)
            if isinstance(item, _Fault):
                raise UserError(item.fault, item.cure)
            if self._bad_images is not None:
                self._bad_images.add(self._split_name, item.bad)
            batch = item.batch
            if not self._pins:
                # The indices are kept over many batches, in case an error has to name samples.
                # Tensors from a worker would each occupy a file descriptor. Pinned memory is a
                # copy already; memory that is not pinned would make the host wait for the device.
                batch = batch._replace(indices=batch.indices.clone())
            yield batch

    def _start(self) -> DataLoader[HostBatch | _Fault]:
        parallel = self._num_workers > 0
        if parallel:
            check_worker_limits(self._num_workers, self._prefetch_factor)
            # The process that creates this folder removes it: this one, rather than a worker.
            multiprocessing.util.get_temp_dir()
        return DataLoader(
            _FaultsAsItems(self._batches),
            batch_size=None,
            sampler=self._requests,
            collate_fn=_unchanged,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_factor if parallel else None,
            persistent_workers=parallel,
            pin_memory=self._pins,
            worker_init_fn=_follow_parent,
            # A separate one, so that starting an epoch does not change the run's generator.
            generator=torch.Generator(),
        )


class _Requests:
    """A sampler that is set for every epoch."""

    def __init__(self) -> None:
        self._epoch = 0
        self._batches: list[Indices] = []

    def set(self, epoch: int, batches: list[Indices]) -> None:
        self._epoch, self._batches = epoch, batches

    def __iter__(self) -> Iterator[Request]:
        return ((self._epoch, batch) for batch in self._batches)

    def __len__(self) -> int:
        return len(self._batches)


class _FaultsAsItems(Dataset[HostBatch | _Fault]):
    def __init__(self, batches: Dataset[HostBatch]) -> None:
        self._batches = batches

    def __getitem__(self, request: Request) -> HostBatch | _Fault:
        try:
            item = self._batches[request]
        except UserError as error:
            return _Fault(error.fault, error.cure)
        if get_worker_info() is None:
            return item
        try:
            # torch would do it in a thread of the worker, where a failure goes unnoticed.
            for tensor in item.batch:
                if tensor is not None:
                    tensor.share_memory_()
        except RuntimeError as error:
            return _Fault(
                f"a loader process cannot hand over a batch ({error})",
                "enlarge the shared memory /dev/shm, load without processes (--num-workers 0), or "
                "lower prefetch_factor or the batch size",
            )
        return item


def _unchanged(item: Any) -> Any:
    return item


def _warn(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=2)


def _follow_parent(_worker: int) -> None:
    """In a worker: leave signals to the parent process, and end with it."""
    # Ctrl-C reaches the whole process group, and a forked worker inherits the parent's handlers.
    # But the parent decides when to stop, and must be able to end its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True, name="parent watch").start()


def _end_with_parent() -> None:
    # torch's own watch reads the parent's number when it starts. If the run was killed just before,
    # it watches another process, and the worker would never end.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _deaths_named() -> Iterator[None]:
    try:
        yield
    except _SIGNS_OF_DEATH as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise _WorkerDied(str(error) or type(error).__name__) from None


@contextlib.contextmanager
def _deaths_noticed_here() -> Iterator[None]:
    """Remove the handler of SIGCHLD that torch sets when it starts workers.

    It raises wherever the main thread is when a worker dies: even within a step or a save. Without
    it, a death is noticed within 5 seconds, where the batch of the worker is missing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if str(getattr(before, "__module__", "")).startswith("torch."):
            before = signal.SIG_DFL
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)
