"""Successive halving over combinations of settings: the search alone, without a clock or a network.

Short trials sort out most combinations, longer ones the rest (Jamieson and Talwalkar,
"Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016). The first
trials are not drawn blindly: after each value alone come the combinations that the gains so far
speak for.
"""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Candidate", "Dimension", "Score", "candidate_name", "candidate_settings", "search"]

AS_PLANNED = "as planned"
HALVING_FACTOR = 3
RUNGS = 3
FEWEST_TO_GO_ON = 2
# Shares of the time that may have passed when a rung starts its last trial.
TIME_SHARES = (0.7, 0.9, 1.0)
# A value that costs more than this alone is not tried in combinations.
HOPELESS_SHARE = 0.5
RANDOM_EVERY = 4
RIDGE = 1e-3

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
    """What a trial found: images per second, None where it was rejected; hopeless ends there."""

    value: float | None
    hopeless: bool = False


Measure = Callable[[Candidate, int, float], Score]
"""Makes a trial from the candidate, its rung, and the best score so far (0 before the first)."""


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
    most_trials: int,
    seed: int,
    time_share: Callable[[], float] = lambda: 0.0,
) -> list[Candidate]:
    """Find the combination with the best score.

    The plan's own choice is the first trial. With equal scores, the same arguments make the same
    trials in the same order.

    Args:
        dimensions: What is varied.
        measure: Makes a trial.
        most_trials: Limit of trials over all rungs, at least 1.
        seed: Draws the combinations that nothing speaks for.
        time_share: How much of the time has passed, from 0 to 1 and beyond.

    Returns:
        The candidates with a score, best first: those of the last rung, then those of the earlier.
    """
    state = _Search(dimensions, measure, most_trials, time_share)
    first = max(1, most_trials * (HALVING_FACTOR - 1) // HALVING_FACTOR)
    state.first_rung(first, random.Random(seed))
    for rung in range(1, RUNGS):
        keep = max(FEWEST_TO_GO_ON, math.ceil(len(state.scores[0]) / HALVING_FACTOR**rung))
        for candidate in state.ranking(rung - 1)[:keep]:
            if not state.try_one(candidate, rung):
                break
    ranked = [candidate for rung in reversed(range(RUNGS)) for candidate in state.ranking(rung)]
    return list(dict.fromkeys(ranked))


class _Search:
    def __init__(
        self,
        dimensions: Sequence[Dimension],
        measure: Measure,
        most_trials: int,
        time_share: Callable[[], float],
    ) -> None:
        self._dimensions = dimensions
        self._measure = measure
        self._trials_left = most_trials
        self._time_share = time_share
        self.scores: list[dict[Candidate, Score]] = [{} for _ in range(RUNGS)]

    def try_one(self, candidate: Candidate, rung: int) -> bool:
        """Make a trial; returns whether there was room for it."""
        if not self._trials_left or (any(self.scores) and self._time_share() >= TIME_SHARES[rung]):
            return False
        best = max((s.value or 0.0 for scores in self.scores for s in scores.values()), default=0.0)
        self.scores[rung][candidate] = self._measure(candidate, rung, best)
        self._trials_left -= 1
        return True

    def ranking(self, rung: int) -> list[Candidate]:
        """Candidates of a rung that may go on, best first; ties stay in the order of the trials."""
        able = {c: s.value for c, s in self.scores[rung].items() if s.value and not s.hopeless}
        return sorted(able, key=lambda candidate: -(able[candidate] or 0.0))

    def first_rung(self, trials: int, random_source: random.Random) -> None:
        """The plan's choice, each value alone, then combinations."""
        sizes = [len(dimension.values) for dimension in self._dimensions]
        planned = (0,) * len(sizes)
        singles = [
            (*planned[:position], number, *planned[position + 1 :])
            for position, size in enumerate(sizes)
            for number in range(1, size)
        ]
        # Some room is kept for combinations, in which most of the gain lies.
        alone = max(1, trials * 2 // 3) if math.prod(sizes) > trials else trials
        for candidate in [planned, *singles][:alone]:
            if not self.try_one(candidate, 0):
                return
        for number in range(trials - len(self.scores[0])):
            left = self._promising(sizes)
            if not left:
                return
            effects = self._effects(sizes)
            chosen = max(left, key=lambda c: sum(e[v] for e, v in zip(effects, c, strict=True)))
            if number % RANDOM_EVERY == RANDOM_EVERY - 1:
                chosen = random_source.choice(left)
            if not self.try_one(chosen, 0):
                return

    def _promising(self, sizes: Sequence[int]) -> list[Candidate]:
        """Untried combinations of values none of which was hopeless alone."""
        scores = self.scores[0]
        planned = scores[(0,) * len(sizes)].value or 0.0
        hopeless = set()
        for candidate, score in scores.items():
            changed = [(place, value) for place, value in enumerate(candidate) if value]
            if len(changed) == 1 and (score.value or 0.0) < HOPELESS_SHARE * planned:
                hopeless.add(changed[0])
        choices = [
            [value for value in range(size) if (place, value) not in hopeless]
            for place, size in enumerate(sizes)
        ]
        return [c for c in itertools.product(*choices) if c not in scores]

    def _effects(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """Logarithm of the factor that each value is worth, by ridge regression on the trials."""
        scored = [(c, s.value) for c, s in self.scores[0].items() if s.value]
        offsets = np.cumsum([0, *sizes])
        rows = np.zeros((len(scored), int(offsets[-1]) + 1))
        rows[:, -1] = 1.0
        for row, (candidate, _) in zip(rows, scored, strict=True):
            for offset, value in zip(offsets, candidate, strict=False):
                row[offset + value] = float(value > 0)
        logs = np.log([value for _, value in scored])
        penalty = RIDGE * np.eye(rows.shape[1])
        penalty[-1, -1] = 0.0
        # A value that no trial held has a row of zeros, and through the penalty no effect.
        weights = np.linalg.solve(rows.T @ rows + penalty, rows.T @ logs)
        return [weights[a:b] for a, b in itertools.pairwise(offsets)]
