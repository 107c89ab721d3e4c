"""The facts of a user's own loaders that a plan needs."""

from typing import Any

import torch
from torch.utils.data import Subset, TensorDataset

from training_framework.data.facts import DatasetFacts
from training_framework.data.user_batches import check_range
from training_framework.data.user_look import LookedAtLoader
from training_framework.errors import UserError

__all__ = ["user_loader_facts"]


def user_loader_facts(
    train_loader: LookedAtLoader, val_loader: LookedAtLoader | None, num_classes: int | None
) -> DatasetFacts:
    """Facts about the user's own loaders, as far as they can be found out.

    Raises:
        UserError: The number of classes is unknown, or a first batch has labels outside it.
    """
    dataset = getattr(train_loader.loader, "dataset", None)
    while isinstance(dataset, Subset):  # a subset lists the classes of the whole set
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    if not isinstance(names, (list, tuple)):
        names = None
    if num_classes is None and names is None:
        num_classes = _count_classes(dataset)
    if names is None or (num_classes is not None and len(names) != num_classes):
        names = [str(index) for index in range(num_classes or 0)]
    for looked in (train_loader, val_loader):
        if looked is not None:
            check_range(looked.labels, f"batch 0 of the {looked.name}", len(names))
    return DatasetFacts(
        name="loader",
        train_images=_sample_count(train_loader),
        val_images=0 if val_loader is None else _sample_count(val_loader),
        class_names=tuple(map(str, names)),
        image_size=int(train_loader.images.shape[-1]),
        storage="loader",
        array_bytes=0,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def _sample_count(looked: LookedAtLoader) -> int:
    try:
        return len(looked.loader.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError, NotImplementedError):
        return looked.batch_count * looked.batch_size


def _count_classes(dataset: Any) -> int:
    labels = getattr(dataset, "targets", None)
    if labels is None and isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        labels = dataset.tensors[1]
    try:
        return int(torch.as_tensor(labels).max()) + 1
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            "the training loader does not tell its number of classes",
            "set num_classes (Config.NUM_CLASSES)",
        ) from None
