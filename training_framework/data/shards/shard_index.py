"""The index of a folder of tar shards: the place of each image, its label and its checksum.

It is built once, by reading every shard, and kept next to them as `index.safetensors`. It is only a
cache: if it is missing, damaged or belongs to other shards, it is built again. `dataset.json`,
which `efficient-resnet data pack` writes, contains the SHA-256 of each shard, so that a new index
never includes a shard that has changed since.
"""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from training_framework.data.image_files import MAX_IMAGE_BYTES
from training_framework.data.shards.tar_members import MAX_CLASSES, read_shard
from training_framework.data.splits import sha256_of
from training_framework.errors import UserError
from training_framework.machine.hardware import usable_cores

__all__ = [
    "INDEX_FILE",
    "INFO_FILE",
    "ShardIndex",
    "ShardInfo",
    "build_index",
    "open_index",
    "shard_files",
    "write_index",
]

INDEX_FILE = "index.safetensors"
INFO_FILE = "dataset.json"
_CLASSES_FILE = "classes.txt"
_MAX_INFO_BYTES = 64 << 20
_SHARD = re.compile(r"(?:.*[-_.])?(train|val|valid|validation|test)(?:[-_.].*)?\.tar")
_VAL = ("val", "valid", "validation")
_RESTORE = "restore it or pack again"


class ShardInfo(BaseModel):
    """The description of a folder of shards in `dataset.json`; every field is optional.

    Attributes:
        format_version: Version of the format of this file.
        source: Name of the folder that was packed.
        class_names: In label order; empty: the names are the numbers.
        shards: SHA-256 of each shard, by file name.
        shorter_side: Images with a longer shorter side were scaled down to this one; None: no
            image was scaled.
        skipped: Images that could not be decoded, as `split/name`.
        digest: SHA-256 of all other fields; empty: they are not checked.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    format_version: Literal[1] = 1
    source: str = ""
    class_names: Annotated[list[str], Field(max_length=MAX_CLASSES)] = []
    shards: dict[str, str] = {}
    shorter_side: PositiveInt | None = None
    skipped: list[str] = []
    digest: str = ""

    def sealed(self) -> "ShardInfo":
        """The description with its digest."""
        text = self.model_copy(update={"digest": ""}).model_dump_json()
        return self.model_copy(update={"digest": sha256_of(text)})


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Every image of a folder of shards, training images first.

    Attributes:
        shards: Names and sizes in bytes of the shards.
        train_images: Number of training images.
        table: (6, N) int64. Rows: shard, offset in it in bytes, length in bytes, CRC-32, label,
            and end of the member's name in `names`.
        names: (B,) uint8, the joined names of all members.
    """

    shards: tuple[tuple[str, int], ...]
    train_images: int
    table: NDArray[np.int64]
    names: NDArray[np.uint8]

    def __len__(self) -> int:
        return self.table.shape[1]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) int64, in bytes."""
        return self.table[2]

    @property
    def checksums(self) -> NDArray[np.int64]:
        """(N,) int64, CRC-32 of each image."""
        return self.table[3]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) int64."""
        return self.table[4]

    def name_of(self, row: int) -> str:
        """The name of an image in messages: shard and member."""
        start = self.table[5, row - 1] if row else 0
        name = self.names[start : self.table[5, row]].tobytes()
        return f"{self.shards[self.table[0, row]][0]}/{os.fsdecode(name)}"

    def is_sound(self) -> bool:
        """Whether every image is within its shard, and every name within `names`."""
        if self.table.dtype != np.int64 or self.table.ndim != 2 or len(self.table) != 6:
            return False
        shards, offsets, lengths, _, labels, ends = self.table
        return bool(
            0 < self.train_images < len(self)
            and self.table.min() >= 0
            and shards.max() < len(self.shards)
            and lengths.max() <= MAX_IMAGE_BYTES
            and (offsets <= np.array([size for _, size in self.shards])[shards] - lengths).all()
            and labels.max() < MAX_CLASSES
            and (np.diff(ends) >= 0).all()
            and self.names.shape == (ends[-1],)
        )


def shard_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The training shards and the validation shards, each sorted by name.

    The name of a shard contains its split: `train-000000.tar`, `val-000000.tar`, perhaps after a
    prefix (`pets-train-0.tar`). `test` shards are used if there is no `val`.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("[!.]*.tar")):
        if match := _SHARD.fullmatch(path.name):
            found.setdefault(match[1], []).append(path)
    val = [path for name in _VAL for path in found.get(name, [])]
    return found.get("train", []), val or found.get("test", [])


