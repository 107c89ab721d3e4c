"""The checkpoints of a run: the last one, the one before it, and the best."""

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import psutil

from training_framework.checkpoint.background import BackgroundSaves, Save
from training_framework.checkpoint.file import read_description
from training_framework.checkpoint.flat_state import FlatState
from training_framework.checkpoint.loading import previous_of
from training_framework.checkpoint.writing import (
    flush_directory,
    removed_on_failure,
    unwritable,
    write_beside,
)
from training_framework.errors import UserError
from training_framework.faults import fault_point

__all__ = ["CheckpointKeeper"]


class CheckpointKeeper:
    """Keeps `last.ckpt`, the one before it as `last-1.ckpt`, and the best few in a folder.

    The best are named by epoch and accuracy: `resnet50-epoch=00-val_acc1=20.0000.ckpt`. Of equally
    good ones, the earlier stays.

    A save copies the state in memory and returns, and a thread writes the copy. Where saves come
    faster than the disk takes them, the newest wins: a save that still waits is dropped for a newer
    one, unless it may be one of the best. At most two wait. Meanwhile there are further copies of
    the weights, their average and the optimizer state. If the machine has too little memory for
    that, the state itself is written, and training waits. An error in the thread is raised by a
    later `save`, `wait` or `close`. As a context manager it closes at the end.

    Args:
        directory: An existing folder.
        prefix: Start of the names of the best ones: the name of the model.
        keep: Number of best checkpoints to keep.
        every_n_steps: Steps between two saves, for `is_due`; None: no such interval.
        every_seconds: Seconds between two saves, for `is_due`; None: no such interval.
        more_state: Called by `save` for further state to add to the checkpoint.
    """

    def __init__(
        self,
        directory: Path,
        *,
        prefix: str,
        keep: int,
        every_n_steps: int | None = None,
        every_seconds: float | None = None,
        more_state: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.directory = directory
        self._prefix = prefix
        self._keep = keep
        self._every_n_steps = every_n_steps
        self._every_seconds = every_seconds
        self._more_state = more_state
        self._saved_at = time.monotonic()
        self._background = BackgroundSaves(self._write, keep=keep)
        for left in directory.glob(".*.ckpt.tmp"):  # of a run that was killed during a save
            left.unlink(missing_ok=True)

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.directory / "last.ckpt"

    def is_due(self, step: int) -> bool:
        """Whether a save is due after `step` steps.

        During a save, the time alone never makes another one due.
        """
        if self._every_n_steps is not None and step % self._every_n_steps == 0:
            return True
        return (
            self._every_seconds is not None
            and time.monotonic() - self._saved_at >= self._every_seconds
            and not self._background.is_busy
        )

    def save(self, state: dict[str, Any], *, epoch: int, val_acc1: float | None) -> None:
        """Write `last.ckpt`, and keep it under a further name if it is one of the best.

        Args:
            state: As for `save_checkpoint`, with the number of steps as
                `state["progress"]["step"]`. It may change as soon as this returns.
            epoch: Epoch of the last step, from 0.
            val_acc1: Accuracy in percent of an evaluation at this step. None: there was no
                evaluation, so only `last.ckpt` is written.

        Raises:
            UserError: This save or an earlier one could not be written.
        """
        self._background.make_room(val_acc1)
        flat = FlatState.of({**state, **self._more_state()})
        save = Save(flat, state["progress"]["step"], epoch, val_acc1)
        self._saved_at = time.monotonic()
        copied = self._copied(save)
        if copied is None:
            self.wait()
            self._write(save)
            return
        try:
            self._background.add(copied)
        except RuntimeError:  # no memory for its stack, or no more threads (ulimit -u)
            self._write(copied)

    def _copied(self, save: Save) -> Save | None:
        """The save with a copy of its state; None where memory is too small for that."""
        if psutil.virtual_memory().available < 2 * save.state.tensor_bytes:
            return None
        try:
            return save._replace(state=save.state.copied())
        except RuntimeError:  # pinned memory can run out, or be limited, while there is other
            return None

    def wait(self) -> None:
        """Wait until the latest save is on the disk.

        Raises:
            UserError: It could not be written.
        """
        self._background.wait()

    def close(self) -> None:
        """The same as `wait`."""
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self.close()
        except UserError:
            if error is None:  # the first error is the one to show
                raise

    def _write(self, save: Save) -> None:
        try:
            temporary = write_beside(self.last, save.state)
            with removed_on_failure(temporary):
                fault_point("checkpoint.before_replace")
                # Before it becomes the last one: a run that is killed in between repeats this step,
                # and with it the same best checkpoint.
                if save.val_acc1 is not None:
                    self._keep_if_best(temporary, save.step, save.epoch, save.val_acc1)
                self._keep_previous()
                temporary.replace(self.last)
            flush_directory(self.directory)
            fault_point("checkpoint.after_save")
        except OSError as error:
            raise unwritable(self.last, error) from None

    def _keep_previous(self) -> None:
        """Link `last.ckpt` to `last-1.ckpt` too, so that a `last.ckpt` always exists."""
        if not self.last.exists():
            return
        previous = previous_of(self.last)
        link = previous.with_name(f".{previous.name}.tmp")
        link.unlink(missing_ok=True)
        try:
            os.link(self.last, link)
        except OSError:  # a file system without hard links: for a moment there is only last-1.ckpt
            self.last.replace(previous)
            return
        link.replace(previous)
        link.unlink(missing_ok=True)  # a rename between two names of the same file does nothing

    def _keep_if_best(self, written: Path, step: int, epoch: int, val_acc1: float) -> None:
        kept = self._best_first()
        if self._keep == 0:
            return
        if len(kept) >= self._keep and val_acc1 <= kept[self._keep - 1][0]:
            return
        path = self._free_name(step, epoch, val_acc1)
        if path is not None:
            _give_second_name(written, path)
        for _, dropped in self._best_first()[self._keep :]:
            dropped.unlink()

    def _best_first(self) -> list[tuple[float, Path]]:
        pattern = re.compile(
            re.escape(self._prefix) + r"-epoch=(\d+)-val_acc1=(\d+\.\d+)(?:-v(\d+))?\.ckpt"
        )
        found = []
        for path in self.directory.iterdir():
            match = pattern.fullmatch(path.name)
            if match:
                order = (-float(match[2]), int(match[1]), int(match[3] or 0))
                found.append((order, float(match[2]), path))
        return [(accuracy, path) for _, accuracy, path in sorted(found)]

    def _free_name(self, step: int, epoch: int, val_acc1: float) -> Path | None:
        """A name for one of the best checkpoints; None if this step already has one.

        A killed run can repeat a step, and two evaluations within an epoch can give the same
        accuracy.
        """
        stem = f"{self._prefix}-epoch={epoch:02d}-val_acc1={val_acc1:.4f}"
        path = self.directory / f"{stem}.ckpt"
        version = 1
        while path.exists():
            if _step_of(path) == step:
                return None
            path = self.directory / f"{stem}-v{version}.ckpt"
            version += 1
        return path


def _step_of(path: Path) -> int | None:
    try:
        step: int = read_description(path)["progress"]["step"]
    except (UserError, KeyError, TypeError):
        return None
    return step


def _give_second_name(written: Path, path: Path) -> None:
    """Give a file a second name, which remains when another file takes the first one."""
    try:
        os.link(written, path)
        return
    except OSError:  # a file system without hard links
        temporary = path.with_name(f".{path.name}.tmp")
    with removed_on_failure(temporary):
        shutil.copyfile(written, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
