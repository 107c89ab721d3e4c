"""CIFAR-10 and CIFAR-100 from their standard Python files, downloaded if they are missing."""

import contextlib
import fcntl
import hashlib
import os
import pickle
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training_framework.data.facts import DatasetFacts
from training_framework.data.sources.archives import unpack_files
from training_framework.data.sources.array_pickle import unpickle_arrays
from training_framework.data.sources.cifar_files import CIFAR10, CIFAR100, CifarFiles
from training_framework.data.sources.source import DataSource
from training_framework.data.splits import ArraySplit, Dataset
from training_framework.errors import UserError

__all__ = [
    "CIFAR10",
    "CIFAR10_SOURCE",
    "CIFAR100",
    "CIFAR100_SOURCE",
    "CifarFiles",
    "cifar_folder",
    "cifar_source",
    "open_cifar",
]

_SIDE = 32
_ROW_BYTES = 3 * _SIDE * _SIDE
_INTEGERS = {int, *(np.dtype(code).type for code in "bBhHiIlLqQ")}
_MAX_FILE_BYTES = 256 << 20  # the largest published file has 155 MB
_CONNECT_SECONDS = 5
_READ_SECONDS = 60


def open_cifar(
    source: CifarFiles, *, root: Path | None = None, image_size: int | None = None
) -> Dataset:
    """Open CIFAR-10 or CIFAR-100; if it is missing, download it (about 170 MB, MD5 checked).

    Args:
        source: `CIFAR10` or `CIFAR100`.
        root: The folder of the data set, or its (future) parent folder; None: `data`.
        image_size: Side in pixels; None: 32. Other sizes are resized once, on opening.

    Raises:
        UserError: The files are missing and cannot be downloaded, or their content is wrong.
    """
    root = root or Path("data")
    folder = cifar_folder(source, root)
    if folder is None:
        folder = _download(source, root)
    size = image_size or _SIDE
    names = _class_names(source, folder / source.meta_file)
    files = (*source.train_files, source.val_file)
    contents = [_file_bytes(folder / name) for name in files]
    batches = [
        _read_batch(source, folder / name, content)
        for name, content in zip(files, contents, strict=True)
    ]
    train = ArraySplit(
        torch.cat([batch.images for batch in batches[:-1]]),
        torch.cat([batch.labels for batch in batches[:-1]]),
    ).resized(size)
    val = batches[-1].resized(size)
    facts = DatasetFacts(
        name=source.name,
        train_images=len(train),
        val_images=len(val),
        class_names=names,
        image_size=size,
        storage="arrays",
        array_bytes=train.images.nbytes + val.images.nbytes,
        mean=source.mean,
        std=source.std,
        enlarged=max(1, size // _SIDE),
        flip=True,
        crop_padding=size // 8,
    )
    return Dataset(facts, train, val, notes=_differences(source, files, contents))


def _differences(
    source: CifarFiles, files: tuple[str, ...], contents: list[bytes]
) -> tuple[str, ...]:
    """Note which files differ from the published ones; users may have good reasons for that."""
    differing = [
        name
        for name, content in zip(files, contents, strict=True)
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != source.file_md5s[name]
    ]
    if not differing:
        return ()
    which = "all files" if len(differing) == len(files) else ", ".join(differing)
    return (
        f"note: {which} of {source.name} differ from the published ones: accuracies are not "
        "comparable with published ones",
    )


def cifar_folder(source: CifarFiles, root: Path) -> Path | None:
    """The folder with the files: `root` or its subfolder; None if neither has them."""
    for folder in (root, root / source.folder):
        if all((folder / name).is_file() for name in (source.train_files[0], source.val_file)):
            return folder
    return None


def _refuse_incomplete(source: CifarFiles, folder: Path) -> None:
    """Refuse to download over a folder that is there but lacks files: it is the user's."""
    if folder.exists():
        files = (source.train_files[0], source.val_file)
        name = next(name for name in files if not (folder / name).is_file())
        raise UserError(
            f"{folder}: lacks {name}", "complete it, or move it away to download it again"
        )


def _class_names(source: CifarFiles, path: Path) -> tuple[str, ...]:
    content = _unpickled(path, _file_bytes(path))
    names: tuple[str, ...] = ()
    with contextlib.suppress(KeyError, AttributeError, TypeError, UnicodeDecodeError):
        listed = content[source.names_key]
        if type(listed) is list and len(listed) == source.num_classes:
            names = tuple(name.decode() for name in listed)
    if len(names) != source.num_classes:
        raise UserError(
            f"{path}: does not list {source.num_classes} class names",
            f"take the file from {source.archive}",
        )
    return names


def _read_batch(source: CifarFiles, path: Path, data: bytes) -> ArraySplit:
    content = _unpickled(path, data)
    cure = f"take the file from {source.archive}"
    try:
        pixels, listed = content[b"data"], content[source.labels_key]
    except (KeyError, TypeError):
        raise UserError(
            f"{path}: does not contain 'data' and '{source.labels_key.decode()}'", cure
        ) from None
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        raise UserError(f"{path}: 'data' is not an array of uint8", cure)
    # Nested lists could be arbitrarily deep and, as an array, arbitrarily large.
    flat = type(listed) is list and {type(item) for item in listed} <= _INTEGERS
    if not flat and not (isinstance(listed, np.ndarray) and listed.dtype.kind in "iu"):
        raise UserError(f"{path}: the labels are not integers", cure)
    labels = np.asarray(listed, dtype=object if flat else None)
    if labels.ndim != 1 or not len(labels) or pixels.shape != (len(labels), _ROW_BYTES):
        raise UserError(
            f"{path}: 'data' is {pixels.shape} for {labels.size} labels, "
            f"not (labels, {_ROW_BYTES})",
            cure,
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= source.num_classes))
    if len(wrong):
        raise UserError(
            f"{path}: label {labels[wrong[0]]} of image {wrong[0]} is not in "
            f"0..{source.num_classes - 1}",
            cure,
        )
    images = torch.from_numpy(pixels.reshape(-1, 3, _SIDE, _SIDE))
    return ArraySplit(images, torch.from_numpy(labels.astype(np.int64)))


