"""Batches made by torch's DataLoader workers, which are restarted if they die."""

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
from training_framework.data.sampling import BatchPlan, Indices
from training_framework.data.splits import ArraySplit, EncodedSplit
from training_framework.errors import UserError

__all__ = ["WorkerLoader"]

_RESTARTS_PER_EPOCH = 2
# What a torch DataLoader raises when a worker has died or is dying.
_SIGNS_OF_DEATH = (RuntimeError, ConnectionError, EOFError, FileNotFoundError)


@dataclass(frozen=True)
class _Fault:
    """A UserError sent from a worker, which would otherwise turn it into a traceback."""

    fault: str
    cure: str


class _WorkerDied(Exception):
    """A loader process is gone; the text says what torch knows of it."""


class WorkerLoader:
    """A split that does not fit on the device, or has to be decoded.

    Workers start with the first epoch and stay. What a batch holds depends on the plan and the seed
    alone, not on the number of workers nor on where an epoch was resumed. So a worker that is
    killed costs a few seconds: new ones go on with the batch that is missing, twice an epoch.

    Args:
        split: Encoded images or arrays.
        plan: Which samples each batch takes; its seed also draws the crops.
        device: Where the batches are wanted.
        image_size: Side in pixels that files are cropped and resized to.
        num_workers: Processes; 0 loads in this one.
        prefetch_factor: Batches that each worker prepares ahead.
        pin_memory: Page-locked host memory; only for CUDA.
        bad_images: Notes images that cannot be decoded and are skipped; None: each is an error.

    Attributes:
        report: Shows a line to the user; a warning, unless set.
    """

    def __init__(
        self,
        split: ArraySplit | EncodedSplit,
        *,
        plan: BatchPlan,
        device: torch.device | str,
        image_size: int,
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
        """The batches of an epoch, from `start_batch` on; ends an epoch that is still open.

        Raises:
            UserError: A file cannot be read or decoded, too many are bad, or workers die again and
                again. The next epoch starts new workers.
        """
        if self._running is not None:
            self._running.close()
        self._running = self._epoch(epoch, start_batch)
        return self._running

    def close(self) -> None:
        """End the workers; another epoch starts new ones."""
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
            # Here, where no traceback holds on to the loader, letting go of it ends its workers.
            self._data_loader = None
            deaths += 1
            if deaths > _RESTARTS_PER_EPOCH:
                raise UserError(
                    f"data loading processes died {deaths} times in an epoch: {death}",
                    "if memory was short (/dev/shm too), lower num_workers, prefetch_factor or the "
                    "batch size",
                )
            self.report(f"note: {death}; new loader processes continue from there")

    def _items(self) -> Iterator[Batch]:
        """What is requested, until an error, or a worker's death."""
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
                # The indices are kept for as long as they may have to be named, over many batches;
                # what comes from a worker would hold a file descriptor each. Pinned memory is a
                # copy already, and one that is not pinned would make the host wait for the device.
                batch = batch._replace(indices=batch.indices.clone())
            yield batch

    def _start(self) -> DataLoader[HostBatch | _Fault]:
        parallel = self._num_workers > 0
        if parallel:
            # Made by the first process, it is removed by it, whatever becomes of its workers.
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
            # Its own, so that starting an epoch leaves the run's generator as it is.
            generator=torch.Generator(),
        )


class _Requests:
    """The sampler that is set anew for every epoch."""

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
            # torch would do it in a thread of the worker, whose failure nobody hears of.
            for tensor in item.batch:
                if tensor is not None:
                    tensor.share_memory_()
        except RuntimeError as error:
            return _Fault(
                f"a batch cannot be handed over by a loader process ({error})",
                "make /dev/shm larger, or lower num_workers, prefetch_factor or the batch size",
            )
        return item


def _unchanged(item: Any) -> Any:
    return item


def _warn(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=2)


def _follow_parent(_worker: int) -> None:
    """In a worker: leave signals to its parent, and end with it."""
    # Ctrl-C reaches the whole process group, and a forked worker inherits the parent's handlers:
    # the parent decides when to stop, and must be able to end its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True, name="parent watch").start()


def _end_with_parent() -> None:
    # torch's own watch takes whoever is the parent when it starts for the parent: where the run was
    # killed just before, the worker would outlive it for good.
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
    """Take back torch's handler of SIGCHLD, which starting workers sets.

    It raises wherever the main thread happens to be when a worker dies: in the middle of a step, or
    of a save. Without it a death is noticed, within 5 seconds, where its batch is missing.
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
