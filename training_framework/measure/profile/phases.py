"""The phases of a step: a real run's steps in windows, timed whole, in phases, or profiled."""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from training_framework.measure.profile.run_parts import synchronize
from training_framework.measure.profile.step_clock import (
    PHASES,
    MarkingLoader,
    MarkingLoggers,
    MarkingScaler,
    MarkingSums,
    StepClock,
    marking_transform,
)
from training_framework.plan import TrainPlan
from training_framework.runs.progress import Progress
from training_framework.training.loaders import Loaders
from training_framework.training.outputs import Outputs, file_loggers
from training_framework.training.parts import Parts, build_plan_schedule
from training_framework.training.trainer import Trainer

__all__ = ["StepPhases", "StepTimes", "Window", "measure_steps"]

LARGEST_GAP = 0.03
TURNS = 4


class Window(Protocol):
    """What happens from one step to a later one."""

    def begin(self) -> None:
        """Called between two steps."""

    def end(self) -> None:
        """Called after the window's last step."""


class _WallWindow:
    """Steps as they run in training: the device is waited for at both ends alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0

    def begin(self) -> None:
        synchronize(self._device)
        self._start = time.perf_counter()

    def end(self) -> None:
        synchronize(self._device)
        self.seconds += time.perf_counter() - self._start


class _PhaseWindow:
    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def begin(self) -> None:
        self._clock.start()

    def end(self) -> None:
        self._clock.stop()


@dataclass(frozen=True, kw_only=True)
class StepPhases:
    """Where the time of a step goes.

    Attributes:
        steps: Optimizer steps that were divided.
        seconds: Mean seconds a step, by phase (the keys of PHASES).
        shares: The same as shares of their sum.
        wall_seconds: Mean seconds a step by a clock of its own over the same steps.
        border_cost: What waiting for the device at the borders adds to a step, as a share of a step
            without them; noise can make it negative.
    """

    steps: int
    seconds: dict[str, float]
    shares: dict[str, float]
    wall_seconds: float
    border_cost: float

    @property
    def sum_over_wall(self) -> float:
        """Sum of the phases over the wall clock: 1 but for what the phases miss."""
        return sum(self.seconds.values()) / self.wall_seconds

    @property
    def adds_up(self) -> bool:
        """Whether the sum is within 3% of the wall clock."""
        return abs(self.sum_over_wall - 1) <= LARGEST_GAP


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """What `measure_steps` found.

    Attributes:
        phases: The steps that were divided.
        seconds_per_step: Of the undivided steps, which took turns with the divided ones.
    """

    phases: StepPhases
    seconds_per_step: float


class _Schedule:
    """Opens and closes windows as the trainer's steps pass."""

    def __init__(self, windows: Sequence[tuple[Window, int]], clock: StepClock) -> None:
        self._clock = clock
        self._windows = [window for window, _ in windows]
        self._ends = [sum(steps for _, steps in windows[: n + 1]) for n in range(len(windows))]

    @property
    def steps(self) -> int:
        return self._ends[-1]

    def begin(self) -> None:
        self._windows[0].begin()

    def advance(self, step: int) -> None:
        """The trainer calls this after each update."""
        self._clock.mark("optimizer")
        if step == self._ends[0]:
            self._windows.pop(0).end()
            self._ends.pop(0)
            if self._windows:
                self._windows[0].begin()


def measure_steps(
    parts: Parts, *, steps: int, warmup: int, last: tuple[Window, int] | None = None
) -> StepTimes:
    """Train, and look at where the time of the steps goes.

    The steps are the trainer's own, logging included; there are no evaluations and no checkpoints.

    Args:
        parts: The run. Its step keeps the marks, which from then on do nothing.
        steps: To divide; as many again run undivided.
        warmup: Steps before, at least; the loader's processes lose their head start in any case.
        last: A window of so many steps after all the others.

    Raises:
        KeyboardInterrupt: A signal ended the training.
        UserError: The data cannot be read, or the loss became infinite.
    """
    clock = StepClock(parts.device)
    divided, undivided = _PhaseWindow(clock), _WallWindow(parts.device)
    windows: list[tuple[Window, int]] = [
        (_WallWindow(parts.device), max(warmup, 1) + parts.plan.steps_loaded_ahead)
    ]
    for turn, size in enumerate(_turn_sizes(steps)):
        pair = (undivided, divided) if turn % 2 == 0 else (divided, undivided)
        windows += [(window, size) for window in pair]
    schedule = _Schedule([*windows, last] if last else windows, clock)
    with tempfile.TemporaryDirectory(prefix="efficient-resnet-") as folder:
        _train(parts, clock, schedule, Path(folder))
    seconds_per_step = undivided.seconds / steps
    total = sum(clock.seconds.values())
    wall = clock.wall_seconds / steps
    phases = StepPhases(
        steps=steps,
        seconds={phase: clock.seconds[phase] / steps for phase in PHASES},
        shares={phase: clock.seconds[phase] / total for phase in PHASES},
        wall_seconds=wall,
        border_cost=wall / seconds_per_step - 1,
    )
    return StepTimes(phases=phases, seconds_per_step=seconds_per_step)


def _turn_sizes(steps: int) -> list[int]:
    """Steps in up to TURNS turns: what else the machine does changes more slowly than they do."""
    size = -(-steps // TURNS)
    return [min(size, steps - start) for start in range(0, steps, size)]


def _train(parts: Parts, clock: StepClock, schedule: _Schedule, folder: Path) -> None:
    plan = _plan_for_steps(parts.plan, schedule.steps)
    step, loaders = parts.step, parts.loaders
    step.scaler = MarkingScaler(
        parts.device.type, enabled=step.scaler.is_enabled(), mark=clock.mark
    )
    step.sums = MarkingSums(parts.device, num_classes=plan.num_classes, mark=clock.mark)
    marked = Loaders(
        train=MarkingLoader(loaders.train, clock.mark),
        val=None,
        train_transform=marking_transform(loaders.train_transform, clock.mark),
        eval_transform=loaders.eval_transform,
    )
    # The progress bar would mix with what this prints.
    sinks = file_loggers(folder, tensorboard=plan.tensorboard)
    with MarkingLoggers(sinks, clock.mark) as loggers:
        trainer = Trainer(
            plan=plan,
            parts=dataclasses.replace(parts, loaders=marked, schedule=build_plan_schedule(plan)),
            outputs=Outputs(loggers=loggers, advance=schedule.advance),
            progress=Progress(),
        )
        schedule.begin()
        result = trainer.fit()
    if result.steps < schedule.steps:
        raise KeyboardInterrupt(result.stopped_by)


def _plan_for_steps(plan: TrainPlan, steps: int) -> TrainPlan:
    """The plan with exactly so many steps to make, longer where it has fewer."""
    if plan.total_steps < steps:
        epochs = -(-steps // plan.steps_per_epoch)
        plan = dataclasses.replace(plan, epochs=epochs, total_steps=epochs * plan.steps_per_epoch)
    return dataclasses.replace(plan, stop_after_steps=steps)
