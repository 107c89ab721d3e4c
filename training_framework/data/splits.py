"""Data sets in memory: what a source opens, before any loader."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from training_framework.data.facts import DatasetFacts
from training_framework.data.shards.packed_file import PackedFile
from training_framework.errors import UserError

__all__ = [
    "ArraySplit",
    "Dataset",
    "FileSplit",
    "PackedSplit",
    "Split",
    "SyntheticSplit",
    "limit_split",
]

_RESIZED_AT_ONCE = 4096
_GENERATED_BYTES_AT_ONCE = 1 << 28


@dataclass(frozen=True, eq=False)
class ArraySplit:
    """Images as one array.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def resized(self, size: int) -> "ArraySplit":
        """The split with images of `size` by `size` pixels: bilinear, antialiased where smaller."""
        if self.images.shape[-2:] == (size, size):
            return self
        pieces = [
            functional.interpolate(piece, (size, size), mode="bilinear", antialias=True)
            for piece in self.images.split(_RESIZED_AT_ONCE)
        ]
        return ArraySplit(torch.cat(pieces), self.labels)


@dataclass(frozen=True, eq=False)
class FileSplit:
    """Images in files.

    Attributes:
        root: Folder that the paths are relative to.
        paths: One a sample.
        labels: (N,) int64.
    """

    root: Path
    paths: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def place(self) -> Path:
        """Where the pictures are."""
        return self.root

    def name_of(self, sample: int) -> str:
        """What to call a sample in messages: its path."""
        return str(self.root / self.paths[sample])


@dataclass(frozen=True, eq=False)
class PackedSplit:
    """Picture files in a packed file.

    Attributes:
        file: The packed file.
        rows: (N,) int64, their rows in it.
        labels: (N,) int64.
    """

    file: PackedFile
    rows: NDArray[np.int64]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def place(self) -> Path:
        """Where the pictures are."""
        return self.file.path

    def name_of(self, sample: int) -> str:
        """What to call a sample in messages: the file, and the sample's split and path in it."""
        return f"{self.file.path}/{self.file.name_of(int(self.rows[sample]))}"


@dataclass(frozen=True)
class SyntheticSplit:
    """Images made up on the device: a coarse pattern a class, under noise, so it can be learnt.

    Attributes:
        count: Images; the classes take turns.
        num_classes: Classes.
        image_size: Side in pixels.
        seed: Draws the classes' patterns; splits of one set share it.
        stream: Draws the noise; splits of one set differ in it.
    """

    count: int
    num_classes: int
    image_size: int
    seed: int
    stream: int = 0

    def __len__(self) -> int:
        return self.count

    def materialize(self, device: torch.device | str) -> ArraySplit:
        """Make the images on the device: (count, 3, S, S) uint8, channels_last in memory.

        The same arguments give the same images on the same kind of device.
        """
        device = torch.device(device)
        side = self.image_size
        generator = torch.Generator(device).manual_seed(self.seed)
        patterns = 80 + 96 * torch.rand(
            (self.num_classes, 3, 4, 4), generator=generator, device=device
        )
        # Where a seed is so large, its product goes round: PyTorch takes 63 bits.
        generator.manual_seed(((self.seed + 1) * 1_000_003 + self.stream) % 2**63)
        labels = torch.arange(self.count, device=device) % self.num_classes
        images = torch.empty((self.count, side, side, 3), dtype=torch.uint8, device=device)
        at_once = max(1, _GENERATED_BYTES_AT_ONCE // (4 * 3 * side * side))
        for start in range(0, self.count, at_once):
            own = patterns[labels[start : start + at_once]]
            smooth = functional.interpolate(own, (side, side), mode="bilinear")
            noise = torch.randn(smooth.shape, generator=generator, device=device)
            pixels = noise.mul_(48).add_(smooth).clamp_(0, 255)
            images[start : start + at_once] = pixels.permute(0, 2, 3, 1)
        return ArraySplit(images.permute(0, 3, 1, 2), labels)


Split = ArraySplit | FileSplit | PackedSplit | SyntheticSplit


def limit_split(split: Split, count: int, *, seed: int) -> Split:
    """A part of a split: `count` of its samples, drawn evenly over the classes, in their order.

    Every class gives the same number of samples, or one more, or all where it has fewer.

    Args:
        split: Of at least `count` samples.
        count: Samples to keep.
        seed: Draws them; the same seed draws the same samples, and of two counts the larger one's
            contain the smaller one's.
    """
    if isinstance(split, SyntheticSplit):  # its classes take turns
        return replace(split, count=count)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(split), generator=generator)
    by_class = shuffled[torch.argsort(split.labels[shuffled], stable=True)]
    sizes = torch.bincount(split.labels)
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    turn = torch.arange(len(split)) - starts
    kept = by_class[torch.argsort(turn, stable=True)[:count]].sort().values
    if isinstance(split, FileSplit):
        paths = tuple(split.paths[index] for index in kept.tolist())
        return replace(split, paths=paths, labels=split.labels[kept])
    if isinstance(split, PackedSplit):
        return replace(split, rows=split.rows[kept.numpy()], labels=split.labels[kept])
    return ArraySplit(split.images[kept], split.labels[kept])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, opened: its facts, its two splits, and lines to show the user."""

    facts: DatasetFacts
    train: Split
    val: Split
    notes: tuple[str, ...] = ()

    def with_train_images(self, count: int, *, seed: int) -> "Dataset":
        """The set with `count` of its training images, drawn as `limit_split` does.

        Raises:
            UserError: It has fewer.
        """
        found = self.facts.train_images
        if count > found:
            raise UserError(
                f"limit_train_images is {count}, but {self.facts.name} has {found} training images",
                f"lower it to {found} or leave it out",
            )
        image_bytes = self.facts.array_bytes // (found + self.facts.val_images)
        facts = replace(
            self.facts,
            train_images=count,
            array_bytes=image_bytes * (count + self.facts.val_images),
        )
        return Dataset(facts, limit_split(self.train, count, seed=seed), self.val, self.notes)
