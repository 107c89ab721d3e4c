"""Metrics as TensorBoard events, to watch with `tensorboard --logdir`."""

import os
from collections.abc import Mapping
from typing import Any

__all__ = ["TensorBoardLogger"]


class TensorBoardLogger:
    """Writes every value as a scalar under its own name, and messages as text.

    Args:
        directory: Folder of the event files; made if it is missing.
        purge_step: Where a run goes on: the first step that will be logged again. TensorBoard
            hides what earlier event files hold from that step on.
    """

    def __init__(self, directory: str | os.PathLike[str], *, purge_step: int | None = None) -> None:
        # A slow import, which commands that log nothing need not wait for.
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(os.fspath(directory), purge_step=purge_step, flush_secs=10)
        # Typed as None in torch, where it is assigned later.
        self._events: Any = self._writer.file_writer
        self._summary_type = Summary
        self._last_step = (purge_step or 1) - 1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        # One event for all: SummaryWriter.add_scalar makes one for each, at several times the cost.
        summary = self._summary_type(
            value=[
                self._summary_type.Value(tag=name, simple_value=value)
                for name, value in values.items()
            ]
        )
        self._events.add_summary(summary, step)
        self._last_step = step

    def message(self, text: str) -> None:
        """Write the line as text at the step that was logged last."""
        self._writer.add_text("messages", text, self._last_step)

    def close(self) -> None:
        """Write what is still in memory and close the event file."""
        self._writer.close()
