"""What the samples of two variants say about each other: plain functions of numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "FEWEST_PAIRS",
    "Interval",
    "control_holds",
    "has_settled",
    "order_statistic_depth",
    "paired_difference",
    "paired_ratio",
    "relative_spread",
]

Numbers = NDArray[np.float64]

CONFIDENCE = 0.95
# With fewer pairs, not even the whole range covers the median with 95% certainty (2 / 2^5 > 0.05).
FEWEST_PAIRS = 6


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A median with its 95% interval.

    Attributes:
        median: Median over the pairs.
        low: Lower end; None with a single pair.
        high: Upper end; None with a single pair.
        pairs: Number of pairs; with fewer than `FEWEST_PAIRS` the interval covers less than 95%.
    """

    median: float
    low: float | None
    high: float | None
    pairs: int


def paired_ratio(
    values: ArrayLike,
    against: ArrayLike,
    *,
    clusters: Sequence[int] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The median of the paired ratios `values / against` with a bootstrap 95% interval.

    The computation uses logarithms of the ratios, so swapping the two sides gives exactly the
    inverse. For the interval, see `_median_with_interval`.

    Args:
        values: Positive samples of one variant, shape (pairs,).
        against: Samples of the other, taken in the same rounds, shape (pairs,).
        clusters: The process that made each pair, length (pairs,). What the pairs of one process
            share by chance does not average out over them, so each process counts as one pair, the
            median of its own. None: pairs share nothing.
        resamples: Number of bootstrap resamples.
        seed: Seed for drawing them.

    Raises:
        ValueError: There are no pairs, unequal numbers of samples, or a sample is not positive.
    """
    ours, theirs = _pairs(values, against)
    if not (np.all(ours > 0) and np.all(theirs > 0)):
        raise ValueError("ratios are of positive samples")
    logs = np.log(ours) - np.log(theirs)
    if clusters is not None:
        labels = np.asarray(clusters)
        logs = np.array([np.median(logs[labels == label]) for label in np.unique(labels)])
    found = _median_with_interval(logs, resamples=resamples, seed=seed)
    ends = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Interval(
        median=math.exp(found.median), low=next(ends), high=next(ends), pairs=found.pairs
    )


def paired_difference(
    values: ArrayLike, against: ArrayLike, *, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The median of the paired differences `values - against`; for the rest see `paired_ratio`.

    Raises:
        ValueError: There are no pairs, or unequal numbers of samples.
    """
    ours, theirs = _pairs(values, against)
    return _median_with_interval(ours - theirs, resamples=resamples, seed=seed)


def _pairs(values: ArrayLike, against: ArrayLike) -> tuple[Numbers, Numbers]:
    ours, theirs = np.asarray(values, dtype=float), np.asarray(against, dtype=float)
    if ours.ndim != 1 or ours.shape != theirs.shape or not len(ours):
        raise ValueError(f"pairs are needed, not samples of shapes {ours.shape}, {theirs.shape}")
    return ours, theirs


def _median_with_interval(numbers: Numbers, *, resamples: int, seed: int) -> Interval:
    """The median of numbers, one for each pair, shape (pairs,), with its 95% interval.

    The interval is the percentile interval of the medians of resampled pairs (Efron and Tibshirani,
    An Introduction to the Bootstrap, 1993, section 13.3), rounded outwards. For some small numbers
    of pairs that interval covers too little (88% for 7 pairs). It is then widened to the order
    statistics that cover the median of any distribution with at least 95% (Conover, Practical
    Nonparametric Statistics, 1999, section 3.2).
    """
    numbers = np.sort(numbers)
    pairs = len(numbers)
    median = float(np.median(numbers))
    if pairs == 1:
        return Interval(median=median, low=None, high=None, pairs=1)
    draws = np.random.default_rng(seed).integers(0, pairs, size=(resamples, pairs))
    medians = np.median(numbers[draws], axis=1)
    tail = (1 - CONFIDENCE) / 2
    depth = order_statistic_depth(pairs)
    low = min(np.quantile(medians, tail, method="lower"), numbers[depth])
    high = max(np.quantile(medians, 1 - tail, method="higher"), numbers[pairs - 1 - depth])
    return Interval(median=median, low=float(low), high=float(high), pairs=pairs)


def order_statistic_depth(pairs: int) -> int:
    """How many samples lie, at each end, outside the order statistics that cover the median by 95%.

    The median lies below the k-th smallest of n samples with the probability of fewer than k heads
    in n coin tosses.
    """
    tail = (1 - CONFIDENCE) / 2
    below, depth = 0.0, 0
    while depth < (pairs - 1) // 2:
        below += math.comb(pairs, depth) / 2**pairs
        if below + math.comb(pairs, depth + 1) / 2**pairs > tail:
            break
        depth += 1
    return depth


def relative_spread(samples: ArrayLike) -> float:
    """Interquartile range divided by the median.

    Half of the samples lie within this range. The full range (max - min) would grow with the number
    of samples and depend on a single one: one disturbed round would spoil nine good ones.

    Args:
        samples: Positive samples, shape (n,).
    """
    quartiles = np.percentile(np.asarray(samples, dtype=float), [25, 50, 75])
    return float((quartiles[2] - quartiles[0]) / quartiles[1])


def control_holds(interval: Interval, *, tolerance: float = 0.05) -> bool:
    """Whether an A/A control shows that its comparison can be trusted.

    Its interval must contain 1 and stay within 1 / (1 + tolerance) to 1 + tolerance.
    """
    if interval.low is None or interval.high is None:
        return False
    contains = interval.low <= 1 <= interval.high
    return contains and interval.low >= 1 / (1 + tolerance) and interval.high <= 1 + tolerance


def has_settled(step_seconds: Sequence[Sequence[float]], *, tolerance: float = 0.05) -> bool:
    """Whether timed windows are as fast at their start as at their end, so without any warm-up.

    Each position in the window is represented by its median over the rounds, which removes chance
    disturbances. The median of the first third must not be slower than that of the rest by more
    than `tolerance`.

    Args:
        step_seconds: Seconds of the timed steps by round; rounds may differ in length. Windows of
            fewer than three steps cannot be judged and count as settled.
        tolerance: Largest relative difference allowed.
    """
    length = min((len(window) for window in step_seconds), default=0)
    if length < 3:
        return True
    profile = np.median([window[:length] for window in step_seconds], axis=0)
    beginning, rest = np.split(profile, [length // 3])
    return bool(np.median(beginning) <= (1 + tolerance) * np.median(rest))
