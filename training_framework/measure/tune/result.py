"""The evidence that `tune` keeps beside the YAML it writes: its schema, written and read."""

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
        overrides: The same as settings.
        rung: 0 for the first, shortest trials; the finalists are measured longer.
        outcome: `measured`; `hopeless` where its warm-up was so slow that it was stopped;
            `rejected` where it failed, took too much memory or too long.
        reason: Why, unless it was measured.
        images_per_second: Settled speed; None where it was rejected.
        startup_seconds: What its start took longer than as many settled steps: compilation.
        score: Images per second of a whole run, that start included; what trials are ranked by.
        peak_memory_bytes: See `Measurement.peak_memory_bytes`.
        seconds: Wall seconds that the trial took in all.
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
        commit: Of the framework's sources; None if unknown.
        environment: As in `Result`.
        seed: Only in older files: it drew some of the combinations.
        max_trials, budget_seconds, memory_limit_bytes: Limits of the search.
        settings: What the configuration gives before anything is tuned.
        dimensions: The values that were varied, by name.
        trials: In the order in which they were made.
        winner: Settings of the trial that came out first; empty: the plan's own.
        chosen: Settings that the confirmation leaves: the winner's, or none.
        verdict: Why these, in a line.
        confirmation: Paired turns of the winner and the plan's default; None where the default
            itself came out first, or before it was made.
        complete: Whether the search came to its end.
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
