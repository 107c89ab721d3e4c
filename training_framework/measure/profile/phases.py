"""The phases of a step: a real run's steps in windows, timed whole, in phases, or profiled."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from training_framework.measure.profile.run_parts import RunParts, synchronize
from training_framework.measure.profile.step_clock import PHASES, StepClock
from training_framework.runs.progress import Progress
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

    def __init__(self, windows: Sequence[tuple[Window, int]]) -> None:
        self._windows = [window for window, _ in windows]
        self._ends = [sum(steps for _, steps in windows[: n + 1]) for n in range(len(windows))]

    @property
    def steps(self) -> int:
        return self._ends[-1]

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
    parts: RunParts, *, steps: int, warmup: int, last: tuple[Window, int] | None = None
) -> StepTimes:
    """Train, and look at where the time of the steps goes.

    The steps are the trainer's own, logging included; there are no evaluations and no checkpoints.

    Args:
        parts: The run.
        steps: To divide; as many again run undivided.
        warmup: Steps before, at least; the loader's processes lose their head start in any case.
        last: A window of so many steps after all the others.

    Raises:
        KeyboardInterrupt: A signal ended the training.
        UserError: The data cannot be read, or the loss became infinite.
    """
    clock = StepClock(parts.device)
    undivided = _WallWindow(parts.device)
    windows: list[tuple[Window, int]] = [
        (_WallWindow(parts.device), max(warmup, 1) + parts.steps_ahead)
    ]
    for turn, size in enumerate(_turn_sizes(steps)):
        pair = (undivided, clock) if turn % 2 == 0 else (clock, undivided)
        windows += [(window, size) for window in pair]
    schedule = _Schedule([*windows, last] if last else windows)
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


def _train(parts: RunParts, clock: StepClock, schedule: _Schedule, folder: Path) -> None:
    plan = parts.plan_for_steps(schedule.steps)
    step = parts.step
    step.scaler = MarkingScaler(
        parts.device.type, enabled=step.scaler.is_enabled(), mark=clock.mark
    )
    step.sums = MarkingSums(parts.device, num_classes=plan.num_classes, mark=clock.mark)
    steps = schedule.steps
    with MarkingLoggers(parts.open_file_loggers(folder), clock.mark) as loggers:
        trainer = Trainer(
            plan=plan,
            step=step,
            loader=MarkingLoader(parts.loaders.train, clock.mark),
            transform=marking_transform(parts.loaders.train_transform, clock.mark),
            evaluate=None,
            schedule=parts.schedule_for(plan),
            loggers=loggers,
            advance=schedule.advance,
            checkpoints=None,
            checkpoint_extras={},
            progress=Progress(),
            flops_per_image=0.0,
            peak_flops=0.0,
            log_every_n_steps=parts.config.log_every_n_steps,
            stop_after_steps=steps,
            device=parts.device,
            run_directory=None,
        )
        schedule.begin()
        result = trainer.fit()
    if result.steps < steps:
        raise KeyboardInterrupt(result.stopped_by)
