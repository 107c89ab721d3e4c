"""Read a run's checkpoint, or the one before it."""

from pathlib import Path
from typing import Any

from training_framework.checkpoint.file import read_state
from training_framework.errors import UserError

__all__ = ["load_checkpoint", "load_newest", "previous_of"]

_REQUIRED = ("model", "average", "optimizer", "scaler", "sums", "progress", "config", "network")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this framework, on the CPU. No code in it is ever run.

    Raises:
        UserError: The file is missing, damaged, or of another kind or format.
    """
    state = read_state(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: does not contain the state of a run", "use another checkpoint")
    missing = [name for name in _REQUIRED if name not in state]
    if missing:
        raise UserError(
            f"{path}: is incomplete: {missing[0]!r} is missing", "use another checkpoint"
        )
    wrong = [name for name in _REQUIRED if not isinstance(state[name], (dict, type(None)))]
    if wrong:
        raise UserError(f"{path}: its {wrong[0]!r} is not a state", "use another checkpoint")
    return state


def load_newest(last: Path) -> tuple[dict[str, Any], Path, list[str]]:
    """Read a run's last checkpoint, or the previous one if the last is missing or damaged.

    Args:
        last: The run's `last.ckpt`.

    Returns:
        The state, its file, and warnings to show the user.

    Raises:
        UserError: Neither can be read.
    """
    try:
        return load_checkpoint(last), last, []
    except UserError as error:
        previous = previous_of(last)
        if not previous.is_file():
            raise
        fault = error.fault
    try:
        state = load_checkpoint(previous)
    except UserError as error:
        raise UserError(
            f"{fault}, and {error.fault}",
            "resume from another checkpoint in that folder with --resume, or start again with "
            "--resume never",
        ) from None
    return state, previous, [f"warning: {fault}; using {previous.name}, the one before it"]


def previous_of(last: Path) -> Path:
    """The checkpoint before `last.ckpt`: `last-1.ckpt`."""
    return last.with_name(f"{last.stem}-1{last.suffix}")
