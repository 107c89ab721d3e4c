"""CIFAR-10 and CIFAR-100 from their standard Python files, downloaded where they are absent."""

import contextlib
import fcntl
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training_framework.data.array_pickle import unpickle_arrays
from training_framework.data.splits import ArraySplit, Dataset
from training_framework.dataset_facts import DatasetFacts
from training_framework.errors import UserError

__all__ = ["CIFAR10", "CIFAR100", "CifarFiles", "cifar_folder", "open_cifar"]

_SIDE = 32
_ROW_BYTES = 3 * _SIDE * _SIDE
_CONNECT_SECONDS = 5
_READ_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class CifarFiles:
    """Where a CIFAR set comes from and what its files are called.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """

    name: str
    folder: str
    train_files: tuple[str, ...]
    val_file: str
    meta_file: str
    labels_key: bytes
    names_key: bytes
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    url: str
    md5: str

    @property
    def archive(self) -> str:
        """File name of the archive."""
        return self.url.rpartition("/")[2]


CIFAR10 = CifarFiles(
    name="cifar10",
    folder="cifar-10-batches-py",
    train_files=tuple(f"data_batch_{number}" for number in range(1, 6)),
    val_file="test_batch",
    meta_file="batches.meta",
    labels_key=b"labels",
    names_key=b"label_names",
    num_classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
)
CIFAR100 = CifarFiles(
    name="cifar100",
    folder="cifar-100-python",
    train_files=("train",),
    val_file="test",
    meta_file="meta",
    labels_key=b"fine_labels",
    names_key=b"fine_label_names",
    num_classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
)


def open_cifar(
    source: CifarFiles, *, root: Path | None = None, image_size: int | None = None
) -> Dataset:
    """Open CIFAR-10 or CIFAR-100; where it is absent, download it (about 170 MB, MD5 checked).

    Args:
        source: `CIFAR10` or `CIFAR100`.
        root: The folder that holds (or shall hold) the set's folder, or that folder itself; `data`
            unless given.
        image_size: Side in pixels, 32 unless given; other sizes are resized once, on opening.

    Raises:
        UserError: The files are absent and cannot be downloaded, or are not what they should be.
    """
    root = root or Path("data")
    folder = cifar_folder(source, root)
    if folder is None:
        folder = _download(source, root)
    size = image_size or _SIDE
    names = _class_names(source, folder / source.meta_file)
    batches = [_read_batch(source, folder / name) for name in source.train_files]
    train = ArraySplit(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
    ).resized(size)
    val = _read_batch(source, folder / source.val_file).resized(size)
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
    return Dataset(facts, train, val)


def cifar_folder(source: CifarFiles, root: Path) -> Path | None:
    """The folder with the set's files: `root` or its subfolder; None where neither is one."""
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
            f"{folder}: lacks {name}", "complete it, or move it away and it is downloaded"
        )


def _class_names(source: CifarFiles, path: Path) -> tuple[str, ...]:
    content = _load(path)
    try:
        names = tuple(name.decode() for name in content[source.names_key])
    except (KeyError, AttributeError, TypeError, UnicodeDecodeError):
        names = ()
    if len(names) != source.num_classes:
        raise UserError(
            f"{path}: does not list {source.num_classes} class names",
            f"take the file from {source.archive}",
        )
    return names


def _read_batch(source: CifarFiles, path: Path) -> ArraySplit:
    content = _load(path)
    cure = f"take the file from {source.archive}"
    try:
        pixels, labels = content[b"data"], np.asarray(content[source.labels_key])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: holds no 'data' and '{source.labels_key.decode()}'", cure
        ) from None
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        raise UserError(f"{path}: 'data' is no array of uint8", cure)
    if pixels.shape != (len(labels), _ROW_BYTES) or labels.ndim != 1 or not len(labels):
        raise UserError(
            f"{path}: 'data' is {pixels.shape} for {labels.size} labels, "
            f"not (labels, {_ROW_BYTES})",
            cure,
        )
    if labels.dtype.kind not in "iu":
        raise UserError(f"{path}: the labels are {labels.dtype}, not integers", cure)
    wrong = np.flatnonzero((labels < 0) | (labels >= source.num_classes))
    if len(wrong):
        raise UserError(
            f"{path}: label {labels[wrong[0]]} of image {wrong[0]} is not in "
            f"0..{source.num_classes - 1}",
            cure,
        )
    images = torch.from_numpy(pixels.reshape(-1, 3, _SIDE, _SIDE))
    return ArraySplit(images, torch.from_numpy(labels.astype(np.int64)))


def _load(path: Path) -> Any:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "complete the data set's folder") from None
    try:
        return unpickle_arrays(data)
    except Exception as error:  # a broken pickle raises whatever its bytes happen to say
        raise UserError(
            f"{path}: not a CIFAR file ({error})", "replace it by the original"
        ) from None


def _download(source: CifarFiles, root: Path) -> Path:
    import pooch

    pooch_timeout = (_CONNECT_SECONDS, _READ_SECONDS)
    is_new = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(root):
            # Another process may have finished the download, or given it up, in the meantime.
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
            return _extract(source, Path(archive), root)
    except UserError:
        raise
    except (OSError, ValueError, tarfile.TarError) as error:
        if is_new:
            with contextlib.suppress(OSError):  # there may be an archive in it by now
                root.rmdir()
        raise UserError(
            f"{source.name} is not in {root} and {source.url} gave none ({type(error).__name__})",
            f"put {source.archive} (MD5 {source.md5}) or its folder {source.folder} into {root}",
        ) from None


@contextlib.contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for the others of this run, or of other runs, that are in here with the same folder.

    The lock is the folder's own, so no file stays behind, and it ends with the process.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _extract(source: CifarFiles, archive: Path, root: Path) -> Path:
    """Unpack beside the final place, then rename, so that no half-unpacked folder is ever found."""
    folder = root / source.folder
    with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as scratch:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        unpacked = Path(scratch) / source.folder
        unpacked.rename(folder)
    return folder
