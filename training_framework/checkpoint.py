"""Checkpoints: the whole state of a run in one file, written whole or not at all."""

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from training_framework.errors import UserError

__all__ = ["CheckpointKeeper", "load_checkpoint", "save_checkpoint"]

FORMAT_VERSION = 1
_REQUIRED = ("model", "average", "optimizer", "scaler", "sums", "progress", "config", "network")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`, replacing what is there in one move.

    Written to a temporary file beside it, flushed to the disk, renamed, and the folder flushed: a
    crash at any moment leaves the old file or the new one, whole.

    Args:
        path: The file, in an existing folder.
        state: Tensors, numbers, text, lists and dicts; nothing that only code could rebuild.

    Raises:
        UserError: There is no space, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format_version": FORMAT_VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from None
    except RuntimeError as error:
        # torch trips over the write that failed, whose own error stands behind it.
        temporary.unlink(missing_ok=True)
        if not isinstance(error.__context__, OSError):
            raise
        raise _unwritable(path, error.__context__) from None
    _flush_directory(path.parent)


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: the checkpoint cannot be written ({error.strerror or error})",
        "free some space or give another --output-dir; the checkpoint before it is kept",
    )


def _flush_directory(directory: Path) -> None:
    # Without this, a power cut may undo the rename although the file's content is on the disk.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this framework, on the CPU. No code in it is ever run.

    Raises:
        UserError: The file is missing, damaged, of another kind or of a newer format.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint",
            "name a .ckpt file, such as logs/NAME/version_0/checkpoints/last.ckpt",
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\w[\w.]*)", str(error))
        raise _unreadable(path, f"it holds code: {found[1]}" if found else "damaged") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to say
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise _unreadable(path, reason[:120]) from None
    if not isinstance(state, dict) or "format_version" not in state:
        raise UserError(
            f"{path}: is no checkpoint of this framework",
            "to start from bare weights give them as --weights",
        )
    version = state["format_version"]
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: has format version {version!r}, and this version of the framework reads "
            f"{FORMAT_VERSION}",
            "read it with the version that wrote it",
        )
    missing = [name for name in _REQUIRED if name not in state]
    if missing:
        raise UserError(
            f"{path}: is incomplete: it lacks {missing[0]!r}", "take another checkpoint"
        )
    return state


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: cannot be read as a checkpoint ({reason})",
        "it is damaged or no checkpoint; take another one from the same folder",
    )


class CheckpointKeeper:
    """Keeps `last.ckpt` and the best few checkpoints in a folder.

    The best are named by epoch and accuracy, `resnet50-epoch=00-val_acc1=20.0000.ckpt`; of equal
    ones the earlier stays.

    Args:
        directory: Existing folder.
        prefix: Start of the best ones' names: the model's.
        keep: How many of the best to keep; 0 keeps none.
    """

    def __init__(self, directory: Path, *, prefix: str, keep: int) -> None:
        self.directory = directory
        self._prefix = prefix
        self._keep = keep

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.directory / "last.ckpt"

    def save(self, state: dict[str, Any], *, epoch: int, val_acc1: float | None) -> None:
        """Write `last.ckpt`, and keep it under its own name too if it is one of the best.

        Args:
            state: As for `save_checkpoint`.
            epoch: Epoch of the last step, from 0.
            val_acc1: Accuracy in percent of an evaluation at this very step; None where there was
                none: then only `last.ckpt` is written.
        """
        save_checkpoint(self.last, state)
        if val_acc1 is None or self._keep == 0:
            return
        kept = self._best_first()
        if len(kept) >= self._keep and val_acc1 <= kept[self._keep - 1][0]:
            return
        self._link(self._free_name(epoch, val_acc1))
        for _, path in self._best_first()[self._keep :]:
            path.unlink()

    def _best_first(self) -> list[tuple[float, Path]]:
        pattern = re.compile(
            re.escape(self._prefix) + r"-epoch=(\d+)-val_acc1=(\d+\.\d+)(?:-v(\d+))?\.ckpt"
        )
        found = []
        for path in self.directory.iterdir():
            match = pattern.fullmatch(path.name)
            if match:
                order = (-float(match[2]), int(match[1]), int(match[3] or 0))
                found.append((order, float(match[2]), path))
        return [(accuracy, path) for _, accuracy, path in sorted(found)]

    def _free_name(self, epoch: int, val_acc1: float) -> Path:
        stem = f"{self._prefix}-epoch={epoch:02d}-val_acc1={val_acc1:.4f}"
        path = self.directory / f"{stem}.ckpt"
        version = 1
        while path.exists():  # two evaluations of one epoch can find the same accuracy
            path = self.directory / f"{stem}-v{version}.ckpt"
            version += 1
        return path

    def _link(self, path: Path) -> None:
        """Give the newest checkpoint a second name, which stays when last.ckpt is replaced."""
        try:
            os.link(self.last, path)
        except OSError:  # a file system without hard links
            self._copy(path)
        _flush_directory(self.directory)

    def _copy(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            shutil.copyfile(self.last, temporary)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _unwritable(path, error) from None
