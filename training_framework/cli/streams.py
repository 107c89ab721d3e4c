"""Standard input, output and error, even if they are closed, full or no longer read."""

import contextlib
import io
import os
import sys

__all__ = ["discard_output", "prepare_streams", "say"]

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def prepare_streams() -> None:
    """Replace closed streams by the null device, and make every text writable.

    Python sets streams that were closed at the start to None, and the next files to be opened take
    their numbers: the output of a library would end up in a log or a checkpoint. Text that a stream
    cannot encode, such as a path of invalid bytes or an accent in the C locale, is escaped.
    """
    for descriptor in range(len(_STREAMS)):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
    for name, mode in _STREAMS:  # only once all three numbers are taken
        if getattr(sys, name) is None:
            # Never closed, like the streams of Python itself.
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115, PTH123
            setattr(sys, name, stream)
    for output in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # it flushes, which may fail
            if isinstance(output, io.TextIOWrapper):
                output.reconfigure(errors="backslashreplace")


def say(line: str) -> None:
    """Print a line to standard error; if that fails, only the exit status reports the error."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def discard_output() -> None:
    """Send standard output to the null device from now on, including buffered text."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
