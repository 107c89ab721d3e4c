"""Batches put together in host memory: files decoded, rows of arrays gathered.

What a batch holds is a function of the request and the seed alone, so it does not matter which
process makes it.
"""

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from training_framework.data.bad_images import BadImages
from training_framework.data.batch import Batch
from training_framework.data.decoding import (
    Pixels,
    decode_center_crop,
    decode_random_resized_crop,
)
from training_framework.data.draws import Purpose, SampleGenerators
from training_framework.data.sampling import Indices
from training_framework.data.splits import ArraySplit, FileSplit, PackedSplit
from training_framework.errors import UserError, one_line

__all__ = [
    "ArrayBatches",
    "FileBatches",
    "HostBatch",
    "Request",
    "StorageFault",
    "read_picture",
]

_MOST_FILE_BYTES = 1 << 30
_NONE = -1
_PACK_AGAIN = "check the disk and pack again"

# What is asked for: the epoch and the samples of one batch. The epoch travels along because loader
# processes outlive it, and because a sample's random crop is a function of seed, epoch and sample.
Request = tuple[int, Indices]


class HostBatch(NamedTuple):
    """A batch, and the pictures met in making it that could not be decoded: reasons by name."""

    batch: Batch
    bad: Mapping[str, str]


class StorageFault(UserError):
    """A file cannot be read, which says nothing about the picture in it."""


class _Files:
    """The files of a split, with their paths as two arrays.

    A tuple of strings, touched by forked workers, is copied into each of them page by page, because
    reading a Python object writes its reference count.
    """

    def __init__(self, split: FileSplit) -> None:
        encoded = [path.encode("utf-8", "surrogateescape") for path in split.paths]
        self._root = split.root
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._characters = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def name_of(self, sample: int) -> str:
        start = self._ends[sample - 1] if sample else 0
        path = self._characters[start : self._ends[sample]].tobytes()
        return str(self._root / path.decode("utf-8", "surrogateescape"))

    def read(self, sample: int) -> bytes:
        return read_picture(Path(self.name_of(sample)))

    def refuse_damaged(self, sample: int, data: bytes) -> None:
        """A file does not tell what it held."""


class _PackedPictures:
    """The pictures of a split in a packed file."""

    def __init__(self, split: PackedSplit) -> None:
        self._file = split.file
        self._rows = split.rows
        self.name_of = split.name_of

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, sample: int) -> bytes:
        try:
            return self._file.read(int(self._rows[sample]))
        except OSError as error:
            raise StorageFault(f"{self.name_of(sample)}: {error.strerror}", _PACK_AGAIN) from None

    def refuse_damaged(self, sample: int, data: bytes) -> None:
        """What cannot be decoded, though it could be when it was packed, is no bad picture."""
        if not self._file.is_intact(int(self._rows[sample]), data):
            raise StorageFault(
                f"{self.name_of(sample)}: is not as it was packed (checksum)", _PACK_AGAIN
            )


def read_picture(path: Path) -> bytes:
    """The bytes of a picture's file.

    Raises:
        StorageFault: It cannot be read.
        UserError: It is too large for a picture.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise StorageFault(f"{path}: is no file", "name another")
        if status.st_size <= _MOST_FILE_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise StorageFault(
            f"{path}: {error.strerror}", "restore the file or list the folder anew"
        ) from None
    raise UserError(
        f"{path}: {status.st_size:,} bytes are more than {_MOST_FILE_BYTES:,}",
        "replace or delete the file",
    )


class FileBatches(Dataset[HostBatch]):
    """Decoded batches of a file split: random resized crops to train on, centre crops otherwise.

    A picture that cannot be decoded is an error; with `bad_images` it is passed over. In training,
    the next picture of the split that can be decoded then stands in its place, cropped with the
    bad one's draws: mostly one of the same class, since folders are listed by class. In evaluation
    its place holds nothing and is not valid. A file that cannot be read is an error either way: a
    storage that fails must not pass for bad pictures.

    Args:
        split: The files, or pictures in a packed file.
        image_size: Side in pixels of the crops.
        train: Random crops.
        seed: Draws them, with epoch and sample.
        bad_images: Says how many may be bad.
    """

    def __init__(
        self,
        split: FileSplit | PackedSplit,
        *,
        image_size: int,
        train: bool,
        seed: int,
        bad_images: BadImages | None = None,
    ) -> None:
        self._files = _Files(split) if isinstance(split, FileSplit) else _PackedPictures(split)
        self._labels = split.labels
        self._image_size = image_size
        self._train = train
        self._generators = SampleGenerators(seed, Purpose.DECODING)
        self._passes_over = bad_images is not None
        self._candidates = 1
        if bad_images is not None and train:
            # So many bad ones in a row end the run when they are counted.
            self._candidates = bad_images.limit("train") + 1

    def __getitem__(self, request: Request) -> HostBatch:
        epoch, samples = request
        size = self._image_size
        images: Pixels = np.empty((len(samples), size, size, 3), dtype=np.uint8)
        taken, bad = samples.copy(), dict[str, str]()
        for row, sample in enumerate(samples.tolist()):
            if self._passes_over:
                taken[row] = self._first_whole(images[row], sample, epoch, bad)
            else:
                self._decode(images[row], sample, epoch, drawn_for=sample)
        valid = None
        if bad and not self._train:
            valid, taken = torch.from_numpy(taken != _NONE), samples
        indices = torch.from_numpy(taken)
        batch = Batch(torch.from_numpy(images), self._labels[indices], indices, valid)
        return HostBatch(batch, bad)

    def _first_whole(self, pixels: Pixels, sample: int, epoch: int, bad: dict[str, str]) -> int:
        """Decode a sample, or what stands in for it, into `pixels`: its number, or `_NONE`."""
        for candidate in range(sample, sample + self._candidates):
            candidate %= len(self._files)  # noqa: PLW2901
            try:
                self._decode(pixels, candidate, epoch, drawn_for=sample)
                return candidate
            except StorageFault:
                raise
            except UserError as error:
                name = self._files.name_of(candidate)
                bad[name] = error.fault.removeprefix(one_line(f"{name}:")).strip()
        pixels[:] = 0
        return _NONE

    def _decode(self, pixels: Pixels, sample: int, epoch: int, *, drawn_for: int) -> None:
        name, data = self._files.name_of(sample), self._files.read(sample)
        try:
            if self._train:
                rng = self._generators.of(epoch, drawn_for)
                decode_random_resized_crop(data, name, size=self._image_size, rng=rng, out=pixels)
            else:
                decode_center_crop(data, name, size=self._image_size, out=pixels)
        except UserError:
            self._files.refuse_damaged(sample, data)
            raise


class ArrayBatches(Dataset[HostBatch]):
    """Batches of an array split that stays in host memory."""

    def __init__(self, split: ArraySplit) -> None:
        self._images = split.images.permute(0, 2, 3, 1).contiguous()
        self._labels = split.labels

    def __getitem__(self, request: Request) -> HostBatch:
        indices = torch.from_numpy(request[1])
        return HostBatch(Batch(self._images[indices], self._labels[indices], indices), {})
