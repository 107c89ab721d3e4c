"""Data: sources open a data set, loaders yield its batches, transforms run on the device."""

import difflib
import pkgutil
from pathlib import Path

from training_framework.config.data_sets import DATA_SETS
from training_framework.data.bad_images import BadImages
from training_framework.data.batch import Batch, Loader
from training_framework.data.image_files import FileSplit, StorageFault
from training_framework.data.loading import ResidentLoader, build_loader
from training_framework.data.sources.source import DatasetRequest, DataSource
from training_framework.data.splits import ArraySplit, Dataset, EncodedSplit, Split
from training_framework.data.transforms import (
    DrawnBatch,
    EvalTransform,
    MixedLabels,
    TrainTransform,
)
from training_framework.data.user_loader import UserLoader
from training_framework.data.worker_loading import WorkerLoader
from training_framework.errors import UserError

__all__ = [
    "DATA_SETS",
    "ArraySplit",
    "BadImages",
    "Batch",
    "DataSource",
    "Dataset",
    "DatasetRequest",
    "DrawnBatch",
    "EncodedSplit",
    "EvalTransform",
    "FileSplit",
    "Loader",
    "MixedLabels",
    "ResidentLoader",
    "Split",
    "StorageFault",
    "TrainTransform",
    "UserLoader",
    "WorkerLoader",
    "build_loader",
    "detect_dataset",
    "open_dataset",
]


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
        name: One of `DATA_SETS`.
        root: Folder of its files; `folder` and `shards` need it, CIFAR defaults to `data`.
        image_size: Side in pixels; None: the default of the data set.
        num_classes: The number of classes that the data set must have; `synthetic` makes as many.
        synthetic_train_images: Training images of `synthetic`.
        synthetic_val_images: Validation images of `synthetic`.
        limit_train_images: Number of training images to keep, drawn evenly over the classes.
        seed: Draws `synthetic`'s images, and which training images are kept.

    Raises:
        UserError: The name is unknown, files are missing or wrong, or the data set has another
            number of classes or too few training images.
    """
    if name not in DATA_SETS:
        near = difflib.get_close_matches(name, DATA_SETS, 1)
        raise UserError(
            f"data: there is no data set {name!r}",
            f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(DATA_SETS)}",
        )
    request = DatasetRequest(
        root=root,
        image_size=image_size,
        num_classes=num_classes,
        synthetic_train_images=synthetic_train_images,
        synthetic_val_images=synthetic_val_images,
        seed=seed,
    )
    dataset = _source(name).open(request)
    found = dataset.facts.num_classes
    if num_classes is not None and num_classes != found:
        where = f" in {root}" if root else ""
        raise UserError(
            f"num_classes is {num_classes}, but {name}{where} has {found} classes",
            f"set num_classes to {found} or remove it",
        )
    if limit_train_images is not None:
        return dataset.with_train_images(limit_train_images, seed=seed)
    return dataset


def detect_dataset(root: Path) -> str:
    """The name of the data set in a folder.

    Raises:
        UserError: The folder has none of the known layouts.
    """
    layouts = []
    for name, entry in DATA_SETS.items():
        source = _source(name) if entry.reads_files else None
        if source and source.recognizes:
            if source.recognizes(root):
                return name
            layouts.append(source.layout)
    raise UserError(
        f"data_root {root} "
        + ("contains no known data set" if root.is_dir() else "is not a folder"),
        f"name a folder with {', '.join(layouts[:-1])} or {layouts[-1]}",
    )


def _source(name: str) -> DataSource:
    source: DataSource = pkgutil.resolve_name(DATA_SETS[name].source)
    return source
