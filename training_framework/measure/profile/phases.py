"""The phases of a step: a real run's steps in windows, timed as a whole, by phase, or profiled."""

import copy
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from training_framework.loggers import LoggerGroup
from training_framework.measure.profile.run_parts import synchronize
from training_framework.measure.profile.step_clock import PHASES, StepClock
from training_framework.plan import TrainPlan
from training_framework.runs.progress import Progress
from training_framework.training.outputs import Outputs, file_loggers
from training_framework.training.parts import Parts, build_plan_schedule
from training_framework.training.phases import untimed
from training_framework.training.trainer import Trainer

__all__ = ["StepPhases", "Window", "measure_steps"]

MAX_GAP = 0.03
TURNS = 4


class Window(Protocol):
    """Observes a run from one step to a later one."""

    def begin(self) -> None:
        """Called between two steps."""

    def end(self) -> None:
        """Called after the window's last step."""


class _WallWindow:
    """Times steps as they run in training: it waits for the device only at both ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0

    def begin(self) -> None:
        synchronize(self._device)
        self._start = time.perf_counter()

    def end(self) -> None:
        synchronize(self._device)
        self.seconds += time.perf_counter() - self._start


@dataclass(frozen=True, kw_only=True)
class StepPhases:
    """Where the time of a step goes.

    Attributes:
        steps: Optimizer steps that were divided into phases.
        seconds: Mean seconds a step, by phase (the keys of PHASES).
        shares: The same, as shares of their sum.
        wall_seconds: Mean seconds of the same steps, by separate readings of the clock.
        undivided_seconds: Mean seconds of undivided steps, which took turns with the divided ones.
    """

    steps: int
    seconds: dict[str, float]
    shares: dict[str, float]
    wall_seconds: float
    undivided_seconds: float

    @property
    def border_cost(self) -> float:
        """What waiting for the device between phases adds to a step, as a share of an undivided
        step; noise can make it negative."""
        return self.wall_seconds / self.undivided_seconds - 1

    @property
    def sum_over_wall(self) -> float:
        """Sum of the phases divided by the wall time: 1, except for what the phases miss."""
        return sum(self.seconds.values()) / self.wall_seconds

    @property
    def adds_up(self) -> bool:
        """Whether the sum is within 3% of the wall time."""
        return abs(self.sum_over_wall - 1) <= MAX_GAP


class _Schedule:
    """Opens and closes windows as the trainer's steps pass."""

    def __init__(self, windows: Sequence[tuple[Window, int]]) -> None:
        self._windows = [window for window, _ in windows]
        self._ends = list(itertools.accumulate(steps for _, steps in windows))
        self.steps = self._ends[-1]

    def begin(self) -> None:
        self._windows[0].begin()

    def advance(self, step: int) -> None:
        """The trainer calls this after each update."""
        if step == self._ends[0]:
            self._windows.pop(0).end()
            self._ends.pop(0)
            if self._windows:
                self._windows[0].begin()


def measure_steps(
    parts: Parts, *, steps: int, warmup: int, last: tuple[Window, int] | None = None
) -> StepPhases:
    """Train, and measure where the time of the steps goes.

    The steps are the trainer's own, including logging; there are no evaluations and no checkpoints.

    Args:
        parts: The run.
        steps: Steps to divide into phases; as many again run undivided.
        warmup: Steps before that, at least 1; more are added until the loader processes have lost
            their head start.
        last: A window, and its number of steps, after all the others.

    Raises:
        KeyboardInterrupt: A signal ended the training.
        UserError: The data cannot be read, or the loss is not finite.
    """
    clock = StepClock(parts.device)
    undivided = _WallWindow(parts.device)
    windows: list[tuple[Window, int]] = [
        (_WallWindow(parts.device), max(warmup, 1) + parts.plan.steps_loaded_ahead)
    ]
    for turn, size in enumerate(_turn_sizes(steps)):
        pair = (undivided, clock) if turn % 2 == 0 else (clock, undivided)
        windows += [(window, size) for window in pair]
    schedule = _Schedule([*windows, last] if last else windows)
    with tempfile.TemporaryDirectory(prefix="efficient-resnet-") as folder:
        _train(parts, clock, schedule, Path(folder))
    total = sum(clock.seconds.values())
    return StepPhases(
        steps=steps,
        seconds={phase: clock.seconds[phase] / steps for phase in PHASES},
        shares={phase: clock.seconds[phase] / total for phase in PHASES},
        wall_seconds=clock.wall_seconds / steps,
        undivided_seconds=undivided.seconds / steps,
    )


def _turn_sizes(steps: int) -> list[int]:
    """Steps in up to TURNS turns, so that slow changes of the machine affect both kinds alike."""
    size = -(-steps // TURNS)
    return [min(size, steps - start) for start in range(0, steps, size)]


def _train(parts: Parts, clock: StepClock, schedule: _Schedule, folder: Path) -> None:
    plan, loaders = _plan_for_steps(parts.plan, schedule.steps), copy.copy(parts.loaders)
    loaders.val = None
    # The progress bar would mix with what this prints.
    with LoggerGroup(file_loggers(folder, tensorboard=plan.tensorboard)) as loggers:
        trainer = Trainer(
            plan=plan,
            parts=dataclasses.replace(parts, loaders=loaders, schedule=build_plan_schedule(plan)),
            outputs=Outputs(loggers=loggers, advance=schedule.advance),
            progress=Progress(),
        )
        parts.step.phase = clock.phase
        schedule.begin()
        result = trainer.fit()
        parts.step.phase = untimed
    if result.steps < schedule.steps:
        raise KeyboardInterrupt(result.stopped_by)


def _plan_for_steps(plan: TrainPlan, steps: int) -> TrainPlan:
    """The plan with exactly this many steps; it is extended if it has fewer."""
    if plan.total_steps < steps:
        epochs = -(-steps // plan.steps_per_epoch)
        plan = dataclasses.replace(plan, epochs=epochs, total_steps=epochs * plan.steps_per_epoch)
    return dataclasses.replace(plan, stop_after_steps=steps)
