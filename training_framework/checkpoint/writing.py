"""Write a checkpoint so that at every moment either the old or the new file is complete."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from training_framework.checkpoint.file import write_header, write_tensors
from training_framework.checkpoint.flat_state import FlatState
from training_framework.errors import UserError
from training_framework.faults import fault_point

__all__ = [
    "flush_directory",
    "removed_on_failure",
    "save_checkpoint",
    "unwritable",
    "write_beside",
]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`, replacing an existing file atomically.

    The state is written to a temporary file, flushed to disk and renamed, and then the folder is
    flushed. So a crash at any moment leaves either the old or the new file, complete.

    Args:
        path: The file, in an existing folder.
        state: Tensors, numbers, text, None, and lists, tuples and dicts of them.

    Raises:
        UserError: The disk is full, or the folder is not writable.
    """
    try:
        temporary = write_beside(path, FlatState.of(state))
        with removed_on_failure(temporary):
            temporary.replace(path)
        flush_directory(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None


def write_beside(path: Path, state: FlatState) -> Path:
    """Write a temporary file, flushed to disk when this returns; removed if writing fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    fault_point("checkpoint.before_write")
    with removed_on_failure(temporary), temporary.open("wb", buffering=0) as file:
        checksums = write_tensors(file, state)
        fault_point("checkpoint.in_write")
        write_header(file, state, checksums)
        fault_point("checkpoint.before_fsync")
        os.fsync(file.fileno())
    return temporary


@contextmanager
def removed_on_failure(temporary: Path) -> Iterator[None]:
    """Remove a temporary file if the body fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def unwritable(path: Path, error: OSError) -> UserError:
    """The UserError for an OSError in writing a checkpoint."""
    cure = "free some space or give another --output-dir; the previous checkpoint is kept"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
        cure = "restore its folder and resume from the checkpoint in it, or start a new run"
    return UserError(
        f"{path}: the checkpoint cannot be written ({error.strerror or error})",
        cure,
    )


def flush_directory(directory: Path) -> None:
    """Flush the entries of a folder to disk."""
    # Without this, a power cut may undo the rename even though the content is on disk.
    fault_point("checkpoint.before_directory_fsync")
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
