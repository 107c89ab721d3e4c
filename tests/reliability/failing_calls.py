"""System calls that fail, or at which the process dies: the n-th one of those that change files."""

import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["ACTIONS", "FailingCalls"]

ACTIONS = ("ENOSPC", "EIO", "kill before", "kill after")
_CALLS = ("open", "close", "fsync", "link", "replace", "rename", "unlink", "listdir", "truncate")


class FailingCalls:
    """While active, counts the calls of this process by which Python changes files.

    They are counted where Python makes them: `os.open`, `os.fsync`, ..., and opening, writing,
    seeking in and closing a file object.

    Args:
        fail_at: Number of the call that fails, from 1; 0: none does.
        action: One of `ACTIONS`. An error of a full disk lets half of what is written through.
        without_links: Behave as a file system that has no hard links.

    Attributes:
        trace: Names of the calls so far.
    """

    def __init__(
        self, fail_at: int = 0, action: str = "EIO", *, without_links: bool = False
    ) -> None:
        self.trace: list[str] = []
        self._fail_at = fail_at
        self._action = action
        self._without_links = without_links

    def __enter__(self) -> "FailingCalls":
        self._originals = {name: getattr(os, name) for name in _CALLS}
        for name, call in self._originals.items():
            setattr(os, name, self._counted(name, call))
        self._open = io.open
        io.open = self._open_file
        return self

    def __exit__(self, *exception: object) -> None:
        io.open = self._open
        for name, call in self._originals.items():
            setattr(os, name, call)

    def perform(self, name: str, call: Callable[[], Any], halfway: Callable[[], Any]) -> Any:
        """Make a call, unless it is the one that fails.

        Args:
            name: For the trace.
            call: Makes it.
            halfway: Makes a part of it, before the disk is full.
        """
        self.trace.append(name)
        fails = len(self.trace) == self._fail_at
        if fails and self._action == "kill before":
            os.kill(os.getpid(), signal.SIGKILL)
        if fails and self._action in ("ENOSPC", "EIO"):
            if self._action == "ENOSPC":
                halfway()
            number = getattr(errno, self._action)
            raise OSError(number, os.strerror(number))
        try:
            return call()
        finally:
            if fails:
                os.kill(os.getpid(), signal.SIGKILL)

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            # Of a file that is not there, such a system says just that.
            if name == "link" and self._without_links and Path(arguments[0]).exists():
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            return self.perform(name, lambda: original(*arguments, **options), lambda: None)

        return call

    def _open_file(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if "r" in mode and "+" not in mode:
            return self._open(file, mode, *arguments, **options)
        opened = self.perform(
            "open", lambda: self._open(file, mode, *arguments, **options), lambda: None
        )
        return _FailingFile(opened, self)


class _FailingFile:
    """A file object whose calls are counted."""

    def __init__(self, file: Any, calls: FailingCalls) -> None:
        self._file = file
        self._calls = calls

    def write(self, content: Any) -> Any:
        return self._calls.perform(
            "write",
            lambda: self._file.write(content),
            lambda: self._file.write(content[: len(content) // 2]),
        )

    def seek(self, *arguments: Any) -> Any:
        return self._calls.perform("seek", lambda: self._file.seek(*arguments), lambda: None)

    def close(self) -> None:
        # A close that fails has let go of the file all the same.
        self._calls.perform("close", self._file.close, self._file.close)

    def __enter__(self) -> "_FailingFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
