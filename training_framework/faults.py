"""Fault injection: fail at a named point, to prove that a run survives failing there.

`TRAINING_FRAMEWORK_FAULT=POINT:N[:ACTION]` acts at the N-th pass (counted from 1) of POINT in each
process that reads it. ACTION is a signal that the process sends itself (`kill`, the default,
`term`, `int`, `hup`), or the name of an errno (`ENOSPC`, `EIO`, ...), which is raised as an
OSError. The variable is read once, at the import; unset, a pass calls an empty function.
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
"""Every name that a `fault_point` of the program passes."""

_SIGNALS = {name: signal.Signals[f"SIG{name.upper()}"] for name in ("kill", "term", "int", "hup")}


def fault_injector(setting: str) -> Callable[[str], None]:
    """A `fault_point` that acts as `setting` says; empty: one that does nothing.

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
        (f"{passes!r} is no count of passes", f"write {point}:N with N from 1, as in {point}:1",
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
    """Refuse a setting that names nothing, since a test by it would pass without a fault.

    Raises:
        UserError: TRAINING_FRAMEWORK_FAULT is malformed.
    """
    fault_injector(os.environ.get(VARIABLE, ""))


def _no_fault(passed: str) -> None:
    """Nothing: no fault is asked for."""


fault_point: Callable[[str], None] = _no_fault
"""Pass a point, given by its name: nothing happens unless the variable names it."""
with suppress(UserError):  # for `check_fault_variable` to raise, where it is caught and shown
    fault_point = fault_injector(os.environ.get(VARIABLE, ""))
