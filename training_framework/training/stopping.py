"""Stop cleanly: finish the step, save, exit; several processes stop at the same step."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import torch

from training_framework.machine.distributed import largest

__all__ = ["Decision", "StopAgreement", "StopRequested", "StopSignals"]

# torchrun gives its processes 30 seconds from the signal to the end.
_SECONDS_BETWEEN_AGREEMENTS = 2.0

_Result = TypeVar("_Result")


class StopRequested(BaseException):
    """A signal interrupted a call. Not an Exception: `except Exception` must not catch it."""


class StopSignals:
    """While active, the first SIGINT, SIGTERM or SIGHUP asks for a stop; the second stops at once.

    A SIGHUP that is ignored, as under nohup, stays ignored. Python sets handlers in the main thread
    only, so nothing is handled in another one.

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

    def interruptibly(self, call: Callable[..., _Result], *arguments: Any) -> _Result:
        """Make a call that may take long and can be interrupted without loss.

        Raises:
            StopRequested: A signal came during the call, or before it.
        """
        self._cuts_short = True
        try:
            if self.received is not None:
                raise StopRequested
            return call(*arguments)
        finally:
            self._cuts_short = False

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()  # a second signal then has its default effect: stop now
        if self._cuts_short:
            raise StopRequested


class Decision(NamedTuple):
    """What all processes do after a step.

    Attributes:
        stopped_by: Name of the signal to stop for; empty to continue.
        saves: Whether a save is due.
    """

    stopped_by: str
    saves: bool


class StopAgreement:
    """Decides after each step whether to stop and whether to save, the same in all processes.

    A single process decides by itself. Several agree through a collective, which waits for the
    device: at logged steps, and in between only if steps take long. They save only at logged steps,
    where the sums of all of them have just been read.

    Args:
        world_size: Processes.
        device: For the collective.
    """

    def __init__(self, *, world_size: int, device: torch.device) -> None:
        self._alone = world_size == 1
        self._device = device
        self._steps_between = 1
        self._agreed = (0, time.monotonic())
        self._save_is_due = False

    def decide(
        self,
        signals: StopSignals,
        *,
        step: int,
        step_seconds: float | None,
        save_is_due: bool,
        at_logged_step: bool,
    ) -> Decision:
        """What to do after `step`; all processes must ask after every step.

        Args:
            signals: Of this process.
            step: Steps made.
            step_seconds: Approximate seconds of a step; None: as since the last agreement.
            save_is_due: Whether this process would save.
            at_logged_step: Whether a row was logged, so that the device was waited for anyway.
        """
        received = signals.received
        if self._alone:
            return Decision(received.name if received else "", save_is_due)
        self._save_is_due |= save_is_due  # remembered until a step that may save
        if not at_logged_step and step % self._steps_between:
            return Decision("", saves=False)
        now, (step_then, then) = time.monotonic(), self._agreed
        if step_seconds is None:
            # An agreement waits for the device, so what lies between two took as long there.
            step_seconds = (now - then) / max(1, step - step_then)
        number, due, seconds = largest(
            [received or 0, self._save_is_due, step_seconds], self._device
        )
        self._agreed = (step, time.monotonic())
        self._steps_between = max(1, int(_SECONDS_BETWEEN_AGREEMENTS / seconds))
        saves = bool(due) and at_logged_step
        if saves:
            self._save_is_due = False
        return Decision(signal.Signals(int(number)).name if number else "", saves)
