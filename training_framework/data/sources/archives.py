"""Unpack files from a downloaded archive."""

import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from training_framework.errors import UserError

__all__ = ["unpack_files"]

_MAX_FILE_BYTES = 256 << 20  # CIFAR's archives contain 186 MB
_CURE = "delete it to download it again"


def unpack_files(archive: Path, folder: Path, wanted: Sequence[str]) -> None:
    """Unpack files from a .tar.gz: `<name of folder>/<wanted>` becomes `folder/<wanted>`.

    They are unpacked into a temporary folder, which is then renamed, so that a half-unpacked folder
    never has the final name. The archive has no influence on where files are written.

    Args:
        archive: The archive, already checked against its published digest.
        folder: The new folder; must not exist.
        wanted: Names of the files; the archive must contain all of them.

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
