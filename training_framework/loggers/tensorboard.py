"""Metrics as TensorBoard events, to watch with `tensorboard --logdir`."""

import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training_framework.errors import UserError
from training_framework.loggers.record_file import RecordFile, unwritable

__all__ = ["TensorBoardLogger"]

# What readers take for the beginning of an event file.
_FILE_VERSION = "brain.Event:2"


class TensorBoardLogger:
    """Writes every value as a scalar under its own name, and messages as text.

    An event is in its file when `log` returns, where torch's SummaryWriter keeps events back for
    seconds, loses them with a killed process, and reports a full disk from another thread.

    Args:
        directory: Folder of the event files; made if it is missing.
        resume_step: The steps made so far, where a run is resumed: TensorBoard hides what earlier
            event files hold of later steps, since those will be logged again. None: a new run.

    Raises:
        UserError: The folder cannot be written to.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, resume_step: int | None = None
    ) -> None:
        # Slow imports, which commands that log nothing need not wait for.
        from tensorboard.compat.proto.event_pb2 import (
            Event,
            SessionLog,
        )
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import (
            RecordWriter,
        )

        self._event_type, self._summary_type = Event, Summary
        self._last_step = resume_step or 0
        self._file = _new_event_file(Path(directory))
        self._records = RecordWriter(self._file)
        self._write(file_version=_FILE_VERSION)
        if resume_step is not None:
            self._write(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step, as one event.

        Raises:
            UserError: They cannot be written.
        """
        entries = [
            self._summary_type.Value(tag=name, simple_value=value) for name, value in values.items()
        ]
        self._write(step=step, summary=self._summary_type(value=entries))
        self._last_step = step

    def message(self, text: str) -> None:
        """Write the line as text at the step that was logged last."""
        from torch.utils.tensorboard.summary import text as text_summary

        encodable = text.encode(errors="backslashreplace").decode()  # a path may be no UTF-8
        self._write(step=self._last_step, summary=text_summary("messages", encodable))

    def close(self) -> None:
        """Close the event file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        # The time of day is what TensorBoard shows beside an event; nothing is measured with it.
        event = self._event_type(wall_time=time.time_ns() / 1e9, **fields)
        self._records.write(event.SerializeToString())


def _new_event_file(directory: Path) -> RecordFile:
    """A file whose name sorts behind those of the runs before, as readers take them by name.

    The clock's seconds alone would not do: a run may be resumed within a second, or after the
    clock was set back.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in directory.iterdir()]
    except OSError as error:
        raise unwritable(directory, error) from None
    taken = [
        int(match[1])
        for name in names
        if (match := re.match(r"events\.out\.tfevents\.(\d+)", name))
    ]
    second = max([time.time_ns() // 10**9, *(number + 1 for number in taken)])
    name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.0"
    try:
        return RecordFile(directory / name, new=True)
    except FileExistsError:
        raise UserError(
            f"{directory / name} exists already", "let one run alone write to that folder"
        ) from None
