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
        UserError: The file is missing, damaged, of another kind or of another format.
    """
    state = read_state(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: does not hold the state of a run", "use another checkpoint")
    missing = [name for name in _REQUIRED if name not in state]
    if missing:
        raise UserError(f"{path}: is incomplete: it lacks {missing[0]!r}", "use another checkpoint")
    wrong = [name for name in _REQUIRED if not isinstance(state[name], (dict, type(None)))]
    if wrong:
        raise UserError(f"{path}: its {wrong[0]!r} is not a state", "use another checkpoint")
    return state


def load_newest(last: Path) -> tuple[dict[str, Any], Path, list[str]]:
    """Read a run's last checkpoint, or the one before it where that is missing or damaged.

    Args:
        last: The run's `last.ckpt`.

    Returns:
        The state, the file that it is from, and lines to show the user: none, or what is damaged.

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
            "resume from another checkpoint of that folder with --resume, or start over with "
            "--resume never",
        ) from None
    return state, previous, [f"warning: {fault}; {previous.name}, the one before it, is used"]


def previous_of(last: Path) -> Path:
    """The checkpoint before `last.ckpt`: `last-1.ckpt`."""
    return last.with_name(f"{last.stem}-1{last.suffix}")
