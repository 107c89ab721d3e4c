"""What a user's own loaders tell of their data."""

from collections.abc import Iterable
from typing import Any

import torch

from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError

__all__ = ["user_loader_facts"]


def user_loader_facts(
    train_loader: Iterable[Any], val_loader: Iterable[Any] | None, num_classes: int | None
) -> DatasetFacts:
    """Facts of the user's own loaders, as far as they tell.

    Raises:
        UserError: The number of classes or the size of the images cannot be found out.
    """
    dataset = getattr(train_loader, "dataset", None)
    names = getattr(dataset, "classes", None)
    if num_classes is None and names is None:
        num_classes = _count_classes(dataset)
    if names is None or (num_classes is not None and len(names) != num_classes):
        names = [str(index) for index in range(num_classes or 0)]
    try:
        image = dataset[0][0] if dataset is not None else next(iter(train_loader))[0][0]
        image_size = int(image.shape[-1])
    except (TypeError, AttributeError, IndexError, KeyError, StopIteration):
        raise UserError(
            "the training loader yields no (images, labels) with image tensors",
            "yield float images (N, 3, H, W) and integer labels (N,)",
        ) from None
    return DatasetFacts(
        name="loader",
        train_images=_sample_count(train_loader),
        val_images=0 if val_loader is None else _sample_count(val_loader),
        class_names=tuple(map(str, names)),
        image_size=image_size,
        storage="loader",
        array_bytes=0,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def _sample_count(loader: Any) -> int:
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return len(loader) * (getattr(loader, "batch_size", None) or 1)


def _count_classes(dataset: Any) -> int:
    labels = getattr(dataset, "targets", None)
    if labels is None and isinstance(dataset, torch.utils.data.TensorDataset):
        labels = dataset.tensors[1]
    if labels is None:
        raise UserError(
            "the training loader does not say how many classes there are",
            "set num_classes (Config.NUM_CLASSES)",
        )
    return int(torch.as_tensor(labels).max()) + 1
