import time

import pytest
import torch

from training_framework.config import TrainConfig
from training_framework.measure.compare import timing
from training_framework.measure.compare.timing import StepSampler
from training_framework.measure.compare.validity import variant_marks

pytestmark = pytest.mark.usefixtures("narrow_networks")

TINY = {
    "data": "synthetic",
    "model": "resnet10",
    "img_size": 8,
    "num_classes": 4,
    "synthetic_train_images": 36,
    "synthetic_val_images": 12,
    "batch_size": 8,
    "lr": 0.01,
    "precision": "32",
    "accelerator": "cpu",
    "threads": 1,
}


@pytest.fixture(autouse=True)
def _peak_without_measuring_it(monkeypatch):
    monkeypatch.setattr(timing, "measure_peak_flops", lambda *_: (1e11, "measured"))


def sampler(*, steps=3, seconds=1.0, warmup_steps=1, **settings) -> StepSampler:
    config = TrainConfig(**{**TINY, **settings})
    return StepSampler(config, steps=steps, seconds=seconds, warmup_steps=warmup_steps)


def test_a_sample_counts_its_steps_images_and_times():
    tiny = sampler(steps=6)
    sample = tiny.sample(2)
    assert (sample.round, sample.steps, sample.images) == (2, 6, 48)
    assert sum(sample.step_seconds) == pytest.approx(sample.seconds, rel=0.05, abs=2e-3)
    assert len(sample.dropped_step_seconds) == 2
    assert len(tiny.facts.warmup_step_seconds) == 1
    assert sample.peak_memory_bytes > 2**20
    assert sample.new_graphs == 0


def test_accumulated_batches_are_one_step_and_the_last_group_is_short():
    tiny = sampler(steps=3, accumulate_grad_batches=3)  # 4 batches an epoch: groups of 3 and 1
    counts = [tiny.optimizer_step() for _ in range(4)]
    assert sorted(counts) == [8, 8, 24, 24]
    assert tiny.facts.images_per_step == 24


def test_a_sample_lasts_as_long_as_asked_where_no_steps_are_given():
    tiny = sampler(steps=None, seconds=0.2, warmup_steps=3)
    fastest = min(tiny.facts.warmup_step_seconds)
    assert tiny.sample(0).steps == max(3, round(0.2 / fastest))


def test_the_sampled_steps_are_those_of_a_training_run(tmp_path):
    from safetensors.torch import load_file

    from training_framework.train import main

    settings = {**TINY, "epochs": 2, "mixup": 0.2, "ema_decay": 0.0}
    result = main(**settings, output_dir=tmp_path, tensorboard=False)
    tiny = StepSampler(TrainConfig(**settings), steps=5, seconds=1, warmup_steps=1)
    tiny.sample(0)
    trained = load_file(result.run_directory / "weights.safetensors")
    for name, tensor in tiny.parts.step.model.state_dict().items():
        assert torch.equal(trained[name], tensor), name


def test_a_recompilation_in_the_timed_window_is_marked():
    tiny = sampler(small_map_convolutions=False)
    tiny.parts.step._forward = torch.compile(tiny.parts.step._forward, backend="eager")
    tiny.optimizer_step()
    clean = tiny.sample(0)
    ordinary_step, calls = tiny.optimizer_step, iter(range(9))

    def step_with_another_shape() -> int:
        if next(calls) == 3:  # after the dropped steps, in the window
            tiny.parts.step.accumulate(torch.randn(5, 3, 8, 8), torch.zeros(5, dtype=torch.int64))
        return ordinary_step()

    tiny.optimizer_step = step_with_another_shape
    recompiled = tiny.sample(1)
    assert (clean.new_graphs, recompiled.new_graphs > 0) == (0, True)
    marks = variant_marks([clean, recompiled], [1.0, 1.0])
    assert ("recompiled", True) in [(m.name, "of round 2" in m.detail) for m in marks]


def test_a_delay_in_the_loader_is_in_the_clock():
    tiny = sampler()
    ordinary = tiny.parts.loaders.train.epoch

    def delayed(epoch: int):
        for batch in ordinary(epoch):
            time.sleep(0.05)
            yield batch

    tiny.parts.loaders.train.epoch = delayed
    tiny.sample(0)  # ends the epoch that began without delay
    assert min(tiny.sample(1).step_seconds) >= 0.05
