"""Open and inspect packed data sets."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from training_framework.data.facts import DatasetFacts
from training_framework.data.shards.packed_file import PackedFile, PackInfo
from training_framework.data.sources.folder import IMAGENET_MEAN, IMAGENET_STD
from training_framework.data.splits import ArraySplit, Dataset, PackedSplit
from training_framework.errors import UserError

__all__ = ["PackReport", "inspect_packed", "is_packed", "open_packed"]

_DEFAULT_IMAGE_SIZE = 224
_PADDING_SHARE = 8  # 4 pixels of 32, as is usual for CIFAR
_MAGIC = b"ARROW1"
_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What is in a packed file.

    Attributes:
        info: What it says of itself.
        file_bytes: Its size.
        train_per_class: Training pictures by class, in label order.
        val_per_class: Validation pictures by class.
        height_range: Least and largest height in pixels.
        width_range: Least and largest width.
        median_image_bytes: Of the pictures as they are stored.
        largest_image_bytes: Likewise.
    """

    info: PackInfo
    file_bytes: int
    train_per_class: tuple[int, ...]
    val_per_class: tuple[int, ...]
    height_range: tuple[int, int]
    width_range: tuple[int, int]
    median_image_bytes: int
    largest_image_bytes: int


def is_packed(path: Path) -> bool:
    """Whether a path is an Arrow IPC file by its first bytes, or at least by its name."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC or path.suffix == ".arrow"
    except OSError:
        return False


def open_packed(*, root: Path | None, image_size: int | None = None) -> Dataset:
    """Open a packed file; no picture is read yet.

    Args:
        root: The file.
        image_size: Side in pixels of the images that training sees: of raw pixels, their own unless
            given; of picture files, 224, or the side that they were scaled down to if that is less.

    Raises:
        UserError: pyarrow is missing, or this is no packed file, or a damaged one.
    """
    if root is None:
        raise UserError("data is packed, but data_root is not set", "name the .arrow file")
    file = PackedFile(root)
    info = file.info
    labels = torch.from_numpy(file.labels)
    rows = slice(0, info.train_images), slice(info.train_images, len(file))
    default = info.pixels or min(_DEFAULT_IMAGE_SIZE, info.shorter_side or _DEFAULT_IMAGE_SIZE)
    size = image_size or default
    facts = DatasetFacts(
        name=root.stem,
        train_images=info.train_images,
        val_images=info.val_images,
        class_names=tuple(info.class_names),
        image_size=size,
        storage="files" if info.pixels is None else "arrays",
        array_bytes=0 if info.pixels is None else len(file) * 3 * size * size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        crop_padding=0 if info.pixels is None else size // _PADDING_SHARE,
    )
    if info.pixels is not None:
        arrays = (
            ArraySplit(torch.from_numpy(file.pixels(part)).permute(0, 3, 1, 2), labels[part])
            for part in rows
        )
        train_array, val_array = (split.resized(size) for split in arrays)
        return Dataset(facts, train_array, val_array)
    numbers = np.arange(len(file))
    train, val = (PackedSplit(file, numbers[part], labels[part]) for part in rows)
    return Dataset(facts, train, val)


def inspect_packed(path: Path, *, verify: bool = False) -> PackReport:
    """Say what is in a packed file.

    Args:
        path: The file.
        verify: Read every picture and compare its checksum.

    Raises:
        UserError: It is no packed file, or pictures differ from what was packed.
    """
    file = PackedFile(path)
    info = file.info
    if verify:
        _verify(file)
    sizes = np.array([file.size_of(row) for row in range(len(file))])
    classes = len(info.class_names)
    train, val = np.split(file.labels, [info.train_images])
    heights, widths = file.shapes[:, 0], file.shapes[:, 1]
    return PackReport(
        info=info,
        file_bytes=path.stat().st_size,
        train_per_class=tuple(np.bincount(train, minlength=classes).tolist()),
        val_per_class=tuple(np.bincount(val, minlength=classes).tolist()),
        height_range=(int(heights.min()), int(heights.max())),
        width_range=(int(widths.min()), int(widths.max())),
        median_image_bytes=int(np.median(sizes)),
        largest_image_bytes=int(sizes.max()),
    )


def _verify(file: PackedFile) -> None:
    try:
        wrong = [row for row in range(len(file)) if not file.is_intact(row, file.read(row))]
    except OSError as error:
        raise UserError(f"{file.path}: {error.strerror}", "check the disk") from None
    if wrong:
        named = ", ".join(file.name_of(row) for row in wrong[:_MOST_NAMED])
        more = ", ..." if len(wrong) > _MOST_NAMED else ""
        raise UserError(
            f"{file.path}: {len(wrong)} of {len(file)} pictures are not as they were packed: "
            f"{named}{more}",
            "check the disk and pack again",
        )
