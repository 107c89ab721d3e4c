"""Where a run's numbers, lines and checkpoints go."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training_framework.checkpoint import CheckpointKeeper
from training_framework.loggers import LOGGERS, ConsoleLogger, Logger, LoggerGroup
from training_framework.plan import TrainPlan

__all__ = ["Outputs", "file_loggers", "open_loggers"]


def _show_nothing(step: int) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a run's numbers, lines and checkpoints go; by default nowhere, as on later ranks.

    Attributes:
        loggers: Where numbers and lines go.
        advance: Called with the count of steps after each of them, for a progress bar.
        checkpoints: Keeps checkpoints; None on processes that do not.
        checkpoint_extras: What every checkpoint holds beside the state of the training.
        run_directory: The run's own folder; None without one.
    """

    loggers: LoggerGroup = field(default_factory=lambda: LoggerGroup([]))
    advance: Callable[[int], None] = _show_nothing
    checkpoints: CheckpointKeeper | None = None
    checkpoint_extras: Mapping[str, Any] = field(default_factory=dict)
    run_directory: Path | None = None


def file_loggers(
    directory: Path, *, tensorboard: bool, resume_step: int | None = None
) -> list[Logger]:
    """The sinks of a run that write files."""
    off = set() if tensorboard else {"tensorboard"}
    return [open_one(directory, resume_step) for n, open_one in LOGGERS.items() if n not in off]


def open_loggers(
    directory: Path, *, plan: TrainPlan, resume_step: int | None
) -> tuple[LoggerGroup, ConsoleLogger]:
    """All sinks of a run, and the one among them that shows progress."""
    console = ConsoleLogger(
        total_steps=plan.total_steps, start_step=resume_step or 0, total_epochs=plan.epochs
    )
    files = file_loggers(directory, tensorboard=plan.tensorboard, resume_step=resume_step)
    return LoggerGroup([console, *files]), console
