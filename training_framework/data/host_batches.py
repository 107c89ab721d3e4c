"""Batches assembled in host memory: decoded files, or gathered rows of arrays.

The content of a batch depends only on the request and the seed, so any process can make it.
"""

from collections.abc import Mapping
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
from training_framework.data.image_files import StorageFault
from training_framework.data.resolution import Resolutions
from training_framework.data.sampling import Indices
from training_framework.data.splits import ArraySplit, EncodedSplit
from training_framework.errors import UserError, one_line

__all__ = [
    "ArrayBatches",
    "FileBatches",
    "HostBatch",
    "Request",
]

_NONE = -1

# A request for one batch: the epoch and the samples. It includes the epoch because loader processes
# outlive it, and because a sample's random crop is a function of seed, epoch and sample.
Request = tuple[int, Indices]


class HostBatch(NamedTuple):
    """A batch, and the reasons, by image name, why images could not be decoded."""

    batch: Batch
    bad: Mapping[str, str]


class FileBatches(Dataset[HostBatch]):
    """Decoded batches of encoded images: random resized crops to train on, else centre crops.

    An image that cannot be decoded is an error; with `bad_images` it is skipped. In training, the
    next image of the split that can be decoded replaces it, cropped by the draws of the bad one.
    Folders are listed by class, so this is mostly an image of the same class. In evaluation, the
    place of the bad image stays empty and is not valid. A file that cannot be read is always an
    error: failing storage must not be mistaken for bad images.

    Args:
        split: The encoded images.
        image_size: Side in pixels of the crops.
        resolutions: That side by epoch, instead of `image_size`; None: always the same.
        train: Whether to take random crops.
        seed: Draws the crops, with epoch and sample.
        bad_images: Knows how many images may be bad; None: a bad image is an error.
    """

    def __init__(
        self,
        split: EncodedSplit,
        *,
        image_size: int,
        train: bool,
        seed: int,
        resolutions: Resolutions | None = None,
        bad_images: BadImages | None = None,
    ) -> None:
        self._encoded = split.images()
        self._labels = split.labels
        self._resolutions = resolutions or Resolutions(((0, image_size),))
        self._train = train
        self._generators = SampleGenerators(seed, Purpose.DECODING)
        self._skips_bad = bad_images is not None
        self._candidates = 1
        if bad_images is not None and train:
            # With this many bad images in a row, counting them ends the run anyway.
            self._candidates = bad_images.limit("train") + 1

    def __getitem__(self, request: Request) -> HostBatch:
        epoch, samples = request
        size = self._resolutions.at(epoch)
        images: Pixels = np.empty((len(samples), size, size, 3), dtype=np.uint8)
        taken, bad = samples.copy(), dict[str, str]()
        for row, sample in enumerate(samples.tolist()):
            if self._skips_bad:
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
        """Decode a sample or its replacement into `pixels`; return its number, or `_NONE`."""
        for candidate in range(sample, sample + self._candidates):
            candidate %= len(self._encoded)  # noqa: PLW2901
            try:
                self._decode(pixels, candidate, epoch, drawn_for=sample)
                return candidate
            except StorageFault:
                raise
            except UserError as error:
                name = self._encoded.name_of(candidate)
                bad[name] = error.fault.removeprefix(one_line(f"{name}:")).strip()
        pixels[:] = 0
        return _NONE

    def _decode(self, pixels: Pixels, sample: int, epoch: int, *, drawn_for: int) -> None:
        name, data = self._encoded.name_of(sample), self._encoded.read(sample)
        if self._train:
            rng = self._generators.of(epoch, drawn_for)
            decode_random_resized_crop(data, name, size=len(pixels), rng=rng, out=pixels)
        else:
            decode_center_crop(data, name, size=len(pixels), out=pixels)


class ArrayBatches(Dataset[HostBatch]):
    """Batches of an array split in host memory."""

    def __init__(self, split: ArraySplit) -> None:
        self._images = split.images.permute(0, 2, 3, 1).contiguous()
        self._labels = split.labels

    def __getitem__(self, request: Request) -> HostBatch:
        indices = torch.from_numpy(request[1])
        return HostBatch(Batch(self._images[indices], self._labels[indices], indices), {})
