"""Loggers of a run's metrics: one per module.

COLUMNS defines the names of the values, their units and their order; every logger accepts any
subset. A missing value was not measured at that step.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, Self

from training_framework.loggers.console import ConsoleLogger
from training_framework.loggers.csv import COLUMNS, CsvLogger
from training_framework.loggers.tensorboard import TensorBoardLogger

__all__ = [
    "COLUMNS",
    "LOGGERS",
    "ConsoleLogger",
    "CsvLogger",
    "Logger",
    "LoggerGroup",
    "TensorBoardLogger",
]


class Logger(Protocol):
    """The interface of a logger."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step; `step` is the number of optimizer steps, and increases."""

    def message(self, text: str) -> None:
        """Write a line for people, if the logger has a place for it."""

    def close(self) -> None:
        """Write all pending values and close. Afterwards, only `close` may be called again."""


class LoggerGroup:
    """Several loggers as one, in order; none at all on ranks that do not log.

    `close` closes all of them even if one fails, and raises its error afterwards. As a context
    manager it closes at the end.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = tuple(loggers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values to each logger."""
        for logger in self._loggers:
            logger.log(step, values)

    def message(self, text: str) -> None:
        """Write the line to each logger."""
        for logger in self._loggers:
            logger.message(text)

    def close(self) -> None:
        """Close each logger."""
        with ExitStack() as stack:
            for logger in reversed(self._loggers):
                stack.callback(logger.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


LOGGERS: dict[str, Callable[[Path, int | None], Logger]] = {
    "csv": lambda folder, step: CsvLogger(folder / "metrics.csv", resume_step=step),
    "tensorboard": lambda folder, step: TensorBoardLogger(folder, resume_step=step),
}
"""How to open each logger that writes files, in order.

The arguments are the run's folder and, for a resumed run, the number of steps so far. A run opens
all loggers, except one whose name is a setting that is off. A new logger is a module and a line
here.
"""
