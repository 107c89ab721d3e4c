"""Batches made by torch's DataLoader workers: files decoded, arrays gathered."""

import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from training_framework.data.batch import Batch, prefetch_to_device
from training_framework.data.decoding import (
    Pixels,
    decode_center_crop,
    decode_random_resized_crop,
)
from training_framework.data.draws import Purpose, keyed_generator
from training_framework.data.sampling import BatchPlan, Indices
from training_framework.data.splits import ArraySplit, FileSplit
from training_framework.errors import UserError

__all__ = ["ArrayBatches", "FileBatches", "WorkerLoader"]

# What a worker is asked for: the epoch and the samples of one batch. The epoch travels along
# because workers outlive it, and because a sample's random crop is a function of seed, epoch and
# sample.
Request = tuple[int, Indices]


@dataclass(frozen=True)
class _Fault:
    """A UserError on its way out of a worker, which would otherwise turn it into a traceback."""

    fault: str
    cure: str


class _PackedPaths:
    """Many paths as two arrays.

    A tuple of strings, touched by forked workers, is copied into each of them page by page, because
    reading a Python object writes its reference count.
    """

    def __init__(self, paths: tuple[str, ...]) -> None:
        encoded = [path.encode("utf-8", "surrogateescape") for path in paths]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._characters = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        path = self._characters[start : self._ends[index]].tobytes()
        return path.decode("utf-8", "surrogateescape")


class FileBatches(Dataset[Batch]):
    """Decoded batches of a file split: random resized crops to train on, centre crops otherwise.

    Args:
        split: The files.
        image_size: Side in pixels of the crops.
        train: Random crops.
        seed: Draws them, with epoch and sample.
    """

    def __init__(self, split: FileSplit, *, image_size: int, train: bool, seed: int) -> None:
        self._root = split.root
        self._paths = _PackedPaths(split.paths)
        self._labels = split.labels
        self._image_size = image_size
        self._train = train
        self._seed = seed

    def __getitem__(self, request: Request) -> Batch:
        epoch, samples = request
        size = self._image_size
        images: Pixels = np.empty((len(samples), size, size, 3), dtype=np.uint8)
        for row, sample in enumerate(samples.tolist()):
            images[row] = self._pixels(sample, epoch)
        indices = torch.from_numpy(samples)
        return Batch(torch.from_numpy(images), self._labels[indices], indices)

    def _pixels(self, sample: int, epoch: int) -> Pixels:
        path = self._root / self._paths[sample]
        data = _read(path)
        if not self._train:
            return decode_center_crop(data, path, size=self._image_size)
        rng = keyed_generator(self._seed, Purpose.DECODING, epoch, sample)
        return decode_random_resized_crop(data, path, size=self._image_size, rng=rng)


class ArrayBatches(Dataset[Batch]):
    """Batches of an array split that stays in host memory."""

    def __init__(self, split: ArraySplit) -> None:
        self._images = split.images.permute(0, 2, 3, 1).contiguous()
        self._labels = split.labels

    def __getitem__(self, request: Request) -> Batch:
        indices = torch.from_numpy(request[1])
        return Batch(self._images[indices], self._labels[indices], indices)


class WorkerLoader:
    """A split that does not fit on the device, or has to be decoded.

    Workers start with the first epoch and stay. What a batch holds depends on the plan and the seed
    alone, not on the number of workers nor on where an epoch was resumed.

    Args:
        split: Files or arrays.
        plan: Which samples each batch takes; its seed also draws the crops.
        device: Where the batches are wanted.
        image_size: Side in pixels that files are cropped and resized to.
        num_workers: Processes; 0 loads in this one.
        prefetch_factor: Batches that each worker prepares ahead.
        pin_memory: Page-locked host memory; only for CUDA.
    """

    def __init__(
        self,
        split: ArraySplit | FileSplit,
        *,
        plan: BatchPlan,
        device: torch.device | str,
        image_size: int,
        num_workers: int = 0,
        prefetch_factor: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self._batches: Dataset[Batch]
        if isinstance(split, FileSplit):
            self._batches = FileBatches(
                split, image_size=image_size, train=plan.train, seed=plan.seed
            )
        else:
            self._batches = ArrayBatches(split)
        self.batch_count = plan.batch_count
        self._plan = plan
        self._device = torch.device(device)
        self._num_workers = num_workers
        self._prefetch_factor = prefetch_factor
        self._pin_memory = pin_memory
        self._requests = _Requests()
        self._data_loader: DataLoader[Batch | _Fault] | None = None
        self._running: Generator[Batch] | None = None

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from `start_batch` on; ends an epoch that is still open.

        Raises:
            UserError: A file cannot be read or decoded, or a worker was killed. The next epoch
                starts new workers.
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
        self._requests.epoch = epoch
        self._requests.batches = self._plan.batches(epoch, start_batch)
        for batch in prefetch_to_device(self._host_batches(), self._device):
            yield batch._replace(images=batch.images.permute(0, 3, 1, 2))

    def _host_batches(self) -> Iterator[Batch]:
        if self._data_loader is None:
            self._data_loader = self._start()
        try:
            for batch in self._data_loader:
                if isinstance(batch, _Fault):
                    raise UserError(batch.fault, batch.cure)
                yield batch
        except RuntimeError as error:
            self._data_loader = None
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                f"a data loading process died: {error}",
                "if memory was short (/dev/shm too), lower num_workers, prefetch_factor or the "
                "batch size",
            ) from None

    def _start(self) -> DataLoader[Batch | _Fault]:
        parallel = self._num_workers > 0
        return DataLoader(
            _FaultsAsItems(self._batches),
            batch_size=None,
            sampler=self._requests,
            collate_fn=_unchanged,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_factor if parallel else None,
            persistent_workers=parallel,
            pin_memory=self._pin_memory and self._device.type == "cuda",
            worker_init_fn=_leave_signals_to_parent,
            # Its own, so that starting an epoch leaves the run's generator as it is.
            generator=torch.Generator(),
        )


class _Requests:
    """The sampler that is set anew for every epoch."""

    def __init__(self) -> None:
        self.epoch = 0
        self.batches: list[Indices] = []

    def __iter__(self) -> Iterator[Request]:
        return ((self.epoch, batch) for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _FaultsAsItems(Dataset[Batch | _Fault]):
    def __init__(self, batches: Dataset[Batch]) -> None:
        self._batches = batches

    def __getitem__(self, request: Request) -> Batch | _Fault:
        try:
            return self._batches[request]
        except UserError as error:
            return _Fault(error.fault, error.cure)


def _unchanged(item: Any) -> Any:
    return item


def _leave_signals_to_parent(_worker: int) -> None:
    # Ctrl-C reaches the whole process group, and a forked worker inherits the parent's handlers:
    # the parent decides when to stop, and must be able to end its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}", "restore the file or list the folder anew"
        ) from None
