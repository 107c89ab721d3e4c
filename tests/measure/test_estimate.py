import dataclasses
import re
import shlex

import numpy as np
import pytest

from training_framework.cli.estimate import estimate_lines
from training_framework.cli.main import main
from training_framework.config import TrainConfig
from training_framework.measure.estimate import RunEstimate, estimate_run, step_time
from training_framework.plan import plan_run

TINY = {
    "data": "synthetic", "model": "resnet10", "img_size": 8, "num_classes": 4, "batch_size": 8,
    "synthetic_train_images": 32, "synthetic_val_images": 12, "epochs": 5, "threads": 1,
    "precision": "32", "winograd_convolutions": False, "fused_norms": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def estimate() -> RunEstimate:
    sizes = ((0.0, 8), (0.6, 16))
    return estimate_run(TrainConfig(**TINY, progressive_resolution=sizes), steps=12)


def test_every_size_has_its_share_of_the_steps(estimate):
    assert [(time.image_size, time.steps) for time in estimate.step_times] == [
        (8, pytest.approx(12)),
        (16, pytest.approx(8)),
    ]
    assert estimate.evaluations == 5
    assert min(estimate.evaluation_seconds, estimate.start_seconds, estimate.memory_bytes) > 0


def test_the_whole_is_the_sum_of_its_parts():
    plan = plan_run(TrainConfig(**TINY)).plan
    times = [step_time([2.0, 4.0] * 6, image_size=8, steps=10)]
    times.append(dataclasses.replace(times[0], seconds=1.0, error=0.3, steps=20))
    made = RunEstimate(
        plan=plan, step_times=tuple(times), start_seconds=5, evaluations=3, evaluation_seconds=2,
        memory_bytes=2**30, other_cpu_share=0.5,
    )  # fmt: skip
    assert made.seconds == pytest.approx(5 + 10 * 3 + 20 * 1 + 3 * 2)
    assert made.error_seconds == pytest.approx(20 * 0.3)
    lines = "\n".join(estimate_lines(made, price=36.0, watts=3600.0))
    assert "time    61.0 s (95%: 55.0 s to 67.0 s)" in lines
    assert "price   0.61 (0.55 to 0.67), at 36 an hour" in lines
    assert "energy  0.061 kWh (0.055 to 0.067), assuming 3600 W" in lines
    assert "other programs used 50%" in lines
    plain = "\n".join(estimate_lines(made))
    assert "kWh" not in plain and "price" not in plain, "only with an assumption of the user's"


def test_the_interval_covers_the_mean_of_steps_that_drift():
    draws = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        drift = np.repeat(draws.normal(0, 0.1, 6), 5)
        seconds = 1 + drift + draws.normal(0, 0.05, 30)
        found = step_time(seconds, image_size=8, steps=1)
        covered += abs(found.seconds - 1) < found.error
    assert covered >= 0.9 * 200


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--steps 3", "3 steps are too few"), ("--watts -1", "--watts is -1.0; give a number")],
)
def test_what_makes_no_sense_is_refused(flags, message, capsys):
    assert main(["estimate", *shlex.split(flags), "--data", "synthetic", "--img-size", "8"]) == 2
    assert re.search(message, capsys.readouterr().err)
