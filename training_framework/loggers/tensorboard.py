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

# Readers expect this at the start of an event file.
_FILE_VERSION = "brain.Event:2"


class TensorBoardLogger:
    """Writes every value as a scalar under its own name, and messages as text.

    An event is in its file when `log` returns. By contrast, torch's SummaryWriter buffers events
    for seconds, loses them if the process is killed, and reports a full disk from another thread.

    Args:
        directory: Folder of the event files; created if it is missing.
        resume_step: For a resumed run, the number of steps so far: TensorBoard hides later steps in
            earlier event files, since they will be logged again. None: a new run.

    Raises:
        UserError: The folder cannot be written to.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, resume_step: int | None = None
    ) -> None:
        # Imported here, since the imports are slow and not all commands log.
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
        """Write the line as text at the last logged step."""
        from torch.utils.tensorboard.summary import text as text_summary

        encodable = text.encode(errors="backslashreplace").decode()  # a path may not be UTF-8
        self._write(step=self._last_step, summary=text_summary("messages", encodable))

    def close(self) -> None:
        """Close the event file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        # TensorBoard shows the time of day next to an event; nothing is measured with it.
        event = self._event_type(wall_time=time.time_ns() / 1e9, **fields)
        self._records.write(event.SerializeToString())


def _new_event_file(directory: Path) -> RecordFile:
    """A file whose name sorts after those of earlier runs, since readers go by name.

    The seconds of the clock would not suffice: a run may be resumed within a second, or after the
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
            f"{directory / name} already exists", "let only one run write to that folder"
        ) from None
