"""Images in folders, in the layout of ImageNet: train/<class>/*, val/<class>/*."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from training_framework.data.decoding import IMAGE_SUFFIXES
from training_framework.data.facts import DatasetFacts
from training_framework.data.image_files import FileSplit
from training_framework.data.sources.source import DataSource
from training_framework.data.splits import Dataset
from training_framework.errors import UserError

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SOURCE",
    "class_files",
    "class_names",
    "open_folder",
    "split_folder",
    "val_folder",
]

_DEFAULT_IMAGE_SIZE = 224
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_IGNORED = frozenset({"thumbs.db", "desktop.ini"})


def open_folder(*, root: Path | None, image_size: int | None = None) -> Dataset:
    """List an image folder, without decoding anything.

    The classes are the folders of `root/train` in sorted order; `root/val` (or `root/test`) may
    lack some of them. Images may be in subfolders of their class. Hidden files are ignored.

    Args:
        root: Folder with `train` and `val`.
        image_size: Side in pixels to which images are cropped and resized; None: 224.

    Raises:
        UserError: A folder is missing, a class is empty or unknown, a file is not an image.
    """
    if root is None:
        raise UserError(
            "data is folder, but data_root is not set",
            "set data_root to the folder of images",
        )
    train_folder, val = split_folder(root, "train"), val_folder(root)
    names = class_names(train_folder)
    labels_by_name = {name: label for label, name in enumerate(names)}
    for name in class_names(val):
        if name not in labels_by_name:
            raise UserError(
                f"{val / name}: this class is missing in {train_folder}",
                "add training images for it or remove it",
            )
    train_split = _list_split(train_folder, labels_by_name)
    val_split = _list_split(val, labels_by_name)
    facts = DatasetFacts(
        name=root.resolve().name,
        train_images=len(train_split),
        val_images=len(val_split),
        class_names=names,
        image_size=image_size or _DEFAULT_IMAGE_SIZE,
        storage="files",
        array_bytes=0,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    return Dataset(facts, train_split, val_split)


def split_folder(root: Path, name: str) -> Path:
    """`root/name`, which must be a folder."""
    folder = root / name
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder", "name a folder with train/<class>/* and val/<class>/*"
        )
    return folder


def val_folder(root: Path) -> Path:
    """`root/val`, or `root/test` if only that exists."""
    has_only_test = (root / "test").is_dir() and not (root / "val").is_dir()
    return split_folder(root, "test" if has_only_test else "val")


def class_names(folder: Path) -> tuple[str, ...]:
    """The class folders of a split's folder, sorted.

    Raises:
        UserError: There is none, or there is a file next to them.
    """
    names = []
    for entry in _visible(folder):
        if not _is_folder(entry):
            raise UserError(f"{entry.path}: not in a class folder", "move it into one or away")
        names.append(entry.name)
    if not names:
        raise UserError(
            f"{folder}: has no class folders", f"arrange images as {folder}/<class>/<image>"
        )
    return tuple(sorted(names))


def class_files(folder: Path) -> list[str]:
    """Sorted paths of the images in the folder of a class and its subfolders.

    Raises:
        UserError: There is none, or a file is not an image by its suffix.
    """
    paths = sorted(_files_below(folder))
    if not paths:
        raise UserError(f"{folder}: the class is empty", "add images or remove the folder")
    return paths


def _files_below(folder: Path | str) -> Iterator[str]:
    ahead, seen = [os.fspath(folder)], set[tuple[int, int]]()
    while ahead:
        current = ahead.pop()
        _refuse_second_visit(current, seen)
        for entry in _visible(current):
            if _is_folder(entry):
                ahead.append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES:  # noqa: PTH122
                raise UserError(
                    f"{entry.path}: does not have the suffix of an image",
                    f"move it away; images end in {', '.join(sorted(IMAGE_SUFFIXES))}",
                )
            elif entry.is_file():
                yield entry.path
            else:  # a broken link, or a pipe or device, which would block
                raise UserError(f"{entry.path}: not a file", "remove it, or repair the link")


def _refuse_second_visit(folder: str, seen: set[tuple[int, int]]) -> None:
    """Refuse a folder that is reached twice, or in a cycle, through links."""
    try:
        status = os.stat(folder)  # noqa: PTH116
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}", "make the folder readable") from None
    place = (status.st_dev, status.st_ino)
    if place in seen:
        raise UserError(
            f"{folder}: the class contains this folder twice, through a link", "remove the link"
        )
    seen.add(place)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself
        raise UserError(f"{entry.path}: {error.strerror}", "remove it") from None


def _visible(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name.lower() not in _IGNORED:
                    yield entry
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}", "make the folder readable") from None


def _list_split(folder: Path, labels_by_name: dict[str, int]) -> FileSplit:
    paths: list[str] = []
    labels: list[int] = []
    prefix = len(os.path.join(folder, ""))  # noqa: PTH118
    for name in class_names(folder):
        files = class_files(folder / name)
        paths.extend(path[prefix:] for path in files)
        labels.extend([labels_by_name[name]] * len(files))
    return FileSplit(folder, tuple(paths), torch.tensor(labels))


SOURCE = DataSource(
    open=lambda asked: open_folder(root=asked.root, image_size=asked.image_size),
    recognizes=lambda root: (root / "train").is_dir(),  # opening it names a missing val/
    layout="train/ and val/",
)
