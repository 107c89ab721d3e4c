"""Made-up images of any size and class count: for measuring, and for trying things out."""

from training_framework.data.facts import DatasetFacts
from training_framework.data.splits import Dataset, SyntheticSplit

__all__ = ["open_synthetic"]

_DEFAULT_IMAGE_SIZE = 32
_DEFAULT_NUM_CLASSES = 10


def open_synthetic(
    *,
    train_images: int,
    val_images: int,
    image_size: int | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Describe a synthetic set; its pixels are made on the device when a loader is built.

    Args:
        train_images: Images to train on.
        val_images: Images to evaluate on, of the same classes.
        image_size: Side in pixels, 32 unless given.
        num_classes: Classes, 10 unless given.
        seed: Draws patterns and noise.
    """
    size = image_size or _DEFAULT_IMAGE_SIZE
    classes = num_classes or _DEFAULT_NUM_CLASSES
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
        SyntheticSplit(count, classes, size, seed, stream)
        for stream, count in enumerate((train_images, val_images))
    )
    return Dataset(facts, train, val)