def open_index(folder: Path) -> tuple[ShardInfo, ShardIndex, tuple[str, ...]]:
    """The description of a folder, its index, and notes to show.

    A missing or stale index is built again.

    Raises:
        UserError: A shard is missing, damaged, or has changed since it was packed.
    """
    info = _read_info(folder)
    index, notes = _kept(folder, timed=not info.shards), tuple[str, ...]()
    missing = info.shards.keys() - {path.name for paths in shard_files(folder) for path in paths}
    if missing:
        raise UserError(f"{folder / min(missing)}: is missing", _RESTORE)
    if index is None:
        index, digests = build_index(folder)
        for name in digests:
            if info.shards and info.shards.get(name) != digests[name]:
                raise UserError(
                    f"{folder / name}: has changed since it was packed (SHA-256)", _RESTORE
                )
        if not write_index(folder, index, timed=not info.shards):
            notes = (f"note: cannot write {folder / INDEX_FILE}, so every start reads all shards",)
    row = int(index.labels.argmax())
    names = info.class_names or [str(label) for label in range(index.labels[row] + 1)]
    if index.labels[row] >= len(names):
        raise UserError(
            f"{folder / index.name_of(row)}: label {index.labels[row]} of {len(names)} classes",
            f"list all classes in {_CLASSES_FILE}, or correct the label",
        )
    return info.model_copy(update={"class_names": names}), index, notes


def build_index(folder: Path) -> tuple[ShardIndex, dict[str, str]]:
    """Read all shards of a folder; return their index, and the SHA-256 of each by name.

    Raises:
        UserError: A shard is damaged, or a split has no images.
    """
    train, val = shard_files(folder)
    files = [*train, *val]
    with ThreadPoolExecutor(usable_cores()) as executor:
        read = executor.map(read_shard, files)
        shards = list(tqdm(read, "indexing", len(files), unit="shard", disable=None))
    samples = [sample for shard in shards for sample in shard.samples]
    counts = [len(shard.samples) for shard in shards]
    train_images = sum(counts[: len(train)])
    if not 0 < train_images < len(samples):
        raise UserError(f"{folder}: a split has no images", "add train-*.tar or val-*.tar shards")
    names = [os.fsencode(sample.name) for sample in samples]
    numbers = np.array([sample[1:] for sample in samples], np.int64).T.copy()  # offset to label
    table = np.vstack(
        [np.repeat(np.arange(len(files)), counts), numbers, np.cumsum(list(map(len, names)))]
    )
    sizes = ((path.name, shard.size) for path, shard in zip(files, shards, strict=True))
    index = ShardIndex(tuple(sizes), train_images, table, np.frombuffer(b"".join(names), np.uint8))
    return index, {path.name: shard.sha256 for path, shard in zip(files, shards, strict=True)}


def write_index(folder: Path, index: ShardIndex, *, timed: bool) -> bool:
    """Write an index next to its shards.

    Args:
        folder: The folder of the shards.
        index: Their index.
        timed: Whether another modification time of a shard makes the index stale. Otherwise only
            another size does, which suffices if `dataset.json` has the SHA-256 of the shards.

    Returns:
        Whether it could be written.
    """
    temporary = folder / f".{INDEX_FILE}.{os.getpid()}"
    about = json.dumps((index.shards, index.train_images, _times(folder) if timed else []))
    arrays: dict[str, NDArray[Any]] = {"table": index.table, "names": index.names}
    digest = sha256_of(about, *arrays.values())
    try:
        save_file(arrays, temporary, metadata={"index": json.dumps((about, digest))})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # safetensors makes it readable by the owner alone
        temporary.replace(folder / INDEX_FILE)
    except (OSError, SafetensorError):
        temporary.unlink(missing_ok=True)
        return False
    return True


def _times(folder: Path) -> list[int]:
    return [path.stat().st_mtime_ns for paths in shard_files(folder) for path in paths]


def _kept(folder: Path, *, timed: bool) -> ShardIndex | None:
    """The stored index of a folder; None if it is damaged or belongs to other shards."""
    try:
        with safe_open(folder / INDEX_FILE, framework="numpy") as file:
            about, digest = json.loads((file.metadata() or {})["index"])
            table, names = file.get_tensor("table"), file.get_tensor("names")
        if sha256_of(about, table, names) != digest:
            return None
        listed, train_images, times = json.loads(about)
        shards = tuple((str(name), int(size)) for name, size in listed)
        present = [(p.name, p.stat().st_size) for paths in shard_files(folder) for p in paths]
        index = ShardIndex(shards, int(train_images), table, names)
        if list(shards) != present or (timed and times != _times(folder)):
            return None
        return index if index.is_sound() else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _read_info(folder: Path) -> ShardInfo:
    """The description in `dataset.json` or `classes.txt`; empty if there is neither."""
    for path in (folder / INFO_FILE, folder / _CLASSES_FILE):
        try:
            if not path.exists():
                continue
            if path.stat().st_size > _MAX_INFO_BYTES:
                raise UserError(f"{path}: more than {_MAX_INFO_BYTES:,} bytes", _RESTORE)
            text = path.read_text(encoding="utf-8")
            if path.name == _CLASSES_FILE:
                return ShardInfo(class_names=text.splitlines())
            info = ShardInfo.model_validate_json(text)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            key = ".".join(map(str, fault["loc"])) or "text"
            raise UserError(f"{path}: {key}: {fault['msg']}", _RESTORE) from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error})", _RESTORE) from None
        if info.digest and info.sealed() != info:
            raise UserError(f"{path}: has changed since it was written (SHA-256)", _RESTORE)
        return info
    return ShardInfo()
