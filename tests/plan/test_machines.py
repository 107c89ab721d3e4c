"""What is planned on machines that are not at hand: docs/machines.md shows the same plans."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from training_framework.config import TrainConfig
from training_framework.errors import UserError
from training_framework.machine import distributed
from training_framework.machine.distributed import BACKENDS, Processes, process_group
from training_framework.plan import resumed_plan
from training_framework.plan.machine import check_own_device

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
machines = importlib.import_module("machines")
sys.path.pop(0)

BY_NAME = {machine.name: machine for machine in machines.MACHINES}
CIFAR, IMAGENET = machines.JOBS
SLURM = BY_NAME["8 H200 (SLURM, each process sees one)"]
TORCHRUN = BY_NAME["8 H200 (torchrun)"]

OLD = ("cuda", "32", "fp32", "contiguous", "fused", "8 loaders")
AMPERE = ("cuda", "bf16-mixed", "tf32", "channels_last", "fused")
# Device, precision, what precision 32 multiplies, layout, optimizer, loaders of image files.
BEST = {
    "GTX 1080": OLD,
    "GTX 1650": OLD,
    "T4": ("cuda", "16-mixed", "fp32", "channels_last", "plain", "4 loaders"),
    "V100": ("cuda", "16-mixed", "fp32", "channels_last", "plain", "8 loaders"),
    "A10": (*AMPERE, "16 loaders"),
    "A100": (*AMPERE, "12 loaders"),
    "RTX 4090": (*AMPERE, "16 loaders"),
    "RTX 5090": (*AMPERE, "16 loaders"),
    "H100 NVL": (*AMPERE, "16 loaders"),
    "H200": (*AMPERE, "16 loaders"),
    "B200": (*AMPERE, "16 loaders"),
    TORCHRUN.name: (*AMPERE, "16 loaders"),
    SLURM.name: (*AMPERE, "16 loaders"),
    "Apple M3 Max": ("mps", "32", "fp32", "contiguous", "fused", "16 loaders"),
    "MI300X (ROCm)": ("cuda", "bf16-mixed", "fp32", "contiguous", "fused", "16 loaders"),
    "Max 1550 (XPU)": ("xpu", "bf16-mixed", "fp32", "channels_last", "fused", "16 loaders"),
    "GTX 1080 (too old for this PyTorch)": (
        "cpu", "32", "fp32", "channels_last", "fused", "1 loaders",
    ),
}  # fmt: skip


def reason(plan, name):
    return next(choice.reason for choice in plan.choices if choice.name == name)


@pytest.mark.parametrize("machine", machines.MACHINES, ids=lambda machine: machine.name)
def test_a_plan_is_what_an_expert_would_choose_there(machine):
    plan = machines.plan_of(machine, IMAGENET)
    in_fp32 = machines.plan_of(machine, IMAGENET, precision="32")
    assert BEST[machine.name] == (
        plan.device,
        plan.precision,
        in_fp32.product_format,
        "channels_last" if plan.channels_last else "contiguous",
        "fused" if plan.fused_optimizer else "plain",
        f"{plan.num_workers} loaders",
    )
    assert plan.pin_memory is (plan.device == "cuda")
    small = machines.plan_of(machine, CIFAR)
    assert small.resident_data
    assert small.precision == plan.precision
    for made in (plan, small):
        compiles = made.device == "cuda" and not machine.name.startswith("GTX")
        assert not made.compile or compiles
        assert not made.cuda_graph or made.device == "cuda"
        assert made.auto_micro_batch is (made is plan and machine.name in ("GTX 1080", "GTX 1650"))


def test_each_process_takes_the_device_of_its_rank_or_the_only_one_that_it_sees():
    plan = machines.plan_of(TORCHRUN, CIFAR)
    assert str(plan.torch_device(3)) == "cuda:3"
    alone = machines.plan_of(SLURM, CIFAR)
    assert [str(alone.torch_device(rank)) for rank in range(8)] == ["cuda:0"] * 8
    assert "each process sees its own" in reason(alone, "device")
    assert alone.threads == plan.threads == 24


def test_one_gpu_for_several_processes_is_refused_with_both_cures():
    lonely = dataclasses.replace(
        SLURM, hardware=dataclasses.replace(SLURM.hardware, one_device_each=False)
    )
    with pytest.raises(UserError, match=r"1 usable GPU.*nproc-per-node=1.*CUDA_VISIBLE_DEVICES"):
        machines.plan_of(lonely, CIFAR)


def test_processes_that_see_the_same_single_gpu_are_refused(monkeypatch):
    board = dist.HashStore()
    monkeypatch.setattr(distributed, "_board", lambda: board)
    seen = dataclasses.replace(BY_NAME["H200"].hardware.accelerators[0], uuid="GPU-1")
    two = Processes(world_size=2, local_world_size=2)

    def check(gpu, key="plan/0", **settings):
        facts = dataclasses.replace(SLURM.hardware, accelerators=(gpu,))
        check_own_device(TrainConfig(**settings), facts, two, key=key)

    check(seen)
    check(dataclasses.replace(seen, uuid="GPU-2"))
    check(seen, key="plan/1")
    check(seen, accelerator="cpu")
    with pytest.raises(UserError, match=r"2 processes on this machine see the same single GPU, NV"):
        check(seen)


def test_processes_are_connected_by_what_carries_their_tensors():
    assert BACKENDS == {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
    xpu = BY_NAME["Max 1550 (XPU)"]
    gpu = xpu.hardware.accelerators[0]
    pair = dataclasses.replace(xpu.hardware, accelerators=(gpu, dataclasses.replace(gpu, index=1)))
    two = dataclasses.replace(xpu, hardware=pair, processes=2)
    assert reason(machines.plan_of(two, CIFAR), "strategy") == "2 processes, connected by xccl"
    mac = dataclasses.replace(BY_NAME["Apple M3 Max"], processes=2)
    with pytest.raises(
        UserError,
        match=r"2 processes were started, but PyTorch cannot connect them on mps; start one "
        "process, without torchrun, or set accelerator to cpu",
    ):
        machines.plan_of(mac, CIFAR)
    assert machines.plan_of(mac, CIFAR, accelerator="cpu").device == "cpu"


def test_a_backend_that_this_pytorch_lacks_is_named():
    entered = process_group(Processes(world_size=2), torch.device("xpu", 0))
    with pytest.raises(UserError, match=r"need xccl, which PyTorch .* lacks; install"), entered:
        pass


def test_memory_is_estimated_for_what_is_asked():
    gtx, v100 = BY_NAME["GTX 1080"], BY_NAME["V100"]
    assert "256 images at once take about 20.8 of 8 GB by estimate" in reason(
        machines.plan_of(gtx, IMAGENET), "auto_micro_batch"
    )
    assert not machines.plan_of(gtx, IMAGENET, auto_micro_batch=False).auto_micro_batch
    assert not machines.plan_of(gtx, IMAGENET, activation_checkpointing=True).auto_micro_batch
    assert not machines.plan_of(gtx, IMAGENET, batch_size=64).auto_micro_batch
    # NVIDIA's ResNet-50 trains on this GPU with 256 images in mixed precision, 128 in fp32.
    assert not machines.plan_of(v100, IMAGENET).auto_micro_batch
    assert machines.plan_of(v100, IMAGENET, precision="32").auto_micro_batch
    assert not machines.plan_of(v100, IMAGENET, precision="32", batch_size=128).auto_micro_batch
    several = machines.plan_of(TORCHRUN, IMAGENET, batch_size=40_000)
    assert not several.auto_micro_batch
    assert "lower batch_size if memory runs out" in reason(several, "auto_micro_batch")


def test_a_resumed_run_multiplies_what_it_multiplied():
    def resumed(then, machine, **settings):
        fresh = machines.plan_of(machine, CIFAR, **settings)
        values = json.loads(json.dumps(then.as_dict()))
        return resumed_plan(fresh, values, machine.hardware, changed=(), where="last.ckpt")

    a100, v100 = BY_NAME["A100"], BY_NAME["V100"]
    # Whether there is a fused optimizer is asked of the device itself, which is not here.
    fp32 = {"precision": "32", "fused_optimizer": False}
    exact = machines.plan_of(a100, CIFAR, fp32_precision="ieee", **fp32)
    plan, lines = resumed(exact, a100, **fp32)
    assert plan.product_format == "fp32"
    assert "fp32_precision ieee (a new run here: tf32)" in lines[0]
    then = machines.plan_of(a100, CIFAR, **fp32)
    with pytest.raises(UserError, match=r"multiplied in TF32, which Tesla V100.* does not have; r"):
        resumed(then, v100, **fp32)
    plan, _ = resumed(then, v100, allow_config_change=True, **fp32)
    assert plan.product_format == "fp32"
    mixed = machines.plan_of(a100, CIFAR, precision="16-mixed")
    assert resumed(mixed, v100, precision="16-mixed")[0].product_format == "fp16"


def test_what_precision_32_multiplies_is_said():
    h200, v100 = BY_NAME["H200"], BY_NAME["V100"]
    plan = machines.plan_of(h200, CIFAR, precision="32")
    assert (plan.fp32_precision, plan.product_format) == ("tf32", "tf32")
    assert "11 bits" in reason(plan, "fp32_precision")
    exact = machines.plan_of(h200, CIFAR, precision="32", fp32_precision="ieee")
    assert (exact.product_format, reason(exact, "fp32_precision")) == ("fp32", "asked for")
    assert machines.plan_of(h200, CIFAR).product_format == "bf16"
    for machine in (v100, BY_NAME["MI300X (ROCm)"], BY_NAME["Apple M3 Max"]):
        plan = machines.plan_of(machine, CIFAR, fp32_precision="tf32")
        assert plan.fp32_precision == "ieee"
        assert "only CUDA GPUs from 8.0 on have TF32" in reason(plan, "fp32_precision")
