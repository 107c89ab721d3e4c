import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from training_framework.machine import hardware
from training_framework.machine.hardware import (
    detect_hardware,
    gpu_support_fault,
    memory_in_use,
)
from training_framework.machine.peak_flops import measure_bf16_speed, measure_peak_flops


@pytest.mark.parametrize(
    ("capability", "built_for", "usable"),
    [
        ((6, 1), ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "compute_90"], False),
        ((7, 0), ["sm_70", "sm_80"], True),
        ((8, 6), ["sm_80", "sm_90"], True),  # machine code runs on later minor versions
        ((8, 0), ["sm_86"], False),  # but not on earlier ones
        ((9, 0), ["sm_70", "sm_80"], False),
        ((9, 0), ["sm_80", "compute_80"], True),  # the driver compiles PTX for what is newer
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["sm_90", "sm_120"], True),
        ((6, 1), ["sm_50", "sm_60", "sm_61"], True),
        ((6, 1), [], True),  # a build that does not say is left to its own check
    ],
)
def test_a_gpu_is_usable_where_the_build_has_kernels_for_it(capability, built_for, usable):
    fault = gpu_support_fault(capability, built_for)
    assert (fault == "") is usable
    if fault:
        assert f"{capability[0]}.{capability[1]}" in fault
        assert "install" in fault
        assert "\n" not in fault


def test_this_machine_is_described():
    found = detect_hardware()
    assert found.cpu_name
    assert found.cores >= 1
    assert found.memory_bytes > 2**28
    assert len(found.usable) <= len(found.accelerators)


@pytest.mark.parametrize(
    ("text", "cores"),
    [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None), ("nonsense", None)],
)
def test_a_container_quota_limits_the_cores(tmp_path, monkeypatch, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(hardware, "CPU_QUOTA_FILE", tmp_path / "cpu.max")
    assert detect_hardware().cores == (cores or len(os.sched_getaffinity(0)))


def test_a_container_limit_limits_the_memory(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("123456789\n")
    monkeypatch.setattr(hardware, "MEMORY_LIMIT_FILE", tmp_path / "memory.max")
    assert detect_hardware().memory_bytes == 123456789


def test_cores_that_slurm_binds_to_a_process_are_its_own(monkeypatch):
    """Not those of a SLURM task in which torchrun starts several processes."""
    monkeypatch.setattr(hardware, "usable_cores", lambda: 24)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for bound, own in (("24", True), ("", False), ("192", False)):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", bound)
        assert detect_hardware().own_cores is own
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "24")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    shared = detect_hardware()
    assert not shared.own_cores
    assert shared.cores_each(8) == 3
    assert dataclasses.replace(shared, own_cores=True).cores_each(8) == 24


def test_bf16_is_known_from_the_instruction_sets():
    plain = hardware.Hardware(
        cpu_name="x", cores=1, instruction_sets=("avx512",), memory_bytes=1, accelerators=()
    )
    assert not plain.cpu_bf16
    for name in ("avx512_bf16", "amx", "arm_bf16"):
        fields = {**vars(plain), "instruction_sets": (name,)}
        assert hardware.Hardware(**fields).cpu_bf16


def test_the_worth_of_bf16_is_measured_where_the_cpu_has_instructions_for_it():
    found = detect_hardware()
    assert (found.bf16_speed is not None) == found.cpu_bf16
    assert 1e-3 < measure_bf16_speed() < 1e2
    with_instructions = dataclasses.replace(found, instruction_sets=("avx512_bf16",))
    for speed, pays in ((0.5, False), (1.0, False), (1.9, True), (None, True)):
        assert dataclasses.replace(with_instructions, bf16_speed=speed).cpu_bf16_pays is pays
    assert not dataclasses.replace(found, instruction_sets=(), bf16_speed=None).cpu_bf16_pays


def test_measuring_the_peak_leaves_the_runs_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    measure_peak_flops("cpu", "any", "fp32")
    assert torch.equal(torch.rand(1), expected)


def test_memory_in_use_is_that_of_this_process():
    assert 2**24 < memory_in_use(torch.device("cpu")) < detect_hardware().memory_bytes


def test_openmps_limit_of_threads_is_heeded():
    """In a process of its own: OpenMP reads the limit at its start, and PyTorch would hang."""
    program = (
        "import torch\n"
        "from training_framework.config import TrainConfig\n"
        "from training_framework.train import plan_for\n"
        "plan, _, _ = plan_for(TrainConfig(threads=2))\n"
        "print(plan.threads, torch.get_num_threads())\n"
        "torch.set_num_threads(plan.threads)\n"
        "images = torch.randn(8, 64, 28, 28, requires_grad=True)\n"
        "torch.nn.functional.conv2d(images, torch.randn(64, 64, 3, 3)).sum().backward()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"OMP_THREAD_LIMIT": "1", "OMP_NUM_THREADS": "2"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "1 1\n"), done.stderr
