"""Synthetic images of any size and number of classes, for measuring and for trying things out."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from training_framework.data.facts import DatasetFacts
from training_framework.data.sources.source import DatasetRequest, DataSource
from training_framework.data.splits import ArraySplit, Dataset, Split, sha256_of

__all__ = ["SOURCE", "SyntheticSplit", "open_synthetic"]

_DEFAULT_IMAGE_SIZE = 32
_DEFAULT_NUM_CLASSES = 10
_GENERATED_BYTES_AT_ONCE = 1 << 28


@dataclass(frozen=True)
class SyntheticSplit(Split):
    """Images made on the device: a coarse pattern per class, under noise, so they can be learnt.

    Attributes:
        count: Number of images; the classes alternate.
        num_classes: Number of classes.
        image_size: Side in pixels.
        seed: Draws the patterns of the classes; the splits of a data set share it.
        stream: Draws the noise; the splits of a data set differ in it.
    """

    count: int
    num_classes: int
    image_size: int
    seed: int
    stream: int = 0

    def __len__(self) -> int:
        return self.count

    def digest(self) -> str:
        """SHA-256 of the parameters that determine the images, as hexadecimal text."""
        return sha256_of(repr(self))

    @property
    def labels(self) -> Tensor:  # type: ignore[override]
        """(N,) int64."""
        return torch.arange(self.count) % self.num_classes

    def limited(self, count: int, *, seed: int) -> "SyntheticSplit":
        """The first `count` images, in which the classes alternate too."""
        return replace(self, count=count)

    def take(self, samples: Tensor) -> ArraySplit:
        """The images of these samples, made in host memory: (n,) int64 positions."""
        return self.array("cpu").take(samples)

    def array(self, device: torch.device | str) -> ArraySplit:
        """Make the images on the device: (count, 3, S, S) uint8, channels_last in memory.

        The same arguments give the same images on the same kind of device.
        """
        device = torch.device(device)
        side = self.image_size
        generator = torch.Generator(device).manual_seed(self.seed)
        patterns = 80 + 96 * torch.rand(
            (self.num_classes, 3, 4, 4), generator=generator, device=device
        )
        # PyTorch takes 63 bits, so the product of a large seed wraps around.
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


def open_synthetic(request: DatasetRequest) -> Dataset:
    """Describe a synthetic data set; building a loader makes its pixels on the device.

    Args:
        request: Numbers of images, side in pixels (default 32), number of classes (default 10), and
            the seed, which draws patterns and noise.
    """
    train_images, val_images = request.synthetic_train_images, request.synthetic_val_images
    size = request.image_size or _DEFAULT_IMAGE_SIZE
    classes = request.num_classes or _DEFAULT_NUM_CLASSES
    facts = DatasetFacts(
        name="synthetic",
        train_images=train_images,
        val_images=val_images,
        class_names=tuple(str(label) for label in range(classes)),
        image_size=size,
        storage="generated",
        array_bytes=(train_images + val_images) * 3 * size * size,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    train, val = (
        SyntheticSplit(count, classes, size, request.seed, stream)
        for stream, count in enumerate((train_images, val_images))
    )
    return Dataset(facts, train, val)


SOURCE = DataSource(open=open_synthetic)
