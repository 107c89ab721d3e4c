"""Opened data sets and their splits, before any loader."""

import hashlib
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError

__all__ = ["ArraySplit", "Dataset", "EncodedImages", "EncodedSplit", "Split", "sha256_of"]

_RESIZED_AT_ONCE = 4096


class Split(ABC):
    """A part of a data set: images and their labels, wherever they are stored.

    Attributes:
        labels: (N,) int64.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def take(self, samples: Tensor) -> "Split":
        """The split of these samples: (n,) int64 positions, in their order."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256, as hexadecimal text, of everything here that affects a run's result."""

    def name_of(self, sample: int) -> str:
        """The name of a sample in messages; its position if it has no name."""
        return str(sample)

    def array(self, device: torch.device | str) -> "ArraySplit":
        """The images as one array, perhaps made on the device; not for an `EncodedSplit`."""
        raise NotImplementedError

    def limited(self, count: int, *, seed: int) -> "Split":
        """A part of the split: `count` samples, drawn evenly over the classes, in their order.

        Every class contributes the same number of samples or one more, or all that it has.

        Args:
            count: Samples to keep, at most as many as there are.
            seed: Draws the samples. With the same seed, a larger count keeps the samples of a
                smaller one and adds others.
        """
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(len(self), generator=generator)
        by_class = shuffled[torch.argsort(self.labels[shuffled], stable=True)]
        sizes = torch.bincount(self.labels)
        starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        turn = torch.arange(len(self)) - starts
        return self.take(by_class[torch.argsort(turn, stable=True)[:count]].sort().values)


class EncodedImages(Protocol):
    """The encoded images of a split, as loader processes read them."""

    def __len__(self) -> int: ...

    def name_of(self, sample: int) -> str:
        """The name of a sample in messages."""
        ...

    def read(self, sample: int) -> bytes:
        """The bytes of an encoded image.

        Raises:
            StorageFault: They cannot be read, or differ from the bytes that were stored.
            UserError: They are too many for an image.
        """
        ...


class EncodedSplit(Split):
    """Images that are stored encoded (JPEG, PNG, ...), to be decoded one by one."""

    @property
    @abstractmethod
    def place(self) -> Path:
        """Where the images are, for messages."""

    @abstractmethod
    def images(self) -> EncodedImages:
        """The images, in a form that forked processes can share."""

    def refuse_empty(self) -> None:
        """Refuse empty files, which otherwise might only be found at the end of an epoch.

        Raises:
            UserError: A file is empty.
        """


@dataclass(frozen=True, eq=False)
class ArraySplit(Split):
    """Images as one array.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        made_from: Digest of the originals that the images were computed from; empty if they are the
            originals.
    """

    images: Tensor
    labels: Tensor
    made_from: str = ""

    def take(self, samples: Tensor) -> Self:
        """The split of these samples: (n,) int64 positions, in their order."""
        made_from = self.made_from and sha256_of(self.made_from, samples.numpy())
        return replace(
            self, images=self.images[samples], labels=self.labels[samples], made_from=made_from
        )

    def array(self, device: torch.device | str) -> "ArraySplit":
        """The split itself; `device` is ignored."""
        return self

    def digest(self) -> str:
        """SHA-256 of all pixels, their shape and the labels, as hexadecimal text.

        For resized images it covers the originals and the new size instead, so that it does not
        depend on the rounding of a machine. It reads all originals: 0.3 s for CIFAR-10.
        """
        if self.made_from:
            return self.made_from
        pixels = self.images.cpu().contiguous().numpy()
        return sha256_of(str(pixels.shape), pixels, self.labels.cpu().numpy())

    def resized(self, size: int) -> "ArraySplit":
        """The split with images of `size` by `size` pixels, resized bilinearly, antialiased."""
        if self.images.shape[-2:] == (size, size):
            return self
        parts = [
            functional.interpolate(part, (size, size), mode="bilinear", antialias=True)
            for part in self.images.split(_RESIZED_AT_ONCE)
        ]
        return ArraySplit(torch.cat(parts), self.labels, sha256_of(self.digest(), f"{size} px"))


def sha256_of(*parts: str | bytes | NDArray[Any]) -> str:
    """SHA-256 of several parts and their boundaries, as hexadecimal text."""
    digest = hashlib.sha256()
    for part in parts:
        content: Any = part.encode() if isinstance(part, str) else part
        if isinstance(content, np.ndarray):
            content = np.ascontiguousarray(content)
        view = memoryview(content).cast("B") if len(content) else memoryview(b"")
        digest.update(b"%d:" % len(view))
        digest.update(view)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Dataset:
    """An opened data set: its facts, its two splits, and notes to show the user."""

    facts: DatasetFacts
    train: Split
    val: Split
    notes: tuple[str, ...] = ()

    def digest(self) -> str:
        """SHA-256 of the class names and of the digests of both splits, as hexadecimal text.

        Two data sets with the same digest train alike. The `digest` of each kind of split
        documents its coverage and its cost.

        Raises:
            UserError: A file is missing.
        """
        names = "\0".join(self.facts.class_names)
        return sha256_of(os.fsencode(names), self.train.digest(), self.val.digest())

    def with_train_images(self, count: int, *, seed: int) -> "Dataset":
        """The data set with only `count` training images, drawn by `Split.limited`.

        Raises:
            UserError: It has fewer.
        """
        found = self.facts.train_images
        if count > found:
            raise UserError(
                f"limit_train_images is {count}, but {self.facts.name} has {found} training images",
                f"lower it to {found} or remove it",
            )
        image_bytes = self.facts.array_bytes // (found + self.facts.val_images)
        facts = replace(
            self.facts,
            train_images=count,
            array_bytes=image_bytes * (count + self.facts.val_images),
        )
        return Dataset(facts, self.train.limited(count, seed=seed), self.val, self.notes)
