import json
import shlex

import numpy as np
import pytest
from PIL import Image

from training_framework.cli.main import main
from training_framework.config import TrainConfig
from training_framework.errors import UserError
from training_framework.measure.lr_range import LrRange, measure_lr_range

TINY = (
    "--data synthetic --model resnet10 --img-size 8 --num-classes 4 --batch-size 8 --threads 1 "
    "--synthetic-train-images 20 --precision 32 --winograd-convolutions false --fused-norms false"
)


def test_the_suggestion_lies_between_the_steepest_fall_and_the_least_loss():
    rates = np.logspace(-5, 1, 61)
    # Falls around 1e-2, is least at 1, and rises beyond it.
    losses = 2 - np.tanh(2 * (np.log10(rates) + 2)) + np.maximum(0, np.log10(rates)) ** 2 * 9
    losses -= 0.01 * np.minimum(0, np.log10(rates))
    values = tuple(losses.tolist())
    found = LrRange(rates=tuple(rates.tolist()), losses=values, smoothed=values)
    assert found.steepest == pytest.approx(1e-2, rel=0.3)
    assert found.tenth_of_least == pytest.approx(0.1, rel=0.3)
    assert min(found.steepest, found.tenth_of_least) <= found.suggestion
    assert found.suggestion <= max(found.steepest, found.tenth_of_least)


def test_the_command_writes_plot_and_numbers(in_tmp_path, capsys):
    command = f"lr-range {TINY} --steps 20 --to 1 --output plots/lr.png"
    assert main(shlex.split(command)) == 0
    assert "suggested peak rate" in capsys.readouterr().out
    numbers = json.loads((in_tmp_path / "plots/lr.json").read_text())
    ratios = np.diff(np.log(numbers["rates"]))
    assert len(numbers["losses"]) >= 10 and np.allclose(ratios, ratios[0])
    assert numbers["rates"][0] == pytest.approx(1e-5)
    with Image.open(in_tmp_path / "plots/lr.png") as plot:
        assert plot.size == (1200, 750)
    assert not (in_tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lowest": 1.0, "highest": 0.1}, "is no range"), ({"steps": 5}, "5 steps are too few")],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        measure_lr_range(TrainConfig(data="synthetic"), **settings)
