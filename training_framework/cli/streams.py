"""Standard input, output and error as they may be: closed, full, or read by nobody any more."""

import contextlib
import io
import os
import sys

__all__ = ["discard_output", "prepare_streams", "say"]

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def prepare_streams() -> None:
    """Open the null device in the place of closed streams, and let any text be written.

    Python sets streams that were closed at the start to None, and the next files that are opened
    take their numbers: what a library prints would end up in a log or a checkpoint. What a stream
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
    for name, mode in _STREAMS:  # not before all three numbers are taken
        if getattr(sys, name) is None:
            # For as long as the process lives, as the streams of Python itself.
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115, PTH123
            setattr(sys, name, stream)
    for output in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # it flushes, and that may fail already
            if isinstance(output, io.TextIOWrapper):
                output.reconfigure(errors="backslashreplace")


def say(line: str) -> None:
    """Print a line to standard error; where nobody can read it, the exit status has to do."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def discard_output() -> None:
    """Let standard output go to the null device from here on, what is buffered included."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
