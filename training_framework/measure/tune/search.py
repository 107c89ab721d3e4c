"""The search itself, without a clock or a network: coordinate ascent, then longer trials.

The search starts from the plan's own choice. It changes one value at a time and keeps each change
that makes the present combination faster, until no change does. Then it measures the fastest
combinations again, for longer, as in successive halving (Jamieson and Talwalkar, "Non-stochastic
Best Arm Identification and Hyperparameter Optimization", AISTATS 2016).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Candidate", "Dimension", "Score", "candidate_name", "candidate_settings", "search"]

AS_PLANNED = "as planned"
# Candidates in each rung: first as many as the limits allow, then the fastest.
FINALISTS = (None, 6, 3)
# Share of the time that may have passed when each rung starts its last trial.
TIME_SHARES = (0.7, 0.9, 1.0)
# A value that reduces the speed to less than this share is not tried again.
HOPELESS_SHARE = 0.5

Candidate = tuple[int, ...]
"""The number of the value of each dimension; all zeros is the plan's own choice."""


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """Something that is varied.

    Attributes:
        name: What it is.
        values: Name and settings of each value; the first one is the plan's own choice and has no
            settings.
    """

    name: str
    values: tuple[tuple[str, Mapping[str, Any]], ...]


class Score(NamedTuple):
    """A trial's images per second, None if rejected; a hopeless one is not measured again."""

    value: float | None
    hopeless: bool = False


Measure = Callable[[Candidate, int, float], Score]
"""Runs a trial, given the candidate, its rung and the best score so far (0 before the first)."""


def candidate_settings(dimensions: Sequence[Dimension], candidate: Candidate) -> dict[str, Any]:
    """The settings that differ from the plan's own."""
    settings: dict[str, Any] = {}
    for dimension, number in zip(dimensions, candidate, strict=True):
        settings.update(dimension.values[number][1])
    return settings


def candidate_name(dimensions: Sequence[Dimension], candidate: Candidate) -> str:
    """The values that differ from the plan's own, in words."""
    pairs = zip(dimensions, candidate, strict=True)
    return ", ".join(d.values[number][0] for d, number in pairs if number) or AS_PLANNED


def search(
    dimensions: Sequence[Dimension],
    measure: Measure,
    *,
    max_trials: int,
    time_share: Callable[[], float] = lambda: 0.0,
) -> list[Candidate]:
    """Find the combination with the best score.

    The plan's own choice is the first trial. The same arguments and scores lead to the same trials
    in the same order.

    Args:
        dimensions: What is varied.
        measure: Runs a trial.
        max_trials: Maximum number of trials over all rungs, at least 1.
        time_share: Share of the time that has passed; it may exceed 1.

    Returns:
        The candidates with a score, best first: those of the last rung, then those of earlier ones.
    """
    rungs: list[dict[Candidate, Score]] = [{} for _ in FINALISTS]

    def value(candidate: Candidate, rung: int = 0) -> float:
        """The score; 0 if the trial was rejected, or a limit does not allow it."""
        if candidate not in rungs[rung]:
            made = sum(map(len, rungs))
            limit = max_trials if rung else max(1, max_trials * 2 // 3)
            if made >= limit or (made and time_share() >= TIME_SHARES[rung]):
                return 0.0
            best = max((s.value or 0.0 for scores in rungs for s in scores.values()), default=0.0)
            rungs[rung][candidate] = measure(candidate, rung, best)
        return rungs[rung][candidate].value or 0.0

    def ranking(rung: int) -> list[Candidate]:
        able = [c for c, score in rungs[rung].items() if score.value and not score.hopeless]
        return sorted(able, key=lambda candidate: -value(candidate, rung))

    _ascend([len(dimension.values) for dimension in dimensions], value)
    for rung, count in enumerate(FINALISTS[1:], 1):
        for candidate in ranking(rung - 1)[:count]:
            value(candidate, rung)
    return list(dict.fromkeys(c for rung in reversed(range(len(rungs))) for c in ranking(rung)))


def _ascend(sizes: Sequence[int], value: Callable[[Candidate], float]) -> None:
    """Walk from the plan's own choice to faster combinations, one value at a time."""
    best, start = (0,) * len(sizes), None
    value(best)
    moves = [(place, number) for place, size in enumerate(sizes) for number in (*range(1, size), 0)]
    while start != best:
        start = best
        for move in list(moves):
            candidate = _moved(best, *move)
            if value(candidate) < HOPELESS_SHARE * value(best):
                moves.remove(move)
            best = max(best, candidate, key=value)


def _moved(candidate: Candidate, place: int, number: int) -> Candidate:
    return (*candidate[:place], number, *candidate[place + 1 :])
