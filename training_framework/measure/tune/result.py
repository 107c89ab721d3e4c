"""The evidence file that `tune` writes beside its YAML: the schema."""

from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from training_framework.measure.compare.result import Result

__all__ = ["Trial", "TuningResult"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Trial(_Record):
    """One short measurement.

    Attributes:
        name: The settings that differ from the plan's own, in words.
        overrides: The same settings as values.
        rung: 0 for the first, shortest trials; the finalists are measured longer.
        outcome: `measured`; `hopeless` if its warm-up was so slow that it was stopped; `rejected`
            if it failed, took too much memory or took too long.
        reason: Why it was not measured; empty if it was.
        images_per_second: Settled speed; None if it was rejected.
        startup_seconds: What the start took longer than as many settled steps: compilation.
        score: Images per second over a whole run, including that start; trials are ranked by it.
        peak_memory_bytes: See `Measurement.peak_memory_bytes`.
        seconds: Total wall seconds of the trial.
    """

    name: str
    overrides: dict[str, Any]
    rung: int
    outcome: Literal["measured", "hopeless", "rejected"] = "rejected"
    reason: str = ""
    images_per_second: float | None = None
    startup_seconds: float | None = None
    score: float | None = None
    peak_memory_bytes: int | None = None
    seconds: float = 0.0


class TuningResult(_Record):
    """A whole search with its confirmation.

    Attributes:
        experiment: Name.
        command: The command that repeats it.
        started: UTC, ISO 8601.
        commit: Commit of the framework's sources; None if unknown.
        environment: As in `Result`.
        seed: Only in older files, where it drew some of the combinations.
        max_trials, budget_seconds, memory_limit_bytes: Limits of the search.
        settings: The settings before tuning.
        dimensions: The values that were varied, by name.
        trials: The trials in the order in which they ran.
        winner: Settings of the fastest combination; empty: the plan's own.
        chosen: Settings that the confirmation accepted: the winner's, or none.
        verdict: The reason, in one line.
        confirmation: Paired turns of the winner and the plan's default; None if the default itself
            was the fastest, or the confirmation has not run yet.
        complete: Whether the search was completed.
    """

    schema_version: Literal[1] = 1
    experiment: str
    command: str
    started: str
    commit: str | None = None
    environment: dict[str, Any]
    seed: int | None = None
    max_trials: int = Field(validation_alias=AliasChoices("max_trials", "most_trials"))
    budget_seconds: float | None
    memory_limit_bytes: int | None
    settings: dict[str, Any]
    dimensions: dict[str, list[str]]
    trials: list[Trial] = []
    winner: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    verdict: str = ""
    confirmation: Result | None = None
    complete: bool = False
