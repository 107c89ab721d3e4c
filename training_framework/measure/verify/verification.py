"""Train straight, train again with stops, and hold the two together."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from training_framework.checkpoint import load_checkpoint
from training_framework.config import TrainConfig, config_to_yaml
from training_framework.errors import UserError
from training_framework.faults import VARIABLE
from training_framework.measure.verify.difference import RunComparison, compare_runs
from training_framework.train import plan_for

__all__ = ["Verification", "verify_resume"]

# Passed once a step, where every step is logged.
_KILL_POINTS = (
    "step.before_update",
    "step.after_update",
    "logging.before_row",
    "logging.after_row",
)
# In a verification with kills: often enough that each kill falls a different way after a save.
_STEPS_BETWEEN_SAVES = 2


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a verification found.

    Attributes:
        steps: Steps of both runs.
        stops: Steps after which the second run was stopped, or killed, and resumed.
        killed: Whether it was killed.
        comparison: What was compared, and what differed.
        needs_determinism: The device is no CPU and `deterministic` is off, so that two equal runs
            may differ without any stop.
        kept: Folder with both runs; None where they were equal, and are gone.
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

    Every part is a process of its own, started as `efficient-resnet train` is, in this working
    directory and on this configuration, but for the run's name, its folder (a temporary one) and
    the interval of the logged rows, which is one step. The schedule stays that of the whole run.

    Args:
        config: What to train; its `resume` and `stop_after_steps` are left out.
        steps: Steps to compare; at most the configuration's own.
        stops: How often the second run is stopped.
        stop_seed: Draws the steps after which it is.
        kill: End it by SIGKILL in the midst of a step, instead of in good order after it.
        say: Takes a line at the start of each process.

    Raises:
        UserError: The numbers do not fit, several processes are at work, or training fails.
    """
    if "RANK" in os.environ:
        raise UserError(
            "verify-resume: torchrun started this process",
            "start it without torchrun: it compares runs of one process",
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
    """`stops` different steps below `steps`, drawn by `seed`, in order.

    Raises:
        UserError: There are not so many.
    """
    if not 1 <= stops < steps:
        raise UserError(
            f"verify-resume: {stops} stops do not fit into {steps} steps",
            "give 1 or more --stops, fewer than --steps and than the steps of the whole training",
        )
    return tuple(sorted(random.Random(seed).sample(range(1, steps), stops)))


class _Runs:
    """Runs of one configuration in a folder, each process a fresh one."""

    def __init__(
        self, config: TrainConfig, folder: Path, *, steps: int, say: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._steps = steps
        self._say = say
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
        """The run directory of one that is never stopped."""
        self._say(f"{self._steps} steps straight")
        self._train("straight", {"stop_after_steps": self._steps})
        return self._directory("straight")

    def stopped(self, points: Sequence[int]) -> Path:
        """The run directory of one that stops after these steps and goes on from last.ckpt."""
        start = 0
        for end in (*points, self._steps):
            settings: dict[str, object] = {"stop_after_steps": end}
            if start:
                last = self._directory("stopped") / "checkpoints" / "last.ckpt"
                settings["resume"] = last
            self._say(f"steps {start + 1} to {end} of the stopped run")
            self._train("stopped", settings)
            start = end
        return self._directory("stopped")

    def killed(self, points: Sequence[int], seed: int) -> Path:
        """The run directory of one that is killed in the midst of these steps; resumes by auto."""
        draws = random.Random(seed)
        settings = {"stop_after_steps": self._steps, "save_every_n_steps": _STEPS_BETWEEN_SAVES}
        for point in points:
            saved = self._saved_step("killed")
            place = draws.choice(_KILL_POINTS)
            self._say(f"from step {saved + 1} of the killed run; SIGKILL in step {point}, {place}")
            self._train("killed", settings, fault=f"{place}:{point - saved}:kill")
        self._say(f"from step {self._saved_step('killed') + 1} of the killed run to its end")
        self._train("killed", settings)
        return self._directory("killed")

    def _saved_step(self, name: str) -> int:
        """Steps in the run's newest checkpoint; 0 without one."""
        if not (self._folder / "runs" / name).exists():
            return 0
        last = self._directory(name) / "checkpoints" / "last.ckpt"
        return int(load_checkpoint(last)["progress"]["step"]) if last.exists() else 0

    def _directory(self, name: str) -> Path:
        # A run that was killed before its first checkpoint has left a version without one.
        versions = (self._folder / "runs" / name).glob("version_*")
        return max(versions, key=lambda path: int(path.name.partition("_")[2]))

    def _train(self, name: str, settings: Mapping[str, object], *, fault: str = "") -> None:
        """Train in a fresh process; with a fault, until that kills it."""
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "training_framework", "train"]
        command += [f"--config={self._config}", f"--name={name}", *flags]
        environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
        if fault:
            environment[VARIABLE] = fault
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        expected = -signal.SIGKILL if fault else 0
        if done.returncode != expected:
            raise _failure(done.returncode, done.stderr)


def _failure(status: int, errors: str) -> UserError:
    """What a process of the verification has to say of its end."""
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    if lines:
        fault, _, cure = lines[-1].removeprefix("error: ").rpartition("; ")
        return UserError(f"verify-resume: {fault}", cure)
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no message")
    return UserError(
        f"verify-resume: a training process ended with status {status}: {last}",
        "see that `efficient-resnet train` runs with this configuration",
    )
