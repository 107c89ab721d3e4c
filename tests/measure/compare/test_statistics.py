import csv
import math
from pathlib import Path

import numpy as np
import pytest

from training_framework.measure.compare.statistics import (
    FEWEST_PAIRS,
    Interval,
    control_holds,
    has_settled,
    order_statistic_depth,
    paired_ratio,
    relative_spread,
)

RUNS, PAIRS = 20, 20


def recorded(file_name: str = "recorded_samples.csv") -> dict[str, np.ndarray]:
    """Seconds of samples that took turns; benchmarks/planted_slowdown.py --record made them.

    In `recorded_samples_busy.csv`, test suites took the better part of the machine's two cores.
    """
    with (Path(__file__).parent / file_name).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    assert len(rows) >= RUNS * PAIRS
    return {name: column[: RUNS * PAIRS].reshape(RUNS, PAIRS) for name, column in columns.items()}


def test_a_recorded_slowdown_of_ten_percent_is_found_in_every_run():
    samples = recorded()
    intervals = [
        paired_ratio(slowed, plain)
        for slowed, plain in zip(samples["slowed_seconds"], samples["plain_seconds"], strict=True)
    ]
    assert [interval.low > 1.05 for interval in intervals] == [True] * RUNS


def test_no_slowdown_is_found_where_none_was_planted():
    samples = recorded()
    intervals = [
        paired_ratio(control, plain)
        for control, plain in zip(samples["control_seconds"], samples["plain_seconds"], strict=True)
    ]
    assert [interval.low > 1.05 for interval in intervals] == [False] * RUNS
    assert sum(interval.low <= 1 <= interval.high for interval in intervals) >= RUNS - 2


def test_on_a_busy_machine_nothing_is_found_that_is_not_there():
    samples = recorded("recorded_samples_busy.csv")
    assert relative_spread(samples["plain_seconds"].ravel()) > 0.5
    for control, plain in zip(samples["control_seconds"], samples["plain_seconds"], strict=True):
        interval = paired_ratio(control, plain)
        assert interval.low <= 1.05 and interval.high >= 1 / 1.05


def test_swapping_the_sides_inverts_the_interval():
    rng = np.random.default_rng(0)
    ours, theirs = rng.uniform(1, 2, (2, 11))
    there, back = paired_ratio(ours, theirs), paired_ratio(theirs, ours)
    assert there.median == pytest.approx(1 / back.median, rel=1e-12)
    assert there.low <= there.median <= there.high
    # The two directions resample anew, and may step to a neighbouring order statistic.
    assert there.low == pytest.approx(1 / back.high, rel=0.2)


def test_drift_that_both_sides_share_cancels():
    drift = np.linspace(1, 3, 12)
    interval = paired_ratio(1.25 * drift, drift)
    assert (interval.low, interval.median, interval.high) == pytest.approx((1.25,) * 3)


@pytest.mark.parametrize("pairs", [6, 7, 10, 11, 20])
def test_the_interval_covers_the_true_median_at_least_as_often_as_it_says(pairs):
    """Of skewed noise, whose median and mean differ."""
    rng = np.random.default_rng(pairs)
    runs, hits = 250, 0
    for _ in range(runs):
        noise = np.exp(rng.exponential(0.1, pairs) - 0.1 * math.log(2))  # median 1
        interval = paired_ratio(noise, np.ones(pairs), resamples=300)
        hits += interval.low <= 1 <= interval.high
    assert hits / runs >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / runs)


