"""One trial of `tune`: a process builds a candidate, warms it up, and times it briefly."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from training_framework.config.inheritance import Setting, canonical_settings
from training_framework.config.loading import build_config
from training_framework.errors import UserError
from training_framework.measure.compare.comparison import OpenWorker
from training_framework.measure.compare.experiment import Variant
from training_framework.measure.compare.quiet import QuietMachine
from training_framework.measure.compare.workers import ProcessWorker, VariantFailure
from training_framework.measure.tune.result import Trial
from training_framework.measure.tune.search import (
    AS_PLANNED,
    HOPELESS_SHARE,
    Candidate,
    Dimension,
    Score,
    candidate_name,
    candidate_settings,
)

__all__ = ["TrialRunner", "limited_worker"]

SECONDS_BY_RUNG = (1.0, 2.0, 4.0)
WARMUP_STEPS = 3


def limited_worker(limit_seconds: float, limit_bytes: int) -> OpenWorker:
    """A function that starts a trial in a process with limits on its time and memory.

    Args:
        limit_seconds: Limit for the whole trial.
        limit_bytes: Limit of the process's resident memory; 0 for no limit.
    """
    program = (
        "-m", "training_framework.measure.tune.trial_worker", str(limit_seconds), str(limit_bytes),
    )  # fmt: skip
    return lambda variant, config, order: ProcessWorker(
        config, order, environment=variant.environment, program=program
    )


@dataclass(kw_only=True)
class TrialRunner:
    """Runs the trials that a search asks for, and keeps their results.

    Attributes:
        base: Settings before tuning.
        dimensions: What is varied.
        total_images: Training images of the whole run; a long start must pay off within them.
        memory_limit_bytes: Candidates that take more are rejected; None for no limit.
        open_worker: Starts a candidate.
        keep: Called after each trial with all trials so far.
        quiet: On a CPU, waits for a quiet machine before a trial is timed; None: no waiting.
        stream: Where progress goes; None: standard error.
        trials: All trials so far.
    """

    base: Mapping[str, Setting]
    dimensions: Sequence[Dimension]
    total_images: int
    memory_limit_bytes: int | None
    open_worker: OpenWorker
    keep: Callable[[list[Trial]], None]
    quiet: QuietMachine | None = None
    stream: TextIO | None = None
    trials: list[Trial] = field(default_factory=list)

    def __call__(self, candidate: Candidate, rung: int, best: float) -> Score:
        """Run a trial: see `training_framework.measure.tune.search.Measure`.

        Raises:
            UserError: The plan's own choice cannot run.
        """
        started = time.perf_counter()
        trial = Trial(
            name=candidate_name(self.dimensions, candidate),
            overrides=candidate_settings(self.dimensions, candidate),
            rung=rung,
        )
        try:
            self._measure(trial, best)
        except (VariantFailure, UserError) as failure:
            trial.reason = str(failure)
        trial.seconds = time.perf_counter() - started
        self.trials.append(trial)
        self.keep(self.trials)
        self._say(trial, best)
        if trial.outcome == "rejected" and not any(candidate) and rung == 0:
            raise UserError(
                f"tune: the plan's own choice cannot run: {trial.reason}",
                "fix that, or raise --memory-limit-gb if memory is the reason",
            )
        return Score(trial.score, hopeless=trial.outcome == "hopeless")

    def _measure(self, trial: Trial, best: float) -> None:
        """Measure, and fill in the trial."""
        order = {
            "measure": "steps",
            "steps": None,
            "seconds": SECONDS_BY_RUNG[trial.rung],
            "warmup_steps": WARMUP_STEPS,
            "seeds": (),
        }
        config = build_config({**self.base, **canonical_settings(trial.overrides, "tune")})
        worker = self.open_worker(Variant(name="trial", overrides=trial.overrides), config, order)
        try:
            facts = worker.facts
            warm = facts.images_per_step / min(facts.warmup_step_seconds)
            if warm < HOPELESS_SHARE * best:
                trial.outcome, trial.images_per_second, trial.score = "hopeless", warm, warm
                trial.reason = f"its warm-up reached only {warm:,.4g} images/s"
                return
            if self.quiet is None or facts.device != "cpu":
                measurement = worker.sample(0)
            else:
                measurement = self.quiet.sample(worker, 0, may_retake=True)
        finally:
            worker.close()
        trial.peak_memory_bytes = peak = measurement.peak_memory_bytes
        if self.memory_limit_bytes is not None and peak > self.memory_limit_bytes:
            raise VariantFailure(
                f"it took {peak / 2**30:.3g} GiB of memory, more than "
                f"{self.memory_limit_bytes / 2**30:.3g} GiB"
            )
        trial.outcome = "measured"
        trial.images_per_second = speed = measurement.images / measurement.seconds
        trial.startup_seconds = 0.0
        if facts.plan["compile"]:  # other starts are short and much alike
            settled = statistics.median(measurement.step_seconds)
            warmup = facts.warmup_step_seconds
            trial.startup_seconds = max(0.0, sum(warmup) - len(warmup) * settled)
        trial.score = self.total_images / (trial.startup_seconds + self.total_images / speed)

    def _say(self, trial: Trial, best: float) -> None:
        found = trial.reason
        if trial.outcome == "measured":
            found = f"{trial.images_per_second:,.4g} images/s"
            if trial.startup_seconds:
                found += f", {trial.score:,.4g} with its start of {trial.startup_seconds:.1f} s"
            if (trial.score or 0.0) > best and trial.name != AS_PLANNED:
                found += "  best so far"
        print(
            f"trial {len(self.trials)}, round {trial.rung + 1}: {trial.name}: {found}",
            file=self.stream or sys.stderr,
            flush=True,
        )
