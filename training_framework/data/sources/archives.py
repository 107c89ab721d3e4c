"""Take files out of a downloaded archive."""

import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from training_framework.errors import UserError

__all__ = ["unpack_files"]

_MAX_FILE_BYTES = 256 << 20  # CIFAR's archives hold 186 MB
_CURE = "delete it, and it is downloaded again"


def unpack_files(archive: Path, folder: Path, wanted: Sequence[str]) -> None:
    """Take files out of a .tar.gz: `<name of folder>/<wanted>` becomes `folder/<wanted>`.

    They are unpacked beside the final place, which is then made in one move, so that no
    half-unpacked folder is ever found. Nothing in the archive decides where anything is written.

    Args:
        archive: The archive, whose digest was compared with the published one.
        folder: The new folder, which must not exist.
        wanted: Names of the files, all of which must be there.

    Raises:
        UserError: The archive is damaged or lacks a file.
        OSError: The files cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as scratch:
        unpacked = Path(scratch) / folder.name
        unpacked.mkdir()
        missing = set(wanted)
        try:
            with tarfile.open(archive, "r:gz") as tar:
                for member in tar:
                    top, _, name = member.name.partition("/")
                    if top != folder.name or name not in wanted:
                        continue
                    content = tar.extractfile(member) if member.isreg() else None
                    if content is None or member.issparse() or member.size > _MAX_FILE_BYTES:
                        raise tarfile.TarError(f"{member.name} is not a plain file")
                    with content, (unpacked / name).open("wb") as file:
                        shutil.copyfileobj(content, file)
                    missing.discard(name)
        except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
            raise UserError(f"{archive}: cannot be unpacked ({error})", _CURE) from None
        if missing:
            raise UserError(f"{archive}: lacks {folder.name}/{min(missing)}", _CURE)
        unpacked.rename(folder)
