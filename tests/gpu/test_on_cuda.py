"""What only a real GPU can show: `python -m pytest -m cuda` on a machine with one.

CUDA_TESTS_ON=cpu runs what a CPU can run of them, to try the tests themselves.
"""

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from training_framework.config import load_config
from training_framework.errors import UserError
from training_framework.inference import evaluate_file
from training_framework.measure.compare.timing import StepSampler
from training_framework.runs.progress import TrainResult
from training_framework.train import main as train

DEVICE = "cuda" if torch.cuda.is_available() else os.environ.get("CUDA_TESTS_ON", "")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not DEVICE, reason="needs a CUDA device"),
    pytest.mark.usefixtures("in_tmp_path", "algorithms_as_they_were"),
]
only_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="a CPU has nothing of it")
TINY: dict[str, Any] = {
    "data": "synthetic", "model": "resnet10", "img_size": 8, "num_classes": 4,
    "synthetic_train_images": 32, "synthetic_val_images": 16, "batch_size": 8, "epochs": 2,
    "lr": 0.02, "tensorboard": False, "resume": "never", "compile": False,
    **({"accelerator": "gpu"} if DEVICE == "cuda" else {"accelerator": "cpu", "threads": 1}),
}  # fmt: skip
RECORDED = {"cuda_graph": True, "precision": "bf16-mixed" if DEVICE == "cuda" else "32"}
EAGER = {**RECORDED, "cuda_graph": False}


@pytest.fixture
def algorithms_as_they_were() -> Iterator[None]:
    """A deterministic run changes settings of the whole process."""
    cudnn = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark)
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.deterministic, cudnn.benchmark = before


def weights_of(result: TrainResult) -> dict[str, torch.Tensor]:
    assert result.run_directory is not None
    return load_file(result.run_directory / "weights.safetensors")


def record_of(result: TrainResult) -> dict[str, Any]:
    assert result.run_directory is not None
    record: dict[str, Any] = json.loads((result.run_directory / "run.json").read_text())
    return record


@pytest.mark.parametrize(
    "settings",
    [
        {"compile": "auto"},
        {"precision": "32"},
        pytest.param({"precision": "bf16-mixed"}, marks=only_cuda),
        pytest.param({"precision": "16-mixed"}, marks=only_cuda),
        RECORDED,
        {"ema_decay": 0.9, "mixup": 0.2, "cutmix": 1.0, "cutout": 4, "grad_clip_val": 1.0},
        {"accumulate_grad_batches": 2, "activation_checkpointing": True},
        {"resident_data": False},
        {"optimizer": "adamw", "lr": 0.001},
    ],
    ids=str,
)
def test_a_run_goes_to_its_end_on_the_device_that_was_asked_for(settings):
    result = train(**{**TINY, **settings})
    assert result.steps > 0 and result.train_loss is not None and result.val_loss is not None
    assert np.isfinite([result.train_loss, result.val_loss]).all()
    assert record_of(result)["plan"]["device"] == DEVICE
    assert all(tensor.isfinite().all() for tensor in weights_of(result).values())


@only_cuda
@pytest.mark.parametrize("settings", [{}, RECORDED], ids=["compiled", "compiled and recorded"])
def test_a_compiled_run_learns_as_the_eager_one(settings):
    eager = train(**{**TINY, **EAGER})
    compiled = train(**{**TINY, **EAGER, **settings, "compile": True, "compile_mode": "default"})
    assert record_of(compiled)["plan"]["compile"]
    assert compiled.train_loss == pytest.approx(eager.train_loss, rel=0.1)


def test_recorded_steps_train_as_eager_ones():
    eager, recorded = (train(**{**TINY, **kind}) for kind in (EAGER, RECORDED))
    assert record_of(recorded)["plan"]["cuda_graph"] == (DEVICE == "cuda")
    assert recorded.train_loss == pytest.approx(eager.train_loss, rel=0.05)


@pytest.mark.parametrize("kind", [EAGER, RECORDED], ids=["eager", "recorded"])
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(kind):
    settings = {**TINY, **kind, "deterministic": True}
    straight = train(**settings, name="straight")
    stopped = train(**settings, name="stopped", stop_after_steps=5)
    assert stopped.run_directory is not None
    last = stopped.run_directory / "checkpoints" / "last.ckpt"
    resumed = train(resume=last, stop_after_steps=None)
    ours, theirs = weights_of(straight), weights_of(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_device_learns_what_a_cpu_learns():
    settings = {**TINY, "precision": "32", "flip": "none", "crop_padding": 0, "epochs": 1}
    ours = train(**settings, name="device")
    reference = train(**{**settings, "accelerator": "cpu"}, name="cpu")
    assert ours.train_loss == pytest.approx(reference.train_loss, rel=0.05)


def test_an_evaluation_of_the_weights_repeats_the_runs_own():
    result = train(**TINY)
    assert result.run_directory is not None
    data = {key: TINY[key] for key in ("data", "img_size", "num_classes", "accelerator")}
    evaluation, _ = evaluate_file(
        result.run_directory / "weights.safetensors", {**data, "synthetic_val_images": 16}
    )
    assert evaluation.metrics.loss == pytest.approx(result.val_loss, rel=0.02)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "photographs" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return tmp_path / "photographs"


def test_loader_processes_change_no_bit(photographs: Path):
    folder = {
        **TINY, "data": "folder", "data_root": str(photographs), "num_classes": 2,
        "deterministic": True,
    }  # fmt: skip
    alone, helped = (
        weights_of(train(**folder, num_workers=count, name=f"w{count}")) for count in (0, 2)
    )
    assert all(torch.equal(alone[name], helped[name]) for name in alone)


@only_cuda
@pytest.mark.parametrize("kind", [EAGER, RECORDED, {"resident_data": False, **EAGER}], ids=str)
def test_the_host_never_waits_inside_a_step(kind):
    sampler = StepSampler(
        # One epoch: the order of the next one is copied to the device between two steps.
        load_config(overrides={**TINY, **kind, "synthetic_train_images": 512}),
        steps=1, seconds=1.0, warmup_steps=8, peak=(0.0, "n/a"),
    )  # fmt: skip
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            sampler.optimizer_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        sampler.close()


@pytest.fixture
def small_gpu() -> Iterator[None]:
    """A GPU that has 1.5 GiB left."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1.5 * 2**30) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


# The first stage alone keeps about 4 GiB of activations.
LARGE = {
    **TINY, **EAGER, "precision": "32", "img_size": 64, "stem": "cifar", "batch_size": 512,
    "synthetic_train_images": 1024, "epochs": 1,
}  # fmt: skip


@only_cuda
@pytest.mark.usefixtures("small_gpu")
def test_full_memory_divides_the_batch_or_ends_with_one_line():
    with pytest.raises(UserError, match="memory"):
        train(**LARGE, name="whole")
    gc.collect()
    torch.cuda.empty_cache()
    assert train(**LARGE, name="divided", auto_micro_batch=True).steps == 2
