"""Saves that a thread writes, one after the other; a newer one can make one that waits needless."""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from training_framework.checkpoint.flat_state import FlatState

__all__ = ["BackgroundSaves", "Save", "still_needed"]

# Each one that waits is a copy of the whole state in memory. With one best checkpoint to keep, no
# more than two ever wait: the best and the newest.
MAX_WAITING = 2


class Save(NamedTuple):
    """A checkpoint to write.

    Attributes:
        state: What it holds.
        step: Number of steps.
        epoch: Epoch of the last step, from 0.
        val_acc1: Accuracy in percent of an evaluation at this step; None: there was none.
    """

    state: FlatState
    step: int
    epoch: int
    val_acc1: float | None


def still_needed(waiting: Sequence[Save], new_val_acc1: float | None, *, keep: int) -> list[Save]:
    """Those that a new save does not make needless: each may be one of the best.

    Args:
        waiting: In the order of their steps.
        new_val_acc1: The new save's accuracy; None: it has none.
        keep: Number of best checkpoints that are kept.
    """
    known = [save.val_acc1 for save in waiting] + [new_val_acc1]
    accuracies = [accuracy for accuracy in known if accuracy is not None]
    return [
        save
        for save in waiting
        if save.val_acc1 is not None
        and sum(accuracy > save.val_acc1 for accuracy in accuracies) < keep
    ]


class BackgroundSaves:
    """Writes saves in a thread, in their order, until none waits.

    Args:
        write: Writes one.
        keep: Number of best checkpoints that are kept.
    """

    def __init__(self, write: Callable[[Save], None], *, keep: int) -> None:
        self._write = write
        self._keep = keep
        self._changed = threading.Condition()
        self._waiting: list[Save] = []
        self._thread: threading.Thread | None = None
        self._runs = False
        self._error: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a save is being written."""
        return self._runs

    def make_room(self, val_acc1: float | None) -> None:
        """Drop what a new save of that accuracy makes needless; wait while too many are left.

        Raises:
            BaseException: What ended the writing of an earlier one.
        """
        with self._changed:
            self._waiting = still_needed(self._waiting, val_acc1, keep=self._keep)
            self._changed.wait_for(lambda: len(self._waiting) < MAX_WAITING)
        self._raise_error()

    def add(self, save: Save) -> None:
        """Let the thread write a save.

        Raises:
            RuntimeError: There is no thread, and none can be started.
        """
        with self._changed:
            if self._runs:
                self._waiting.append(save)
                return
            thread = threading.Thread(target=self._run, name="checkpoint")
            self._waiting, self._runs = [save], True
            try:
                thread.start()
            except RuntimeError:
                self._waiting, self._runs = [], False
                raise
            self._thread = thread

    def wait(self) -> None:
        """Wait until all are written.

        Raises:
            BaseException: What ended the writing of one.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise_error()

    def _raise_error(self) -> None:
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        while (save := self._next()) is not None:
            try:
                self._write(save)
            except BaseException as error:
                with self._changed:
                    self._error, self._waiting = error, []  # of what waits, none is written

    def _next(self) -> Save | None:
        with self._changed:
            save = self._waiting.pop(0) if self._waiting else None
            self._runs = save is not None
            self._changed.notify_all()
            return save
