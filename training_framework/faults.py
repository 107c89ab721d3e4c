"""Fault injection: fail at a named point, to prove that a run survives a failure there.

`TRAINING_FRAMEWORK_FAULT=POINT:N[:ACTION]` acts when a process passes POINT for the N-th time
(counted from 1). ACTION is a signal that the process sends itself (`kill`, the default,
`term`, `int`, `hup`), or the name of an errno (`ENOSPC`, `EIO`, ...), which is raised as an
OSError. The variable is read once, at import; when it is unset, a point does nothing.
"""

import errno
import os
import signal
from collections.abc import Callable
from contextlib import suppress

from training_framework.errors import UserError

__all__ = ["POINTS", "VARIABLE", "check_fault_variable", "fault_injector", "fault_point"]

VARIABLE = "TRAINING_FRAMEWORK_FAULT"

POINTS = frozenset(
    {
        "checkpoint.before_write", "checkpoint.in_write", "checkpoint.before_fsync",
        "checkpoint.before_replace", "checkpoint.before_directory_fsync", "checkpoint.after_save",
        "step.before_update", "step.after_update", "evaluation.batch",
        "packing.after_shard", "packing.before_rename",
        "logging.before_row", "logging.after_row",
        "resume.after_load",
    }
)  # fmt: skip
"""The names of all fault points of the program."""

_SIGNALS = {name: signal.Signals[f"SIG{name.upper()}"] for name in ("kill", "term", "int", "hup")}


def fault_injector(setting: str) -> Callable[[str], None]:
    """A `fault_point` that acts as `setting` asks; an empty setting gives one that does nothing.

    Raises:
        UserError: The setting is not POINT:N[:ACTION] with a known point and action.
    """
    if not setting:
        return _no_fault
    point, passes, action = [*setting.split(":", 2), "", ""][:3]
    action = action or "kill"
    number = getattr(errno, action, None) if action.startswith("E") else None
    for fault, cure, wrong in (
        (f"unknown point {point!r}", f"the points are: {', '.join(sorted(POINTS))}",
         point not in POINTS),
        (f"{passes!r} is not a number of passes", f"write {point}:N with N from 1, as in {point}:1",
         not (passes.isascii() and passes.isdecimal() and int(passes))),
        (f"unknown action {action!r}",
         f"use {', '.join(_SIGNALS)} or the name of an errno, such as ENOSPC",
         action not in _SIGNALS and number is None),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"{VARIABLE}={setting}: {fault}", cure)
    passes_left = int(passes)

    def inject(passed: str) -> None:
        nonlocal passes_left
        passes_left -= passed == point
        if passed != point or passes_left != 0:
            return
        if number is not None:
            raise OSError(number, os.strerror(number))
        os.kill(os.getpid(), _SIGNALS[action])

    return inject


def check_fault_variable() -> None:
    """Refuse a malformed setting: a test that relies on it would pass without any fault.

    Raises:
        UserError: TRAINING_FRAMEWORK_FAULT is malformed.
    """
    fault_injector(os.environ.get(VARIABLE, ""))


def _no_fault(passed: str) -> None:
    """Do nothing: the variable is unset."""


fault_point: Callable[[str], None] = _no_fault
"""Pass the named point. Nothing happens unless the variable names it."""
with suppress(UserError):  # `check_fault_variable` raises it again, where it is caught and shown
    fault_point = fault_injector(os.environ.get(VARIABLE, ""))
