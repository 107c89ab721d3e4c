"""Fault injection: fail at a named point, to prove that a run survives failing there.

`TRAINING_FRAMEWORK_FAULT=POINT:N[:ACTION]` acts at the N-th pass (counted from 1) of POINT in each
process that reads it. ACTION is a signal that the process sends itself, in lower case and without
SIG (`kill`, the default, `term`, `int`, `hup`), or the name of an errno (`ENOSPC`, `EIO`, ...),
which is raised as an OSError. The variable is read once, at the import; unset, a pass costs one
call of an empty function.
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
        "checkpoint.before_write",
        "checkpoint.in_write",
        "checkpoint.before_fsync",
        "checkpoint.before_replace",
        "checkpoint.before_directory_fsync",
        "checkpoint.after_save",
        "step.before_update",
        "step.after_update",
        "evaluation.batch",
        "packing.after_shard",
        "packing.before_rename",
        "logging.before_row",
        "logging.after_row",
        "resume.after_load",
    }
)
"""Every name that a `fault_point` of the program passes."""

_SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "hup": signal.SIGHUP,
}


def fault_injector(setting: str) -> Callable[[str], None]:
    """A `fault_point` that acts as `setting` says; empty: one that does nothing.

    Raises:
        UserError: The setting is not POINT:N[:ACTION] with a known point and action.
    """
    if not setting:
        return _no_fault
    point, _, rest = setting.partition(":")
    pass_text, _, action = rest.partition(":")
    if point not in POINTS:
        raise UserError(
            f"{VARIABLE}={setting}: unknown point {point!r}",
            f"the points are: {', '.join(sorted(POINTS))}",
        )
    if not (pass_text.isascii() and pass_text.isdecimal() and int(pass_text)):
        raise UserError(
            f"{VARIABLE}={setting}: {pass_text!r} is no count of passes",
            f"write {point}:N with N from 1, as in {point}:1",
        )
    action = action or "kill"
    number = getattr(errno, action, None) if action.startswith("E") else None
    if action not in _SIGNALS and number is None:
        raise UserError(
            f"{VARIABLE}={setting}: unknown action {action!r}",
            f"use {', '.join(_SIGNALS)} or the name of an errno, such as ENOSPC",
        )
    passes_left = int(pass_text)

    def inject(passed: str) -> None:
        nonlocal passes_left
        if passed != point:
            return
        passes_left -= 1
        if passes_left != 0:
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
