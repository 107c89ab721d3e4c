"""Encoded images, one per file."""

import hashlib
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from training_framework.data.splits import EncodedSplit, sha256_of
from training_framework.errors import UserError

__all__ = ["MAX_IMAGE_BYTES", "FileSplit", "StorageFault", "read_image"]

MAX_IMAGE_BYTES = 1 << 30


class StorageFault(UserError):
    """A file cannot be read; the image in it may still be good."""


@dataclass(frozen=True, eq=False)
class FileSplit(EncodedSplit):
    """Images in files.

    Attributes:
        root: The folder that the paths are relative to.
        paths: One path per sample.
        labels: (N,) int64.
    """

    root: Path
    paths: tuple[str, ...]
    labels: Tensor

    @property
    def place(self) -> Path:
        """The folder."""
        return self.root

    def name_of(self, sample: int) -> str:
        """The name of a sample in messages: its path."""
        return str(self.root / self.paths[sample])

    def take(self, samples: Tensor) -> "FileSplit":
        """The split of these samples: (n,) int64 positions, in their order."""
        paths = tuple(self.paths[sample] for sample in samples.tolist())
        return replace(self, paths=paths, labels=self.labels[samples])

    def images(self) -> "_Files":
        """The files, with their paths as arrays."""
        return _Files(self)

    def digest(self) -> str:
        """SHA-256 of the files' relative paths and sizes, in order, and of the labels, as text.

        It does not read the contents, so it misses a change that keeps the size of a file. It takes
        one `stat` per file: about 3 s for ImageNet's 1.3 million, once the directories are in
        memory.

        Raises:
            UserError: A file is missing.
        """
        listing = hashlib.sha256()
        for path, size in zip(self.paths, self._sizes(), strict=True):
            listing.update(b"%s\0%d\0" % (os.fsencode(path), size))
        return sha256_of(listing.digest(), self.labels.numpy())

    def refuse_empty(self) -> None:
        """Refuse empty files, which otherwise might only be found at the end of an epoch.

        Raises:
            UserError: A file is empty, or its size cannot be read.
        """
        for sample, size in enumerate(self._sizes()):
            if size == 0:
                raise UserError(f"{self.name_of(sample)}: is empty", "replace or delete the file")

    def _sizes(self) -> list[int]:
        prefix = os.path.join(self.root, "")  # noqa: PTH118, since Path costs ten times as much
        try:
            return [os.stat(prefix + path).st_size for path in self.paths]  # noqa: PTH116
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}", "restore the file") from None


class _Files:
    """The files of a split, with their paths as two arrays.

    Forked workers would copy a tuple of strings page by page, because reading a Python object
    changes its reference count.
    """

    def __init__(self, split: FileSplit) -> None:
        encoded = [os.fsencode(path) for path in split.paths]
        self._root = split.root
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._characters = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def name_of(self, sample: int) -> str:
        start = self._ends[sample - 1] if sample else 0
        return str(self._root / os.fsdecode(self._characters[start : self._ends[sample]].tobytes()))

    def read(self, sample: int) -> bytes:
        return read_image(Path(self.name_of(sample)))


def read_image(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        StorageFault: It cannot be read.
        UserError: It is too large for an image.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block
            raise StorageFault(f"{path}: not a file", "name another file")
        if status.st_size <= MAX_IMAGE_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise StorageFault(
            f"{path}: {error.strerror}", "restore the file, or start again to list the folder anew"
        ) from None
    raise UserError(
        f"{path}: {status.st_size:,} bytes are more than {MAX_IMAGE_BYTES:,}",
        "replace or delete the file",
    )
