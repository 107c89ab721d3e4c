import io
import itertools
import json
import math
import random

import pytest
import torch

from training_framework.cli.main import main
from training_framework.config import load_config
from training_framework.errors import UserError
from training_framework.measure.compare.experiment import Variant
from training_framework.measure.compare.result import Measurement, Ratio, VariantFacts
from training_framework.measure.compare.workers import VariantFailure
from training_framework.measure.tune.search import (
    Dimension,
    Score,
    candidate_name,
    candidate_settings,
    search,
)
from training_framework.measure.tune.trials import limited_worker
from training_framework.measure.tune.tuning import tune
from training_framework.switches import SWITCHES

pytestmark = pytest.mark.usefixtures("narrow_networks")

BATCH = ("batch_size", "accumulate_grad_batches")
SETTINGS = {
    "data": "synthetic", "synthetic_train_images": 64, "synthetic_val_images": 8, "img_size": 8,
    "num_classes": 4, "model": "resnet10", "batch_size": 32, "epochs": 100, "precision": "32",
    "accelerator": "cpu", "threads": 1, "tensorboard": False,
}  # fmt: skip
FACTORS = ((1.0, 2.1, 0.3), (1.0, 1.15), (1.0, 0.9, 1.05, 0.7), (1.0, 1.2))


def dimensions(factors):
    return [
        Dimension(
            name=f"d{place}",
            values=tuple((f"d{place}={v}", {f"d{place}": v} if v else {}) for v in range(len(row))),
        )
        for place, row in enumerate(factors)
    ]


class FakeTimer:
    """Speeds are products of factors, off by up to 1% at random; all trials are noted."""

    def __init__(self, factors, seed=0):
        self.factors, self.noise, self.trials = factors, random.Random(seed), []

    def true(self, candidate):
        # The first two gains do not add up in full.
        both = 0.9 if candidate[0] == 1 and candidate[1] == 1 else 1.0
        return both * math.prod(row[v] for row, v in zip(self.factors, candidate, strict=True))

    def __call__(self, candidate, rung, best):
        self.trials.append((candidate, rung))
        value = 100 * self.true(candidate) * self.noise.uniform(0.99, 1.01)
        return Score(value, hopeless=value < 0.5 * best)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_trials", [24, 72])
def test_search_finds_the_best_of_the_exhaustive_grid_within_3_percent(seed, max_trials):
    timer = FakeTimer(FACTORS, seed)
    ranking = search(dimensions(FACTORS), timer, max_trials=max_trials)
    best = max(timer.true(c) for c in itertools.product(*(range(len(row)) for row in FACTORS)))
    assert timer.true(ranking[0]) >= 0.97 * best
    assert len(timer.trials) <= max_trials


def test_same_scores_make_the_same_trials_that_begin_with_the_default():
    lists = []
    for _ in range(2):
        timer = FakeTimer(FACTORS)
        search(dimensions(FACTORS), timer, max_trials=30)
        lists.append(timer.trials)
    assert lists[0] == lists[1]
    assert lists[0][0] == ((0, 0, 0, 0), 0)


def test_gain_that_two_values_only_make_together_is_found():
    def together(candidate, rung, best):
        return Score({(0, 0): 100.0, (1, 0): 110.0, (0, 1): 90.0, (1, 1): 150.0}[candidate])

    assert search(dimensions(((1, 1), (1, 1))), together, max_trials=12)[0] == (1, 1)


def test_value_that_another_one_made_needless_is_taken_back():
    def needless(candidate, rung, best):
        return Score({(0, 0): 100.0, (1, 0): 130.0, (0, 1): 120.0}.get(candidate, 90.0))

    def traded(candidate, rung, best):  # the first gain stands in the way of the larger pair
        speeds = {(1, 0, 0): 130.0, (0, 1, 0): 120.0, (1, 1, 0): 140.0, (0, 1, 1): 150.0,
                  (1, 1, 1): 145.0, (0, 0, 1): 90.0, (1, 0, 1): 100.0}  # fmt: skip
        return Score(speeds.get(candidate, 100.0))

    assert search(dimensions(((1, 1), (1, 1))), needless, max_trials=12)[0] == (1, 0)
    assert search(dimensions(((1, 1),) * 3), traded, max_trials=24)[0] == (0, 1, 1)


