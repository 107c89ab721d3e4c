"""The experiments of this repository's own benchmarks: every variant's settings hold together."""

import importlib
import sys
from pathlib import Path

import pytest

from training_framework.measure.compare.experiment import load_experiment

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("*.yaml")), ids=lambda file: file.stem)
def test_an_experiment_file_is_valid(file):
    assert load_experiment(file).variants


def test_every_row_of_the_steps_speed_is_valid(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    step_speed = importlib.import_module("step_speed")
    for row in step_speed.ROWS:
        experiment = step_speed.experiment(row, rounds=1, seconds=1.0)
        configs = [experiment.config_of(variant) for variant in experiment.all_variants()]
        assert len(configs) >= 3
        # All sides make steps of as many images.
        assert len({c.batch_size * c.accumulate_grad_batches for c in configs}) == 1


def test_a_planted_slowdown_is_an_experiment(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    planted = importlib.import_module("planted_slowdown")
    assert len(planted.experiment(6, 0.1).variants) == 2


def test_the_grid_that_tune_is_held_against_is_an_experiment(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    grid = importlib.import_module("tune_against_grid")
    experiment = grid.grid_experiment(grid.plain_settings(tmp_path), 6, 0.1)
    assert len({variant.name for variant in experiment.variants}) == 8