def _file_bytes(path: Path) -> bytes:
    cure = "complete the data set's folder"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a file", cure)
        if status.st_size > _MAX_FILE_BYTES:
            raise UserError(f"{path}: {status.st_size:,} bytes are too many for such a file", cure)
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", cure) from None


def _unpickled(path: Path, data: bytes) -> Any:
    try:
        return unpickle_arrays(data)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: not a CIFAR file ({error})", "replace it with the original"
        ) from None


def _download(source: CifarFiles, root: Path) -> Path:
    import pooch

    pooch_timeout = (_CONNECT_SECONDS, _READ_SECONDS)
    is_new = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(root):
            # Meanwhile, another process may have finished the download or given it up.
            root.mkdir(parents=True, exist_ok=True)
            folder = cifar_folder(source, root)
            if folder is not None:
                return folder
            _refuse_incomplete(source, root / source.folder)
            archive = pooch.retrieve(
                source.url,
                known_hash=f"md5:{source.md5}",
                fname=source.archive,
                path=root,
                downloader=pooch.HTTPDownloader(
                    progressbar=sys.stderr.isatty(), timeout=pooch_timeout
                ),
            )
            wanted = (*source.train_files, source.val_file, source.meta_file)
            unpack_files(Path(archive), root / source.folder, wanted)
            return root / source.folder
    except UserError:
        raise
    except (OSError, ValueError) as error:
        if is_new:
            with contextlib.suppress(OSError):  # it may contain an archive by now
                root.rmdir()
        raise UserError(
            f"{source.name} is not in {root} and cannot be downloaded from {source.url} "
            f"({type(error).__name__})",
            f"put {source.archive} (MD5 {source.md5}) or its folder {source.folder} into {root}",
        ) from None


@contextlib.contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process, of this or another run, works on the same folder.

    The lock is on the folder itself, so that no file remains, and it ends with the process.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def cifar_source(files: CifarFiles) -> DataSource:
    """The source of a data set in CIFAR's layout."""
    return DataSource(
        open=lambda asked: open_cifar(files, root=asked.root, image_size=asked.image_size),
        recognizes=lambda root: cifar_folder(files, root) is not None,
        layout=f"{files.folder}/",
    )


CIFAR10_SOURCE, CIFAR100_SOURCE = cifar_source(CIFAR10), cifar_source(CIFAR100)
