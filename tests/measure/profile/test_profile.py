import dataclasses
import gzip
import json
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from training_framework.cli.main import main as cli
from training_framework.config import load_config
from training_framework.errors import UserError
from training_framework.measure.profile.phases import measure_steps
from training_framework.measure.profile.profile import create_profile_directory, profile_run
from training_framework.measure.profile.run_parts import build_profiled_parts
from training_framework.measure.profile.step_clock import PHASES
from training_framework.train import main as train
from training_framework.training.metrics import ClassificationSums
from training_framework.training.step import TrainStep

pytestmark = pytest.mark.usefixtures("narrow_networks")

TINY = {
    "data": "synthetic",
    "model": "resnet10",
    "img_size": 8,
    "num_classes": 4,
    "synthetic_train_images": 36,
    "synthetic_val_images": 12,
    "batch_size": 8,
    "epochs": 2,
    "lr": 0.01,
    "log_every_n_steps": 2,
    "tensorboard": False,
    "threads": 1,
    "accelerator": "cpu",
    "precision": "32",
}


class DelayedLoader:
    def __init__(self, loader, seconds):
        self.loader = loader
        self.seconds = seconds

    @property
    def batch_count(self):
        return self.loader.batch_count

    def epoch(self, epoch, start_batch=0):
        for batch in self.loader.epoch(epoch, start_batch):
            time.sleep(self.seconds)
            yield batch

    def close(self):
        self.loader.close()


def parts_of(**settings):
    return build_profiled_parts(load_config(overrides={**TINY, **settings}))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_phases_add_up_to_the_wall_clock_also_beyond_the_planned_steps(accumulate):
    parts = parts_of(accumulate_grad_batches=accumulate)
    assert parts.plan.total_steps < 13
    phases = measure_steps(parts, steps=6, warmup=1)
    assert phases.adds_up
    assert abs(sum(phases.seconds.values()) / phases.wall_seconds - 1) <= 0.03
    assert sum(phases.shares.values()) == pytest.approx(1)
    assert all(phases.seconds[phase] > 0 for phase in PHASES)
    # On a device of this size and with nothing planted, the passes are most of a step.
    assert phases.shares["forward"] + phases.shares["backward"] > 0.3


def test_the_measured_steps_are_those_of_a_training_run(in_tmp_path):
    parts = parts_of(ema_decay=0.5)
    measure_steps(parts, steps=2, warmup=1)
    run = train(**TINY, ema_decay=0.5, stop_after_steps=5)
    assert parts.step.average is not None
    ours = parts.step.average.model.state_dict()
    for name, tensor in load_file(run.run_directory / "weights.safetensors").items():
        assert torch.equal(ours[name], tensor), name


def small_step(num_classes):
    """A network whose steps take far less than 5 ms, also on a busy machine."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, num_classes),
    )  # fmt: skip
    return TrainStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        device_type="cpu",
        sums=ClassificationSums("cpu", num_classes=num_classes),
    )


@pytest.mark.parametrize("delay_seconds", [0.0, 0.005])
def test_a_planted_delay_turns_the_verdict_to_loader_bound_with_its_ceiling(
    tmp_path, delay_seconds
):
    config = load_config(overrides=TINY)
    parts = build_profiled_parts(config)
    parts = dataclasses.replace(parts, step=small_step(parts.plan.num_classes))
    if delay_seconds:
        parts.loaders.train = DelayedLoader(parts.loaders.train, delay_seconds)
    profile = profile_run(config, steps=20, warmup=2, output_dir=tmp_path, parts=parts)
    ceilings = profile.ceilings
    assert profile.phases.adds_up
    if not delay_seconds:
        assert ceilings.loader > 3 * 8 / 0.005
        return
    assert profile.verdict.limit == "loader-bound", profile.verdict
    # 8 images in 5 ms, and what the machine adds to a sleep.
    assert 0.6 * 8 / 0.005 < ceilings.loader <= 8 / 0.005
    assert profile.phases.seconds["data"] >= 0.005
    possible = f"{ceilings.both:,.0f} of a possible {ceilings.model:,.0f} images/s"
    assert possible in str(profile.verdict)
    # Nothing is loaded beside the training: the run is slower than its loader, which is slower
    # than its model.
    assert ceilings.both < ceilings.loader < ceilings.model


def test_a_run_that_cannot_be_read_leaves_no_folder(tmp_path):
    class Broken(DelayedLoader):
        def epoch(self, epoch, start_batch=0):
            raise UserError("0001.jpg: cannot be decoded", "restore it")

    config = load_config(overrides=TINY)
    parts = build_profiled_parts(config)
    parts.loaders.train = Broken(parts.loaders.train, 0)
    with pytest.raises(UserError, match="decoded"):
        profile_run(config, steps=2, warmup=1, output_dir=tmp_path, parts=parts)
    assert list((tmp_path / "resnet10-synthetic").iterdir()) == []


def test_one_device_is_profiled_at_a_time(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="without torchrun"):
        parts_of()


def test_the_command_prints_80_columns_and_writes_what_it_says(in_tmp_path, capsys):
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    assert cli(["profile", "--steps", "3", "--warmup", "1", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for piece in ("backward", "loader alone", "compute-bound", "matrix product", "GFLOP/s"):
        assert piece in text
    folder = in_tmp_path / "profiles" / "resnet10-synthetic" / "0"
    record = json.loads((folder / "profile.json").read_text())
    assert record["schema_version"] == 1
    assert set(record["files"]) == {path.name for path in folder.iterdir()}
    assert record["phases"]["seconds"].keys() == PHASES.keys()
    assert record["verdict"]["limit"] == "compute-bound"
    assert any("convolution_backward" in row["name"] for row in record["operators"])
    assert record["roofline"][0]["flops_per_second"] > 0
    assert any("conv1" in name for point in record["roofline"] for name in point["layers"])
    with gzip.open(folder / "trace.json.gz") as file:
        assert json.load(file)["traceEvents"]
    # Neither a run nor anything else is left elsewhere.
    assert [path.name for path in in_tmp_path.iterdir()] == ["profiles"]


def test_no_profile_is_overwritten(tmp_path):
    first = create_profile_directory(tmp_path, "a")
    (tmp_path / "a" / "9").mkdir()
    second = create_profile_directory(tmp_path, "a")
    assert (first.name, second.name) == ("0", "10")


def test_bad_requests_are_refused_in_one_line(in_tmp_path, capsys):
    assert cli(["profile", "--steps", "0"]) == 2
    assert "error: profile: steps is 0; give 1 or more" in capsys.readouterr().err
    (in_tmp_path / "file").touch()
    with pytest.raises(UserError, match="another --output-dir"):
        create_profile_directory(in_tmp_path / "file", "a")
