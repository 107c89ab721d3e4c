"""One trial of `tune`: a process that builds a candidate, warms up, and is timed for a moment."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from training_framework.config import TrainConfig
from training_framework.config.inheritance import Setting, canonical_settings
from training_framework.config.loading import build_config
from training_framework.errors import UserError
from training_framework.measure.compare.comparison import OpenWorker
from training_framework.measure.compare.experiment import Variant
from training_framework.measure.compare.quiet import QuietMachine
from training_framework.measure.compare.result import Measurement, VariantFacts
from training_framework.measure.compare.workers import ProcessWorker, VariantFailure, Worker
from training_framework.measure.tune.result import Trial
from training_framework.measure.tune.search import (
    AS_PLANNED,
    Candidate,
    Dimension,
    Score,
    candidate_name,
    candidate_settings,
)

__all__ = ["TrialRunner", "limited_worker"]

SECONDS_BY_RUNG = (1.0, 2.0, 4.0)
WARMUP_STEPS = 3
# A warm-up this much slower than the best trial does not deserve a sample.
HOPELESS_SHARE = 0.5


def limited_worker(limit_seconds: float, limit_bytes: int) -> OpenWorker:
    """What starts a trial in a process that ends where it takes too long or too much memory.

    Args:
        limit_seconds: For the whole trial.
        limit_bytes: Of the process's resident memory; 0 for no limit.
    """
    program = (
        "-m", "training_framework.measure.tune.trial_worker", str(limit_seconds), str(limit_bytes),
    )  # fmt: skip
    return lambda variant, config, order: ProcessWorker(
        config, order, environment=variant.environment, program=program
    )


class TrialRunner:
    """Makes the trials that a search asks for, and keeps what they found.

    Args:
        base: Settings before anything is tuned.
        dimensions: What is varied.
        total_images: Training images of the whole run, over which a long start has to pay.
        memory_limit_bytes: Candidates that take more are rejected; None for no limit.
        open_worker: Starts a candidate.
        keep: Called with the trials so far after each.
        quiet: Waits for a quiet machine before a trial is timed on a CPU; None: nobody waits.
        stream: Where progress goes; None: standard error.

    Attributes:
        trials: All trials so far.
    """

    def __init__(
        self,
        base: Mapping[str, Setting],
        dimensions: Sequence[Dimension],
        *,
        total_images: int,
        memory_limit_bytes: int | None,
        open_worker: OpenWorker,
        keep: Callable[[list[Trial]], None],
        quiet: QuietMachine | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.trials: list[Trial] = []
        self._base = base
        self._dimensions = dimensions
        self._total_images = total_images
        self._memory_limit = memory_limit_bytes
        self._open_worker = open_worker
        self._keep = keep
        self._quiet = quiet
        self._stream = sys.stderr if stream is None else stream

    def __call__(self, candidate: Candidate, rung: int, best: float) -> Score:
        """Make a trial: see `training_framework.measure.tune.search.Measure`.

        Raises:
            UserError: The plan's own choice cannot run.
        """
        started = time.perf_counter()
        name = candidate_name(self._dimensions, candidate)
        overrides = candidate_settings(self._dimensions, candidate)
        blank = Trial(name=name, overrides=overrides, rung=rung, outcome="rejected")
        try:
            trial = self._measured(blank, best)
        except (VariantFailure, UserError) as failure:
            trial = blank.model_copy(update={"reason": str(failure)})
        trial = trial.model_copy(update={"seconds": time.perf_counter() - started})
        self.trials.append(trial)
        self._keep(self.trials)
        self._say(trial, best)
        if trial.outcome == "rejected" and not any(candidate) and rung == 0:
            raise UserError(
                f"tune: the plan's own choice cannot run: {trial.reason}",
                "mend that, or raise --memory-limit-gb if that is the reason",
            )
        return Score(trial.score, hopeless=trial.outcome == "hopeless")

    def _measured(self, blank: Trial, best: float) -> Trial:
        order = {
            "measure": "steps",
            "steps": None,
            "seconds": SECONDS_BY_RUNG[blank.rung],
            "warmup_steps": WARMUP_STEPS,
            "seeds": (),
        }
        config = self._config(blank.overrides)
        worker = self._open_worker(Variant(name="trial", overrides=blank.overrides), config, order)
        try:
            facts = worker.facts
            warm = facts.images_per_step / min(facts.warmup_step_seconds)
            if warm < HOPELESS_SHARE * best:
                reason = f"its warm-up made {warm:,.4g} images/s"
                update = {"outcome": "hopeless", "reason": reason, "images_per_second": warm,
                          "score": warm}  # fmt: skip
                return blank.model_copy(update=update)
            measurement = self._sample(worker)
        finally:
            worker.close()
        return self._judged(blank, facts, measurement)

    def _sample(self, worker: Worker) -> Measurement:
        if self._quiet is None or worker.facts.device != "cpu":
            return worker.sample(0)
        return self._quiet.sample(worker, 0, may_retake=True)

    def _config(self, overrides: Mapping[str, Any]) -> TrainConfig:
        return build_config({**self._base, **canonical_settings(overrides, "tune")})

    def _judged(self, blank: Trial, facts: VariantFacts, measurement: Measurement) -> Trial:
        """The trial's figures, or its rejection for the memory it took."""
        peak = measurement.peak_memory_bytes
        if self._memory_limit is not None and peak > self._memory_limit:
            taken, limit = peak / 2**30, self._memory_limit / 2**30
            reason = f"it takes {taken:.3g} GiB of memory, more than {limit:.3g} GiB"
            return blank.model_copy(update={"reason": reason, "peak_memory_bytes": peak})
        speed = measurement.images / measurement.seconds
        startup = 0.0
        if facts.plan["compile"]:  # other starts are short, and all much alike
            settled = statistics.median(measurement.step_seconds)
            startup = sum(facts.warmup_step_seconds) - len(facts.warmup_step_seconds) * settled
            startup = max(0.0, startup)
        return blank.model_copy(
            update={
                "outcome": "measured",
                "images_per_second": speed,
                "startup_seconds": startup,
                "score": self._total_images / (startup + self._total_images / speed),
                "peak_memory_bytes": peak,
            }
        )

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
            file=self._stream,
            flush=True,
        )
