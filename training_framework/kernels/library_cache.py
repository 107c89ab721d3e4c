"""A cache of compiled libraries, in a folder that only this user can write to.

A library is code that this user will run, so it is loaded only if nobody else can have written or
changed it. Folder and file are opened first, then checked and loaded through their descriptors, so
nobody can exchange them in between by renaming a parent folder. The name of a library contains its
SHA-256, so that damage is noticed and a single rename puts both in place.
"""

import contextlib
import ctypes
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["LibraryCache", "UntrustedError", "cache_folder", "load_by_descriptor"]

MAX_WAIT_FOR_ANOTHER_BUILD_SECONDS = 120
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class UntrustedError(OSError):
    """A folder or file belongs to another user, or others may write to it."""


def cache_folder() -> Path | None:
    """The folder of compiled kernels, in `XDG_CACHE_HOME` if that is set.

    Returns:
        The folder; None if the user has no home folder.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():  # its standard says to ignore relative paths
        try:
            caches = Path.home() / ".cache"
        except RuntimeError:
            return None
    return caches / "efficient-resnet" / "native" if caches.is_absolute() else None


class LibraryCache:
    """The cached libraries of this user. Close it after use; loaded libraries stay loaded.

    Args:
        folder: The folder; it and missing parents are created for this user alone.

    Raises:
        UntrustedError: Others own the folder or its parent, or may write to one of them.
        OSError: The folder cannot be created or opened.
    """

    def __init__(self, folder: Path) -> None:
        for missing in (*reversed(folder.parents), folder):
            missing.mkdir(exist_ok=True, mode=0o700)
        for made in (folder.parent, folder):
            descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _check_owner(descriptor, made)
            except OSError:
                os.close(descriptor)
                raise
            if made != folder:
                os.close(descriptor)
        self._folder, self._descriptor = folder, descriptor

    def close(self) -> None:
        """Close the folder."""
        os.close(self._descriptor)

    def load(self, name: str) -> ctypes.CDLL | None:
        """The library cached under a name; None if there is no intact one.

        Libraries that are damaged, do not load or do not belong to this user alone are removed.
        """
        for entry in sorted(os.listdir(self._descriptor)):  # noqa: PTH208  by descriptor
            if not (entry.startswith(f"{name}-") and entry.endswith(".so")):
                continue
            digest = entry.removeprefix(f"{name}-").removesuffix(".so")
            try:
                return self._load_entry(entry, digest)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(entry, dir_fd=self._descriptor)
        return None

    def keep(self, name: str, library: bytes) -> None:
        """Cache a library under a name, completely or not at all.

        Raises:
            OSError: It cannot be written.
        """
        entry = f"{name}-{hashlib.sha256(library).hexdigest()}.so"
        temporary = f".{entry}.{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600, dir_fd=self._descriptor)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(library)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, entry, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._descriptor)
            raise
        os.fsync(self._descriptor)

    @contextlib.contextmanager
    def one_builder(self) -> Iterator[None]:
        """Wait while another process builds, so that ranks of a run do not build the same."""
        import fcntl

        deadline = time.monotonic() + MAX_WAIT_FOR_ANOTHER_BUILD_SECONDS
        locked = False
        while not locked and time.monotonic() < deadline:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks: both build, which only costs time
                break
        try:
            yield
        finally:
            if locked:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _load_entry(self, entry: str, digest: str) -> ctypes.CDLL:
        # NONBLOCK: opening a pipe of that name would wait for its writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(entry, flags, dir_fd=self._descriptor)
        try:
            _check_owner(descriptor, self._folder / entry)
            if _sha256(descriptor) != digest:
                raise OSError(f"{self._folder / entry} is damaged")
            return load_by_descriptor(descriptor, self._folder / entry)
        except BaseException:
            os.close(descriptor)
            raise


def load_by_descriptor(descriptor: int, path: Path) -> ctypes.CDLL:
    """Load the file behind a descriptor, and leave it open.

    The loader identifies files by their path, which contains the number of the descriptor. So this
    number must not be used again.

    Args:
        descriptor: Descriptor of the library.
        path: Path of the same file, for systems without /proc.

    Raises:
        OSError: It does not load; in this case the descriptor may be closed.
    """
    opened = Path(f"/proc/self/fd/{descriptor}")
    return ctypes.CDLL(str(opened if opened.exists() else path))


def _check_owner(descriptor: int, path: Path) -> None:
    status = os.fstat(descriptor)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise UntrustedError(f"{path} is neither a file nor a folder")
    if status.st_uid != os.geteuid():
        raise UntrustedError(f"{path} belongs to user {status.st_uid}, not to user {os.geteuid()}")
    if status.st_mode & WRITABLE_BY_OTHERS:
        raise UntrustedError(f"others may write to {path} (chmod go-w prevents that)")


def _sha256(descriptor: int) -> str:
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
