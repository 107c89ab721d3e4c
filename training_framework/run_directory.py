"""The folder of a run: `<output_dir>/<name>/version_N`, never shared by two runs."""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from training_framework.errors import UserError

__all__ = ["create_run_directory", "run_directory_of", "write_json", "write_text_atomically"]

_VERSION = re.compile(r"version_(\d+)")


def create_run_directory(output_dir: Path, name: str) -> Path:
    """Make the next free `version_N` below `<output_dir>/<name>`, with its `checkpoints` folder.

    The folder is made by one system call that fails where it exists, so of two runs that start at
    once each gets its own.

    Raises:
        UserError: The place cannot be written to.
    """
    parent = output_dir / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        versions = (_VERSION.fullmatch(path.name) for path in parent.iterdir())
        number = max((int(match[1]) + 1 for match in versions if match), default=0)
        while True:
            directory = parent / f"version_{number}"
            try:
                directory.mkdir()
                break
            except FileExistsError:
                number += 1
        (directory / "checkpoints").mkdir()
    except OSError as error:
        raise UserError(
            f"{error.filename or parent}: cannot be written to ({error.strerror})",
            "give another --output-dir",
        ) from None
    return directory


def run_directory_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in; None for a checkpoint kept elsewhere."""
    folder = checkpoint.resolve().parent
    if folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file():
        return checkpoint.parent.parent
    return None


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file so that at every moment either the old or the new text is there, whole."""
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
    """Write plain values as indented JSON, atomically."""
    write_text_atomically(path, json.dumps(content, indent=2, default=str) + "\n")
