"""Stop in good order: finish the step, save, leave."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

__all__ = ["StopRequested", "StopSignals"]

_Result = TypeVar("_Result")


class StopRequested(BaseException):
    """A signal cut a call short. No Exception, so that what catches those lets it pass."""


class StopSignals:
    """While active, the first SIGINT, SIGTERM or SIGHUP asks for a stop; the second stops at once.

    A SIGHUP that is ignored, as under nohup, stays ignored. Outside the main thread, where Python
    lets no handler be set, nothing is handled.

    Attributes:
        received: The signal that asked for the stop; None so far. The exit status of a run that a
            signal stopped is 128 plus its number (129, 130, 143).
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._cuts_short = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def interruptibly(self, call: Callable[[], _Result]) -> _Result:
        """Make a call that waits or works for long and changes nothing that would be missed.

        Raises:
            StopRequested: A signal came during the call, or before it.
        """
        self._cuts_short = True
        try:
            if self.received is not None:
                raise StopRequested
            return call()
        finally:
            self._cuts_short = False

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()  # so that a second signal meets the default: stop now
        if self._cuts_short:
            raise StopRequested