def test_value_that_is_hopeless_alone_is_not_tried_in_combination():
    timer = FakeTimer(FACTORS)
    search(dimensions(FACTORS), timer, max_trials=40)
    assert [c for c, _ in timer.trials if c[0] == 2] == [(2, 0, 0, 0)]
    assert max(rung for _, rung in timer.trials) == 2


def random_space(source):
    """Factors of 4 to 7 dimensions, some of whose values help or hinder each other."""
    sizes = [source.choice([2, 2, 3, 4]) for _ in range(source.randint(4, 7))]
    factors = [[1.0, *(math.exp(source.gauss(0, 0.15)) for _ in range(n - 1))] for n in sizes]
    together = {
        ((a, source.randrange(1, sizes[a])), (b, source.randrange(1, sizes[b]))): factor
        for a, b in itertools.combinations(range(len(sizes)), 2)
        if (factor := math.exp(source.gauss(0, 0.08))) > 1.05 or factor < 0.95
    }
    return sizes, factors, together


def test_search_with_noise_and_interactions_comes_near_the_best_at_the_default_of_32_trials():
    shares = []
    for seed in range(20):
        source = random.Random(seed)
        sizes, factors, together = random_space(source)

        def speed(candidate, factors=factors, together=together):
            values = set(enumerate(candidate))
            pairs = (factor for pair, factor in together.items() if values.issuperset(pair))
            alone = (row[v] for row, v in zip(factors, candidate, strict=True))
            return math.prod([*alone, *pairs])

        def measured(candidate, rung, best, speed=speed, source=source):
            return Score(speed(candidate) * math.exp(source.gauss(0, 0.03 / 2**rung)))

        ranking = search(dimensions(factors), measured, max_trials=32)
        best = max(map(speed, itertools.product(*map(range, sizes))))
        shares.append(speed(ranking[0]) / best)
    assert sum(shares) / len(shares) > 0.97


def test_search_that_is_out_of_time_keeps_what_it_has():
    timer = FakeTimer(FACTORS)
    ranking = search(
        dimensions(FACTORS), timer, max_trials=40, time_share=lambda: len(timer.trials) / 4
    )
    assert 1 <= len(timer.trials) <= 4
    assert timer.true(ranking[0]) == pytest.approx(2.1)


def test_names_and_settings_of_a_candidate_are_its_differences():
    space = dimensions(FACTORS)
    assert candidate_name(space, (0, 0, 0, 0)) == "as planned"
    assert candidate_name(space, (1, 0, 2, 0)) == "d0=1, d2=2"
    assert candidate_settings(space, (1, 0, 2, 0)) == {"d0": 1, "d2": 2}


class FakeWorker:
    """Images per second from the settings, without computing."""

    def __init__(self, config, speed_of, peak_bytes):
        self.images = config.batch_size * config.accumulate_grad_batches
        self.speed = speed_of(config)
        self.peak = peak_bytes(config)
        self.facts = VariantFacts(
            device="fake", device_name="fake", dataset="synthetic", train_images=64, image_size=8,
            images_per_step=self.images, flops_per_image=1.0, peak_flops=0.0,
            peak_flops_source="n/a", build_seconds=0.1,
            plan={"compile": config.compile is True, "threads": 1, "precision": "32"},
            warmup_step_seconds=[self.images / self.speed] * 3,
        )  # fmt: skip

    def sample(self, round_number):
        step = self.images / self.speed
        return Measurement(
            round=round_number, seconds=5 * step, steps=5, images=5 * self.images,
            step_seconds=[step] * 5, cpu_seconds=step, other_cpu_share=0.0,
            peak_memory_bytes=self.peak,
        )  # fmt: skip

    def close(self):
        pass


def opener(speed_of, peak_bytes=lambda config: 2**20):
    return lambda variant, config, order: FakeWorker(config, speed_of, peak_bytes)


