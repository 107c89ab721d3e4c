"""Train without a stop, train again with stops, and compare the two runs."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from training_framework.checkpoint import load_checkpoint
from training_framework.config import TrainConfig, config_to_yaml
from training_framework.errors import UserError
from training_framework.faults import VARIABLE
from training_framework.measure.verify.difference import RunComparison, compare_runs
from training_framework.train import plan_for

__all__ = ["Verification", "stop_points", "verify_resume"]

# A run passes each of these once a step, since it logs every step.
_KILL_POINTS = (
    "step.before_update",
    "step.after_update",
    "logging.before_row",
    "logging.after_row",
)
# With kills: small enough that kills happen at different distances from the last save.
_STEPS_BETWEEN_SAVES = 2


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a verification found.

    Attributes:
        steps: Steps of both runs.
        stops: Steps at which the second run was stopped or killed, and then resumed.
        killed: Whether it was killed.
        comparison: What was compared, and what differed.
        needs_determinism: The device is not a CPU and `deterministic` is off, so two equal runs may
            differ even without a stop.
        kept: Folder with both runs; None if they were equal and have been deleted.
    """

    steps: int
    stops: tuple[int, ...]
    killed: bool
    comparison: RunComparison
    needs_determinism: bool
    kept: Path | None

    @property
    def passed(self) -> bool:
        """Whether nothing differed."""
        return not self.comparison.differences


def verify_resume(
    config: TrainConfig,
    *,
    steps: int = 20,
    stops: int = 3,
    stop_seed: int = 0,
    kill: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Verification:
    """Compare a run of `steps` steps with one that is stopped at random steps and resumed.

    Every part runs in its own process, started like `efficient-resnet train`, in this working
    directory and with this configuration. Only three things differ: the run's name, its folder (a
    temporary one), and the logging interval (every step). The schedule is that of the whole run.

    Args:
        config: What to train; its `resume` and `stop_after_steps` are ignored.
        steps: Steps to compare; at most the configuration's own.
        stops: How often the second run is stopped.
        stop_seed: Seed for drawing the steps at which it is stopped.
        kill: Kill it with SIGKILL within a step, instead of stopping it after a step.
        say: Called with a line at the start of each process.

    Raises:
        UserError: The numbers do not fit, torchrun started this process, or training fails.
    """
    if "RANK" in os.environ:
        raise UserError(
            "verify-resume: torchrun started this process",
            "start it without torchrun: verify-resume compares runs of one process",
        )
    plan = plan_for(config)[0]
    steps = min(steps, plan.total_steps)
    points = stop_points(steps, stops, stop_seed)
    folder = Path(tempfile.mkdtemp(prefix="verify-resume-"))
    kept = False
    try:
        runs = _Runs(config, folder, steps=steps, say=say)
        straight = runs.straight()
        resumed = runs.killed(points, stop_seed) if kill else runs.stopped(points)
        comparison = compare_runs(straight, resumed)
        kept = bool(comparison.differences)
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
    return Verification(
        steps=steps,
        stops=points,
        killed=kill,
        comparison=comparison,
        needs_determinism=plan.device != "cpu" and not plan.deterministic,
        kept=folder if kept else None,
    )


def stop_points(steps: int, stops: int, seed: int) -> tuple[int, ...]:
    """`stops` different steps below `steps`, drawn with `seed`, in order.

    Raises:
        UserError: There are not that many steps.
    """
    if not 1 <= stops < steps:
        raise UserError(
            f"verify-resume: {stops} stops do not fit into {steps} steps",
            "give 1 or more --stops, fewer than --steps and fewer than the steps of the training",
        )
    return tuple(sorted(random.Random(seed).sample(range(1, steps), stops)))


class _Runs:
    """Runs of one configuration in a folder, each in new processes."""

    def __init__(
        self, config: TrainConfig, folder: Path, *, steps: int, say: Callable[[str], None]
    ) -> None:
        self._folder, self._steps, self._say = folder, steps, say
        self._config = folder / "config.yaml"
        settings = {
            "output_dir": folder / "runs",
            "log_every_n_steps": 1,
            "resume": TrainConfig.model_fields["resume"].default,
            "stop_after_steps": None,
        }
        self._config.write_text(
            config_to_yaml(config.model_copy(update=settings)), encoding="utf-8"
        )

    def straight(self) -> Path:
        """Train without a stop; the run directory."""
        self._say(f"{self._steps} steps without a stop")
        return self._train("straight", stop_after_steps=self._steps)

    def stopped(self, points: Sequence[int]) -> Path:
        """Train, stop after each of these steps and resume from last.ckpt; the run directory."""
        start, directory = 0, Path()
        for end in (*points, self._steps):
            self._say(f"steps {start + 1} to {end} of the stopped run")
            resume = directory / "checkpoints" / "last.ckpt" if start else "never"
            directory = self._train("stopped", stop_after_steps=end, resume=resume)
            start = end
        return directory

    def killed(self, points: Sequence[int], seed: int) -> Path:
        """Train, get killed within each of these steps and resume by auto; the run directory."""
        draws, saved, directory = random.Random(seed), 0, Path()
        for point in (*points, None):
            place, fault = "to the end", ""
            if point is not None:
                place = draws.choice(_KILL_POINTS)
                fault = f"{place}:{point - saved}:kill"
                place = f"to SIGKILL in step {point}, {place}"
            self._say(f"from step {saved + 1} of the killed run {place}")
            directory = self._train(
                "killed",
                fault=fault,
                stop_after_steps=self._steps,
                save_every_n_steps=_STEPS_BETWEEN_SAVES,
            )
            last = directory / "checkpoints" / "last.ckpt"
            saved = int(load_checkpoint(last)["progress"]["step"]) if last.exists() else 0
        return directory

    def _train(self, name: str, *, fault: str = "", **settings: object) -> Path:
        """Train in a new process, until a fault (if given) kills it; the run directory."""
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "training_framework", "train"]
        done = subprocess.run(
            [*command, f"--config={self._config}", f"--name={name}", *flags],
            env={**os.environ, VARIABLE: fault},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode != (-signal.SIGKILL if fault else 0):
            raise _failure(done.returncode, done.stderr)
        # A run killed before its first checkpoint leaves a version without one.
        versions = (self._folder / "runs" / name).glob("version_*")
        return max(versions, key=lambda path: int(path.name.partition("_")[2]))


def _failure(status: int, errors: str) -> UserError:
    """The error that ended a training process, as the process printed it."""
    lines = [line for line in errors.splitlines() if line.strip()] or ["no message"]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if said:
        fault, _, cure = said[-1].rpartition("; ")
        return UserError(f"verify-resume: {fault}", cure)
    return UserError(
        f"verify-resume: a training process ended with status {status}: {lines[-1]}",
        "check that `efficient-resnet train` runs with this configuration",
    )
