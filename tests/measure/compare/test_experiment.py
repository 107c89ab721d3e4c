from pathlib import Path

import pytest

from training_framework.errors import UserError
from training_framework.measure.compare.experiment import (
    CONTROL,
    Experiment,
    load_experiment,
    shipped_experiments,
)

GOOD = """
name: mine
base: {data: synthetic, model: resnet10}
variants:
  - {name: small, overrides: {batch_size: 8}}
  - {name: large, overrides: {batch_size: 16}}
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("name", shipped_experiments())
def test_shipped_experiments_are_valid_and_bear_their_files_names(name):
    experiment = load_experiment(name)
    assert experiment.name == name
    assert experiment.description


def test_all_promised_experiments_are_shipped():
    promised = {
        "hardware-ladder", "batch-sweep", "baseline-vs-optimized", "ablation", "framework-check",
    }  # fmt: skip
    assert promised <= shipped_experiments().keys()


def test_settings_come_from_base_then_flags_then_the_variant(tmp_path):
    (tmp_path / "common.yaml").write_text("lr: 0.5\nmomentum: 0.1\nmodel: resnet34\n")
    file = write(tmp_path, GOOD.replace("base: {", "base: {extends: common.yaml, "))
    experiment = load_experiment(file, {"lr": 0.25, "batch_size": 4})
    config = experiment.config_of(experiment.variants[1])
    assert (config.momentum, config.model) == (0.1, "resnet10")
    assert (config.lr, config.batch_size) == (0.25, 16)


def test_the_baseline_runs_twice_and_the_copy_is_last(tmp_path):
    experiment = load_experiment(write(tmp_path, GOOD + "baseline: large\n"), rounds=3)
    assert experiment.rounds == 3
    names = [variant.name for variant in experiment.all_variants()]
    assert names == ["small", "large", CONTROL]
    control = experiment.all_variants()[-1]
    assert experiment.config_of(control).batch_size == 16
    assert experiment.reference_of(experiment.variants[0]) == "large"
    assert experiment.reference_of(experiment.variants[1]) == ""


def test_an_experiment_survives_the_way_through_its_result_file(tmp_path):
    experiment = load_experiment(write(tmp_path, GOOD))
    assert Experiment(**experiment.model_dump(mode="json")) == experiment


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rounds", "round"), r"mine.yaml: unknown key 'roundz'.*did you mean 'rounds'"),
        (("overrides: {batch_size: 16}", "overides: {}"), r"overides.*did you mean 'overrides'"),
        (("batch_size: 16", "batch_sise: 16"), r"large: overrides: unknown key 'batch_sise'"),
        (("batch_size: 16", "batch_size: none"), r"large: overrides: batch_size: 'none'"),
        (("model: resnet10", "model: resnet11"), r"mine.yaml: base: model: 'resnet11'"),
        (("name: large", "name: small"), r"the name 'small' is taken"),
        (("name: large", "name: A/A control"), r"the name 'A/A control' is taken"),
        (("name: large", "name: large, against: smal"), r"no variant is called 'smal'.*'small'"),
        (("name: large", "name: large, needs: [tpu]"), r"needs.*'tpu' should be 'gpu' or 'bf16'"),
        (("name: mine", "name: mine\nbaseline: larg"), r"baseline.*'larg'.*did you mean 'large'"),
        (("name: mine", "name: mine\nrounds: 0"), r"mine.yaml: rounds: 0 should be"),
        (("name: mine", "name: mine\ntarget_accuracy: 90"), r"target_accuracy.*set measure to"),
        (("name: mine", "name: mine\nmeasure: speed"), r"measure: 'speed' should be"),
        (
            ("name: large", "name: large, environment: {A: b}}\nisolation: shared\nignored: {a: b"),
            r"unknown key 'ignored'",
        ),
        (("batch_size: 16", "resume: last.ckpt"), r"an experiment cannot use resume"),
        (("variants:", "variants: []\nothers:"), r"mine.yaml: "),
        (("base: {", "base: [{"), r"mine.yaml: not valid YAML"),
        (
            ("base: {data: synthetic, model: resnet10}", "base: 3"),
            r"base: 3 is not a set of settings",
        ),
    ],
)
def test_a_wrong_experiment_is_refused_by_file_and_key(tmp_path, change, message):
    old, new = change
    text = GOOD + "roundz: 3\n" if old == "rounds" else GOOD.replace(old, new)
    with pytest.raises(UserError, match=message):
        load_experiment(write(tmp_path, text))


def test_environment_needs_a_process_of_its_own(tmp_path):
    text = GOOD.replace("name: large", "name: large, environment: {OMP_NUM_THREADS: '1'}")
    assert load_experiment(write(tmp_path, text)).variants[1].environment == {
        "OMP_NUM_THREADS": "1"
    }
    with pytest.raises(UserError, match=r"large: environment needs a process of its own"):
        load_experiment(write(tmp_path, text + "isolation: shared\n"))


def test_an_unknown_experiment_lists_those_shipped():
    with pytest.raises(UserError, match=r"no such experiment.*hardware-ladder"):
        load_experiment("hardware-lader")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 2),  # 12 rounds in 6 processes
        ({"rounds": 3}, 1),
        ({"rounds": 3, "isolation": "shared"}, 3),
        ({"rounds_per_process": 5}, 5),
        ({"measure": "epoch"}, 1),
    ],
)
def test_variants_start_anew_often_enough_for_an_interval(changes, expected):
    exp = Experiment(name="x", variants=[{"name": "a"}], **changes)
    assert exp.rounds_until_restart == expected
