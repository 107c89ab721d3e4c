"""A file that grows record by record and reports every failed write."""

import errno
import os
from pathlib import Path

from training_framework.errors import UserError

__all__ = ["RecordFile"]


class RecordFile:
    """A file whose records have reached the operating system when `write` returns.

    This process buffers nothing, so a killed run loses no record from before a checkpoint, and
    `close` after a failed write does not write again.

    Args:
        path: The file, in an existing folder.
        new: Create the file, which must not exist; otherwise append to it.

    Raises:
        FileExistsError: The file to create already exists.
        UserError: The file cannot be opened.
    """

    def __init__(self, path: Path, *, new: bool) -> None:
        self._path = path
        try:
            self._file = path.open("xb" if new else "ab", buffering=0)
        except FileExistsError:
            raise
        except OSError as error:
            raise unwritable(path, error) from None

    def write(self, record: bytes) -> None:
        """Append a record.

        Raises:
            UserError: The record cannot be written, or the file was deleted. The file may end in a
                part of the record.
        """
        try:
            # Writing to a deleted file succeeds, but the numbers are lost.
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, "it was deleted during the run")
            while record:
                record = record[self._file.write(record) or 0 :]
        except OSError as error:
            raise unwritable(self._path, error) from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def unwritable(path: Path, error: OSError) -> UserError:
    """The UserError for a failed write."""
    return UserError(
        f"{path}: cannot be written to ({error.strerror or error})",
        "fix that or free some space, then resume the run from its last checkpoint with --resume",
    )
