"""Data: sources that open a data set, loaders that yield its batches, transforms on the device."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training_framework.data.bad_images import BadImages
from training_framework.data.batch import Batch, Loader
from training_framework.data.loading import ResidentLoader, build_loader
from training_framework.data.shards.packed import is_packed, open_packed
from training_framework.data.sources.cifar import CIFAR10, CIFAR100, cifar_folder, open_cifar
from training_framework.data.sources.digits import open_digits
from training_framework.data.sources.folder import open_folder
from training_framework.data.sources.synthetic import open_synthetic
from training_framework.data.splits import (
    ArraySplit,
    Dataset,
    FileSplit,
    PackedSplit,
    Split,
    SyntheticSplit,
)
from training_framework.data.transforms import EvalTransform, MixedLabels, TrainTransform
from training_framework.data.user_loader import UserLoader
from training_framework.data.worker_loading import WorkerLoader
from training_framework.errors import UserError

__all__ = [
    "DATASETS",
    "ArraySplit",
    "BadImages",
    "Batch",
    "Dataset",
    "DatasetRequest",
    "EvalTransform",
    "FileSplit",
    "Loader",
    "MixedLabels",
    "PackedSplit",
    "ResidentLoader",
    "Split",
    "SyntheticSplit",
    "TrainTransform",
    "UserLoader",
    "WorkerLoader",
    "build_loader",
    "detect_dataset",
    "open_dataset",
]


@dataclass(frozen=True, kw_only=True)
class DatasetRequest:
    """What `open_dataset` was asked for; each opener reads what concerns it."""

    root: Path | None = None
    image_size: int | None = None
    num_classes: int | None = None
    synthetic_train_images: int = 2048
    synthetic_val_images: int = 512
    seed: int = 0


def _open_synthetic(request: DatasetRequest) -> Dataset:
    return open_synthetic(
        train_images=request.synthetic_train_images,
        val_images=request.synthetic_val_images,
        image_size=request.image_size,
        num_classes=request.num_classes,
        seed=request.seed,
    )


DATASETS: dict[str, Callable[[DatasetRequest], Dataset]] = {
    "digits": lambda asked: open_digits(image_size=asked.image_size),
    "cifar10": lambda asked: open_cifar(CIFAR10, root=asked.root, image_size=asked.image_size),
    "cifar100": lambda asked: open_cifar(CIFAR100, root=asked.root, image_size=asked.image_size),
    "folder": lambda asked: open_folder(root=asked.root, image_size=asked.image_size),
    "packed": lambda asked: open_packed(root=asked.root, image_size=asked.image_size),
    "synthetic": _open_synthetic,
}


def open_dataset(
    name: str,
    *,
    root: Path | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    synthetic_train_images: int = 2048,
    synthetic_val_images: int = 512,
    limit_train_images: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Open a data set by name.

    Args:
        name: One of `DATASETS`.
        root: Where its files are; needed by `folder`, `data` for CIFAR unless given.
        image_size: Side in pixels; the set's own default unless given.
        num_classes: How many classes the set must have; made, for `synthetic`.
        synthetic_train_images: Training images of `synthetic`.
        synthetic_val_images: Validation images of `synthetic`.
        limit_train_images: Keep so many of the training images, drawn evenly over the classes.
        seed: Draws `synthetic`'s images, and those that are kept.

    Raises:
        UserError: No such set, files missing or wrong, another number of classes, or fewer training
            images than shall be kept.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 1)
        raise UserError(
            f"data: no data set is called {name!r}",
            f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(DATASETS)}",
        )
    request = DatasetRequest(
        root=root,
        image_size=image_size,
        num_classes=num_classes,
        synthetic_train_images=synthetic_train_images,
        synthetic_val_images=synthetic_val_images,
        seed=seed,
    )
    dataset = DATASETS[name](request)
    found = dataset.facts.num_classes
    if num_classes is not None and num_classes != found:
        where = f" in {root}" if root else ""
        raise UserError(
            f"num_classes is {num_classes}, but {name}{where} has {found} classes",
            f"set num_classes to {found} or leave it out",
        )
    if limit_train_images is not None:
        return dataset.with_train_images(limit_train_images, seed=seed)
    return dataset


def detect_dataset(root: Path) -> Literal["folder", "packed", "cifar10", "cifar100"]:
    """What a folder holds, or a file.

    Raises:
        UserError: None of the known layouts.
    """
    if (root / "train").is_dir():  # without val/ too, which opening it then names
        return "folder"
    if cifar_folder(CIFAR10, root):
        return "cifar10"
    if cifar_folder(CIFAR100, root):
        return "cifar100"
    if is_packed(root):
        return "packed"
    raise UserError(
        f"data_root {root} " + ("holds no known data set" if root.is_dir() else "is no folder"),
        f"it must hold train/ and val/, {CIFAR10.folder}/ or {CIFAR100.folder}/, or be a packed "
        ".arrow file",
    )
