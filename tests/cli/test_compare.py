import json

import pytest

from training_framework.cli.main import main
from training_framework.measure.compare import timing
from training_framework.training import parts

pytestmark = pytest.mark.usefixtures("narrow_networks")

EXPERIMENT = """
isolation: shared
rounds: 1
steps: 2
warmup_steps: 1
patience: 0.0
base: {data: synthetic, model: resnet10, img_size: 8, num_classes: 4, synthetic_train_images: 36,
       synthetic_val_images: 12, batch_size: 8, lr: 0.01, precision: "32", accelerator: cpu,
       threads: 1}
variants:
  - {name: plain}
  - {name: half, overrides: {batch_size: 4}}
"""


@pytest.fixture(autouse=True)
def _cheap_costs(monkeypatch):
    monkeypatch.setattr(parts, "training_flops_per_image", lambda *_: 1e6)
    monkeypatch.setattr(timing, "measure_peak_flops", lambda *_: (1e11, "measured"))


@pytest.fixture
def experiment(in_tmp_path):
    path = in_tmp_path / "mine.yaml"
    path.write_text(EXPERIMENT, encoding="utf-8")
    return path


def test_compare_writes_the_documented_file_and_strict_ends_with_1(experiment, capsys):
    output = experiment.parent / "r.json"
    arguments = ["compare", str(experiment), "--lr", "0.02", "--strict", "--output", str(output)]
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert "| plain" in shown.out and "different work" in shown.out
    assert "round 1/1" in shown.err and "round" not in shown.out.split("result file")[1]
    content = json.loads(output.read_text())
    assert {
        "experiment", "environment", "variants", "ratios", "command", "schema_version",
    } <= content.keys()  # fmt: skip
    assert {"name", "overrides", "unit", "samples", "median", "marks"} <= content["variants"][
        0
    ].keys()
    assert {"variant", "against", "median", "low", "high", "pairs"} <= content["ratios"][0].keys()
    assert content["experiment"] == "mine"
    assert {variant["config"]["lr"] for variant in content["variants"]} == {0.02}
    assert main(["compare", "--resume", str(output), "--rounds", "2"]) == 0
    assert json.loads(output.read_text())["rounds"] == 2


def test_without_output_the_file_is_named_for_what_it_holds(experiment, capsys):
    assert main(["compare", str(experiment)]) == 0
    (path,) = (experiment.parent / "benchmarks/results").iterdir()
    assert path.name.startswith("mine_cpu-")
    assert str(path.name) in capsys.readouterr().out


def test_the_shipped_experiments_are_listed(capsys):
    assert main(["compare", "--list"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert main(["compare", "--list"]) == 0
    assert "hardware-ladder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare"),
        (["mine.yaml", "--ablate"], "more than one thing to compare"),
        (["mine.yaml", "--base", "b.yaml"], "--base cannot be used with an experiment"),
        (["--vary", "lr"], "not KEY=A,B"),
        (["--vary", "lr=[1,2"], "a value is not YAML"),
        (["--vary", "lr=0.1,0.2", "--steps", "2", "--seconds", "3"], "remove one of them"),
        (["mine.yaml", "--output", "mine.yaml"], "already exists"),
        (["--resume", "mine.yaml", "--lr", "1"], "--lr cannot be used with --resume"),
        (["--resume", "mine.yaml"], "not a result file"),
        (["mine.yaml", "--rounds", "0"], "rounds: 0 should be"),
    ],
)
def test_contradictory_commands_are_refused_in_one_line(experiment, capsys, arguments, message):
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert experiment.read_text() == EXPERIMENT
