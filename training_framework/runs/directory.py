"""The folder of a run: `<output_dir>/<name>/version_N`, never shared by two runs."""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from training_framework.errors import UserError

__all__ = [
    "DirectoryLock",
    "check_space",
    "check_writable",
    "create_run_directory",
    "next_version",
    "run_directories",
    "run_directory_of",
    "under_way",
    "write_json",
    "write_text_atomically",
]

_VERSION = re.compile(r"version_(\d+)")
_PROBE_BYTES = 2**16


class DirectoryLock:
    """A run directory to which only this process may write.

    The system locks the file `.lock` in it. So the lock ends with the process, however that ends,
    and a leftover file never blocks a run.

    Attributes:
        directory: The run directory.
    """

    def __init__(self, directory: Path, descriptor: int) -> None:
        self.directory = directory
        self._descriptor = descriptor
        _held.add(descriptor)

    @classmethod
    def take(cls, directory: Path) -> "DirectoryLock | None":
        """Lock a directory; None if another run holds it.

        On a file system without locks, nothing is locked and nothing is refused.

        Raises:
            UserError: The directory cannot be written to.
        """
        try:
            descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _not_writable(directory, error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            pass
        return cls(directory, descriptor)

    def release(self) -> None:
        """Let others write; a second call does nothing."""
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            os.close(self._descriptor)


_held: set[int] = set()


def _leave_locks_to_parent() -> None:
    # A forked loader process inherits the parent's locks. It would keep them if it outlived a
    # parent that was killed.
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_leave_locks_to_parent)


def run_directories(parent: Path) -> list[Path]:
    """The user's runs in `<output_dir>/<name>`, the newest first; none if there is no such folder.

    In a folder shared by several users, runs of others that this user cannot write are left out.

    Raises:
        UserError: The folder cannot be read.
    """
    return [path for path in _versions(parent) if not _is_closed(path)]


def next_version(parent: Path) -> int:
    """The number of the next run below `<output_dir>/<name>`.

    Raises:
        UserError: The folder cannot be read.
    """
    newest = next(iter(_versions(parent)), None)
    match = None if newest is None else _version_of(newest)
    return int(match[1]) + 1 if match else 0


def _versions(parent: Path) -> list[Path]:
    """All runs in a folder, the newest first, whoever owns them."""
    try:
        found = [(int(match[1]), path) for path in parent.iterdir() if (match := _version_of(path))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _not_writable(parent, error) from None
    return [path for _, path in sorted(found, reverse=True)]


def _is_closed(directory: Path) -> bool:
    """Whether a run belongs to another user and this user may not write to it.

    The user's own read-only runs do not count: they need an error, and must not be skipped.
    """
    try:
        owner = directory.stat().st_uid
    except OSError:
        return False
    may_write = os.access(directory, os.R_OK | os.W_OK | os.X_OK)
    return owner != os.geteuid() and not may_write


def _version_of(path: Path) -> re.Match[str] | None:
    return _VERSION.fullmatch(path.name)


def create_run_directory(
    output_dir: Path, name: str, *, config_yaml: str, version: int | None = None
) -> DirectoryLock:
    """Create a `version_N` in `<output_dir>/<name>`, locked, with its `checkpoints` folder.

    It is created under a temporary name and moved into place by one system call, which fails if the
    place is taken. So two runs that start at once get different directories, and nobody ever sees
    an incomplete directory or one without its lock.

    Args:
        output_dir: Folder of all runs; created if it is missing.
        name: The run's.
        config_yaml: Text of its config.yaml.
        version: The number; None takes the next free one.

    Raises:
        UserError: The folder cannot be written to, or the given number has been taken meanwhile.
    """
    parent = output_dir / name
    unnamed = parent / f".new-{uuid.uuid4().hex}"
    lock = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        unnamed.mkdir()
        (unnamed / "checkpoints").mkdir()
        write_text_atomically(unnamed / "config.yaml", config_yaml)
        lock = DirectoryLock.take(unnamed)
        assert lock is not None, "nobody else knows the name"
        lock.directory = _moved(unnamed, parent, version)
    except BaseException as error:
        if lock is not None:
            lock.release()
        shutil.rmtree(unnamed, ignore_errors=True)
        if isinstance(error, OSError):
            raise _not_writable(parent, error) from None
        raise
    return lock


def _moved(unnamed: Path, parent: Path, version: int | None) -> Path:
    number = next_version(parent) if version is None else version
    while True:
        directory = parent / f"version_{number}"
        try:
            unnamed.rename(directory)
            return directory
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
        if version is not None:
            raise under_way(directory)
        number += 1


def under_way(directory: Path) -> UserError:
    """The error for a run that finds another run in its directory."""
    return UserError(
        f"{directory}: another run is using it",
        "wait until it ends, or start beside it with --resume never or another --name",
    )


def check_writable(directory: Path) -> None:
    """Check that files can be written to a folder, or to its nearest parent that exists.

    This writes a small file there, flushes it to the disk, and removes it.

    Raises:
        UserError: The disk is full or read-only, or the path is not a folder.
    """
    nearest = _nearest_existing(directory)
    try:
        with tempfile.TemporaryFile(dir=nearest, buffering=0) as file:
            file.write(bytes(_PROBE_BYTES))
            os.fsync(file.fileno())
    except OSError as error:
        raise _not_writable(nearest, error) from None


def check_space(directory: Path, needed_bytes: int) -> None:
    """Refuse a folder (existing or not) whose disk cannot hold a file of this size.

    Raises:
        UserError: Less is free.
    """
    free = shutil.disk_usage(_nearest_existing(directory)).free
    if free < needed_bytes:
        raise UserError(
            f"{directory}: its disk has {free / 2**20:,.0f} MiB left, but a checkpoint of this run "
            f"takes {needed_bytes / 2**20:,.0f} MiB",
            "free some space or give another --output-dir",
        )


def _nearest_existing(directory: Path) -> Path:
    while not os.path.lexists(directory) and directory != directory.parent:
        directory = directory.parent
    return directory


def _not_writable(place: Path, error: OSError) -> UserError:
    cure = "give another --output-dir"
    if error.errno == errno.EACCES:
        for folder in (place, *place.parents):
            with suppress(OSError):  # below a folder that is closed, nothing can be asked
                if folder.stat().st_uid == os.geteuid() and not os.access(folder, os.W_OK):
                    cure = f"{folder} is yours: allow it (chmod u+rwx, umask 022), or {cure}"
                break
    return UserError(f"{error.filename or place}: cannot be written to ({error.strerror})", cure)


def run_directory_of(checkpoint: Path) -> Path | None:
    """The run directory that contains a checkpoint; None for a checkpoint kept elsewhere."""
    folder = checkpoint.resolve().parent
    if folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file():
        return checkpoint.parent.parent
    return None


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file so that at any moment it holds either the old or the new text, complete."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write plain values as indented JSON, atomically; NaN and infinity become null."""
    text = json.dumps(_finite(content), indent=2, default=str, allow_nan=False)
    write_text_atomically(path, text + "\n")


def _finite(content: Any) -> Any:
    """Without the numbers that JSON does not know."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
