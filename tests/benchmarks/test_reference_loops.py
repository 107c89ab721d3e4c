"""The loops that the framework is measured against: their settings on a GPU, and their clock."""

import importlib

import pytest
import torch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
IMAGES, LABELS = torch.zeros(16, 3, 8, 8, dtype=torch.uint8), torch.zeros(16, dtype=torch.int64)


@pytest.fixture(autouse=True)
def _cudnn_as_it_was():
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    yield
    torch.backends.cudnn.benchmark = before


def loop(kind, device, **options):
    return getattr(importlib.import_module("reference_loops"), kind)(
        "resnet10", "cifar", 4, IMAGES, LABELS, batch_size=8, device=device, **options
    )


def test_a_gpu_gets_the_fused_optimizer_and_kernels_chosen_by_speed():
    loops = importlib.import_module("reference_loops")
    optimizer = loops.fast_sgd([torch.nn.Parameter(torch.ones(2))], CUDA)
    assert optimizer.defaults["fused"] is True and optimizer.defaults["nesterov"] is True
    loops.choose_kernels_by_speed(CUDA)
    assert torch.backends.cudnn.benchmark


def test_both_loops_ask_for_the_settings_of_their_device(monkeypatch):
    loops = importlib.import_module("reference_loops")
    asked = []
    make = loops.fast_sgd
    monkeypatch.setattr(loops, "choose_kernels_by_speed", asked.append)
    monkeypatch.setattr(
        loops, "fast_sgd", lambda p, device: asked.append(device) or make(p, device)
    )
    for kind in ("B0", "B1"):
        loop(kind, CPU)
    assert asked == [CPU] * 3


def test_b1_on_a_cpu_stays_as_it_was_measured():
    b1 = loop("B1", CPU, bf16=False)
    assert b1.optimizer.defaults["fused"] is False
    assert not torch.backends.cudnn.benchmark
    assert b1.step() == 8


def test_all_loops_are_timed_by_the_clock_of_the_framework(monkeypatch):
    step_speed = importlib.import_module("step_speed")
    timing = importlib.import_module("training_framework.measure.compare.timing")
    assert step_speed.time_steps is timing.time_steps
    monkeypatch.setattr(step_speed, "measure_peak_flops", lambda *_: (1e11, "measured"))
    seen = []

    def watched(make_step, count, device):
        seen.append(count)
        return timing.time_steps(make_step, count, device)

    monkeypatch.setattr(step_speed, "time_steps", watched)
    base = {
        "img_size": 8,
        "batch_size": 4,
        "synthetic_train_images": 8,
        "accelerator": "cpu",
        "threads": 1,
    }
    experiment = step_speed.experiment(
        "lightning-tiny", base, rounds=1, seconds=0.01, steps=2, warmup_steps=1
    )
    order = {"warmup_steps": 1, "steps": 2, "seconds": 0.01, "peak": (1e11, "measured")}
    config = experiment.config_of(experiment.variants[0])
    sample = step_speed.LoopSampler("B1 in fp32", config, order).sample(0)
    assert (len(sample.step_seconds), sample.images) == (2, 8)
    assert seen == [1, 2, 2]


def test_a_peer_makes_its_clock_of_the_same_class():
    peers = importlib.import_module("peer_loops")
    clock = importlib.import_module("training_framework.measure.compare.step_times")
    assert peers.StepTimes is clock.StepTimes