def test_the_bootstrap_has_its_exact_distribution():
    """For an odd number, resampled medians are order statistics with binomial probabilities."""
    pairs = 51
    values = np.exp(np.arange(pairs) / 1000)
    interval = paired_ratio(values, np.ones(pairs))
    rank_low, rank_high = (round(1000 * math.log(end)) for end in (interval.low, interval.high))

    def median_at_most(rank: int) -> float:
        share = (rank + 1) / pairs
        return sum(
            math.comb(pairs, k) * share**k * (1 - share) ** (pairs - k)
            for k in range(pairs // 2 + 1, pairs + 1)
        )

    exact = next(rank for rank in range(pairs) if median_at_most(rank) >= 0.025)
    assert abs(rank_low - min(exact, order_statistic_depth(pairs))) <= 1
    assert abs(rank_high - (pairs - 1 - rank_low)) <= 1


def test_what_pairs_of_one_process_share_does_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(10), 12)
    covered = {"clusters": 0, "pairs": 0}
    for seed in range(60):
        shared = np.exp(rng.normal(0, 0.03, 10))[clusters]  # of a process, as long as it lives
        ours = shared * np.exp(rng.normal(0, 0.01, 120))
        by_cluster = paired_ratio(ours, np.ones(120), clusters=clusters, seed=seed)
        by_pair = paired_ratio(ours, np.ones(120), seed=seed)
        assert by_cluster.pairs == 10 and by_pair.pairs == 120
        covered["clusters"] += by_cluster.low <= 1 <= by_cluster.high
        covered["pairs"] += by_pair.low <= 1 <= by_pair.high
    assert covered["clusters"] >= 54
    assert covered["pairs"] < 54


def test_a_cluster_counts_as_the_median_of_its_pairs():
    interval = paired_ratio([1.0, 1.1, 5.0, 1.2, 1.3, 1.4], np.ones(6), clusters=[0, 0, 0, 1, 1, 1])
    assert interval.pairs == 2
    assert interval.median == pytest.approx((1.1 * 1.3) ** 0.5)


@pytest.mark.parametrize(
    ("pairs", "depth"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (10, 1), (12, 2), (20, 5)]
)
def test_order_statistics_are_those_of_the_sign_test(pairs, depth):
    """Published table of the sign test's two-sided 5% critical values."""
    assert order_statistic_depth(pairs) == depth


def test_fewer_than_six_pairs_cannot_cover_the_median():
    assert 1 - 2 * 0.5**FEWEST_PAIRS >= 0.95 > 1 - 2 * 0.5 ** (FEWEST_PAIRS - 1)


def test_one_pair_has_no_interval():
    assert paired_ratio([2.0], [1.0]) == Interval(median=2.0, low=None, high=None, pairs=1)


@pytest.mark.parametrize(
    ("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0]), ([1.0, -1.0], [1.0, 1.0]), ([0.0], [1.0])]
)
def test_samples_that_form_no_ratios_are_refused(ours, theirs):
    with pytest.raises(ValueError, match=r"pairs|positive"):
        paired_ratio(ours, theirs)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(1).uniform(1, 2, 15)
    ones = np.ones(15)
    assert paired_ratio(values, ones, seed=3) == paired_ratio(values, ones, seed=3)


def test_spread_is_the_quartiles_distance_over_the_median():
    assert relative_spread([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)
    assert relative_spread([1, 1, 1, 1, 1, 1, 1, 9]) == 0


@pytest.mark.parametrize(
    ("low", "high", "holds"),
    [(0.98, 1.03, True), (1.01, 1.03, False), (0.9, 1.02, False), (0.99, 1.06, False)],
)
def test_a_control_must_contain_one_closely(low, high, holds):
    assert control_holds(Interval(median=1.0, low=low, high=high, pairs=9)) is holds


def test_a_control_of_one_pair_proves_nothing():
    assert not control_holds(Interval(median=1.0, low=None, high=None, pairs=1))


def test_a_slow_beginning_has_not_settled():
    slow = [[1.5, 1.2, 1.0, 1.0, 1.0, 1.0]] * 4
    assert not has_settled(slow)
    assert has_settled([window[2:] for window in slow])


def test_one_disturbed_round_does_not_unsettle_the_others():
    quiet = [1.0] * 6
    assert has_settled([quiet, [3.0, 3.0, *quiet[2:]], quiet])
    assert has_settled([[9.0, 1.0]])
    assert has_settled([])
