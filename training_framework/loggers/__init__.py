"""Where a run's numbers go: one sink a module.

The names of the values, their units and their order are COLUMNS; every sink takes any part of
them. A value that is missing was not measured at that step.
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
    """What every sink does."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step; `step` counts the optimizer steps made, and increases."""

    def message(self, text: str) -> None:
        """Write a line for people, where the sink has a place for it."""

    def close(self) -> None:
        """Write what is still held back and close; no call may follow but another close."""


class LoggerGroup:
    """Several loggers as one, in their order; none of them (on ranks that do not log) is fine.

    Closing closes all of them, also where one fails; the error is raised afterwards. As a context
    manager it closes at the end.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = tuple(loggers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log to each."""
        for logger in self._loggers:
            logger.log(step, values)

    def message(self, text: str) -> None:
        """Give each the line."""
        for logger in self._loggers:
            logger.message(text)

    def close(self) -> None:
        """Close each."""
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
"""What opens each logger of a run that writes files, in their order.

Its arguments are the run's folder and, where a run is resumed, the steps made so far. A run opens
all of them but those whose name is a setting that is off: a new one is a module and a line here.
"""