def smaller_is_faster(config):
    return 100.0 * (1.5 if config.batch_size == 8 else 1.2 if config.batch_size == 16 else 1.0)


def tuned(path, speed_of, **options):
    peak = options.pop("peak_bytes", lambda config: 2**20)
    return tune(
        None, SETTINGS, output=path / "tuned.yaml", open_worker=opener(speed_of, peak),
        stream=io.StringIO(), **options,
    )  # fmt: skip


def test_tuned_yaml_trains_with_the_same_effective_batch_and_evidence_lies_beside(tmp_path):
    result = tuned(tmp_path, smaller_is_faster)
    assert result.chosen["batch_size"] == 8
    config = load_config(tmp_path / "tuned.yaml")
    assert config.batch_size * config.accumulate_grad_batches == 32
    evidence = json.loads((tmp_path / "tuned.json").read_text())
    assert evidence["complete"] and evidence["trials"][0]["name"] == "as planned"
    ratio = next(r for r in evidence["confirmation"]["ratios"] if r["variant"] == "tuned")
    assert Ratio(**ratio).median == pytest.approx(1.5)
    assert main(["report", str(tmp_path / "tuned.json"), "--output", str(tmp_path / "r.html")]) == 0


def test_memory_limit_rejects_the_faster_settings_that_break_it(tmp_path):
    result = tuned(
        tmp_path, smaller_is_faster, memory_limit_bytes=2**30,
        peak_bytes=lambda config: 2**31 if config.batch_size == 8 else 2**20,
    )  # fmt: skip
    assert result.chosen["batch_size"] == 16
    rejected = [trial for trial in result.trials if trial.outcome == "rejected"]
    assert rejected and all("2 GiB" in trial.reason for trial in rejected)


def test_gain_that_does_not_repeat_in_paired_turns_falls_back_to_the_default(tmp_path):
    calls = itertools.count()

    def lucky(config):  # fast in the search, equal in the three workers of the confirmation
        changed = config.batch_size != 32 and next(calls) < 4
        return 130.0 if changed else 100.0

    others = [switch.key for switch in SWITCHES if switch.key not in BATCH]
    result = tuned(tmp_path, lucky, max_trials=5, keep=others)
    assert result.winner and not result.chosen
    assert load_config(tmp_path / "tuned.yaml").batch_size == 32


def test_hopeless_and_kept_settings_take_no_sample(tmp_path):
    result = tuned(tmp_path, lambda c: 10.0 if c.batch_size == 16 else 100.0, keep=["compile"])
    slow = [trial for trial in result.trials if trial.overrides.get("batch_size") == 16]
    assert [trial.outcome for trial in slow] == ["hopeless"]
    assert not any("compile" in trial.overrides for trial in result.trials)


def test_search_without_time_for_a_second_trial_says_so(tmp_path):
    result = tuned(tmp_path, smaller_is_faster, max_trials=1)
    assert not result.winner
    assert result.verdict.startswith("Nothing but the plan's own choices was tried")


def test_files_in_the_way_are_never_overwritten(tmp_path):
    (tmp_path / "tuned.json").write_text("mine")
    with pytest.raises(UserError, match=r"tuned\.json exists already"):
        tuned(tmp_path, smaller_is_faster)
    assert (tmp_path / "tuned.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("limits", "reason"), [((0.3, 0), r"more than 0\.3 s"), ((60, 2**20), "GiB of memory")]
)
def test_trial_over_its_limits_is_ended_with_the_reason(limits, reason, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    order = {"measure": "steps", "steps": 3, "seconds": 1, "warmup_steps": 1, "seeds": ()}
    with pytest.raises(VariantFailure, match=reason):
        limited_worker(*limits)(Variant(name="x"), load_config(overrides=SETTINGS), order)


def test_trials_leave_this_process_alone(tmp_path):
    threads = torch.get_num_threads()
    tuned(tmp_path, smaller_is_faster, max_trials=3)
    assert torch.get_num_threads() == threads
