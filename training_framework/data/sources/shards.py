"""Tar shards in the format of WebDataset (`train-000000.tar`, `val-000000.tar`), read at random."""

import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training_framework.data.facts import DatasetFacts
from training_framework.data.image_files import StorageFault
from training_framework.data.shards.shard_index import (
    INDEX_FILE,
    ShardIndex,
    build_index,
    open_index,
    shard_files,
)
from training_framework.data.sources.folder import IMAGENET_MEAN, IMAGENET_STD
from training_framework.data.sources.source import DataSource
from training_framework.data.splits import Dataset, EncodedSplit, sha256_of
from training_framework.errors import UserError

__all__ = ["SOURCE", "ShardSplit", "open_shards", "verify_shards"]

_DEFAULT_IMAGE_SIZE = 224
_MAX_NAMED = 5
_RESTORE = "restore the shard or pack again"


@dataclass(frozen=True, eq=False)
class ShardSplit(EncodedSplit):
    """Images in tar shards.

    Attributes:
        folder: The folder of the shards.
        index: Index of all shards.
        rows: (N,) int64, positions in the index.
        labels: (N,) int64.
    """

    folder: Path
    index: ShardIndex
    rows: NDArray[np.int64]
    labels: Tensor

    @property
    def place(self) -> Path:
        """The folder."""
        return self.folder

    def name_of(self, sample: int) -> str:
        """The name of a sample in messages: folder, shard and member."""
        return f"{self.folder}/{self.index.name_of(int(self.rows[sample]))}"

    def take(self, samples: Tensor) -> "ShardSplit":
        """The split of these samples: (n,) int64 positions, in their order."""
        return replace(self, rows=self.rows[samples.numpy()], labels=self.labels[samples])

    def digest(self) -> str:
        """SHA-256 of the images' checksums and sizes, in order, and of the labels, as text.

        It covers the contents without reading them, but not the names of the members.
        """
        index = self.index
        return sha256_of(index.checksums[self.rows], index.lengths[self.rows], self.labels.numpy())

    def images(self) -> "_ShardImages":
        """The images, read by their positions."""
        return _ShardImages(self)

    def refuse_empty(self) -> None:
        """Refuse empty members, which otherwise might only be found at the end of an epoch.

        Raises:
            UserError: A member is empty.
        """
        empty = np.flatnonzero(self.index.lengths[self.rows] == 0)
        if len(empty):
            raise UserError(f"{self.name_of(int(empty[0]))}: is empty", "write the shard again")


class _ShardImages:
    """Reads the images of a split and checks the checksum of each.

    It uses `pread` rather than a memory mapping: on a failing disk, or in a shard that became
    shorter, `pread` raises an error, whereas a mapping ends the process by a signal.
    """

    def __init__(self, split: ShardSplit) -> None:
        self._index, self._rows = split.index, split.rows
        self._shards = [str(split.folder / name) for name, _ in split.index.shards]
        self.name_of = split.name_of

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, sample: int) -> bytes:
        shard, offset, length, checksum = self._index.table[:4, self._rows[sample]].tolist()
        try:
            # Opened for each image, which costs 3 us: there may be too many shards to keep open.
            descriptor = os.open(self._shards[shard], os.O_RDONLY)
            try:
                data = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageFault(f"{self.name_of(sample)}: {error.strerror}", _RESTORE) from None
        if len(data) < length:
            raise StorageFault(f"{self.name_of(sample)}: the shard has become shorter", _RESTORE)
        if zlib.crc32(data) != checksum:
            raise StorageFault(
                f"{self.name_of(sample)}: has changed since it was indexed (checksum)",
                f"{_RESTORE}; if the change was intended, delete {INDEX_FILE}",
            )
        return data


def verify_shards(folder: Path) -> None:
    """Read all shards of a folder and compare every image, name and label with the index.

    Raises:
        UserError: Something differs, or a shard is damaged.
    """
    _, index, _ = open_index(folder)
    images = ShardSplit(
        folder, index, np.arange(len(index)), torch.from_numpy(index.labels)
    ).images()
    wrong = []
    for row in range(len(index)):
        try:
            images.read(row)
        except StorageFault:
            wrong.append(index.name_of(row))
    if not wrong:
        found, _ = build_index(folder)
        for row in range(len(index)):
            if (
                len(found) != len(index)
                or (found.table[:5, row] != index.table[:5, row]).any()
                or found.name_of(row) != index.name_of(row)
            ):
                wrong.append(index.name_of(row))
    if wrong:
        more = ", ..." if len(wrong) > _MAX_NAMED else ""
        raise UserError(
            f"{folder}: {len(wrong)} of {len(index)} images have changed since they were indexed: "
            f"{', '.join(wrong[:_MAX_NAMED])}{more}",
            _RESTORE,
        )


def open_shards(*, root: Path | None, image_size: int | None = None) -> Dataset:
    """Open a folder of tar shards, without decoding any image.

    Each sample is an image (`KEY.jpg`, `.png`, `.webp`, ...) and its class number in text
    (`KEY.cls`); other members are skipped. Class names come from `dataset.json` or `classes.txt`
    (one per line); without them, the names are the numbers. The first time, all shards are read to
    build an index, which is then kept next to them.

    Args:
        root: The folder.
        image_size: Side in pixels of the network's input images; None: 224, or the side to which
            the images were scaled down if that is smaller.

    Raises:
        UserError: A shard is missing, damaged, or has content of another kind.
    """
    if root is None:
        raise UserError("data is shards, but data_root is not set", "set data_root to their folder")
    info, index, notes = open_index(root)
    rows = np.split(np.arange(len(index)), [index.train_images])
    labels = torch.from_numpy(index.labels)
    train, val = (ShardSplit(root, index, part, labels[part]) for part in rows)
    facts = DatasetFacts(
        name=root.resolve().name,
        train_images=len(train),
        val_images=len(val),
        class_names=tuple(info.class_names),
        image_size=image_size or min(_DEFAULT_IMAGE_SIZE, info.shorter_side or _DEFAULT_IMAGE_SIZE),
        storage="files",
        array_bytes=0,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    return Dataset(facts, train, val, notes)


SOURCE = DataSource(
    open=lambda asked: open_shards(root=asked.root, image_size=asked.image_size),
    recognizes=lambda root: bool(shard_files(root)[0]),
    layout="tar shards (train-*.tar, val-*.tar)",
)
