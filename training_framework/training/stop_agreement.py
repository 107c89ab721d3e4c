"""Processes that train together stop and save at one and the same step."""

import signal
from typing import NamedTuple

import torch

from training_framework.machine.distributed import largest
from training_framework.training.signals import StopSignals

__all__ = ["Decision", "StopAgreement"]

# torchrun gives its processes 30 seconds from the signal to the end.
_SECONDS_BETWEEN_AGREEMENTS = 2.0


class Decision(NamedTuple):
    """What all processes do after a step.

    Attributes:
        stopped_by: Name of the signal to stop for; empty to go on.
        saves: Whether a save is due.
    """

    stopped_by: str
    saves: bool


class StopAgreement:
    """Decides after each step, alone at once, together by a collective that waits for the device.

    So several processes agree at logged steps, and in between only where steps take long; they save
    at logged steps alone, where the sums of all of them have just been read.

    Args:
        world_size: Processes.
        device: For the collective.
    """

    def __init__(self, *, world_size: int, device: torch.device) -> None:
        self._alone = world_size == 1
        self._device = device
        self._steps_between = 1
        self._save_is_due = False

    def decide(
        self,
        signals: StopSignals,
        *,
        step: int,
        step_seconds: float,
        save_is_due: bool,
        at_logged_step: bool,
    ) -> Decision:
        """What to do after `step`; all processes must ask after every step.

        Args:
            signals: Of this process.
            step: Steps made.
            step_seconds: What a step takes about.
            save_is_due: Whether this process would save.
            at_logged_step: Whether a row was logged, so that the device was waited for anyway.
        """
        received = signals.received
        if self._alone:
            return Decision(received.name if received else "", save_is_due)
        self._save_is_due |= save_is_due  # asked at a step where none may be made
        if not at_logged_step and step % self._steps_between:
            return Decision("", saves=False)
        number, due, seconds = largest(
            [received or 0, self._save_is_due, step_seconds], self._device
        )
        self._steps_between = max(1, int(_SECONDS_BETWEEN_AGREEMENTS / seconds))
        saves = bool(due) and at_logged_step
        if saves:
            self._save_is_due = False
        return Decision(signal.Signals(int(number)).name if number else "", saves)
