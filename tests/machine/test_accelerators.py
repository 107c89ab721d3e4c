"""What is asked of a GPU, from what its driver and this PyTorch say of it."""

import types

import pytest
import torch

from training_framework.machine import accelerators
from training_framework.machine.accelerators import (
    Accelerator,
    find_accelerators,
    find_triton_fault,
    one_device_is_visible,
)


@pytest.mark.parametrize(
    ("name", "capability", "has"),
    [
        ("NVIDIA GeForce GTX 1080", (6, 1), False),
        ("NVIDIA GeForce GTX 1650", (7, 5), False),
        ("NVIDIA GeForce GTX 1660 Ti", (7, 5), False),
        ("NVIDIA T400 4GB", (7, 5), False),
        ("NVIDIA T1000 8GB", (7, 5), False),
        ("Tesla T4", (7, 5), True),
        ("NVIDIA GeForce RTX 2060", (7, 5), True),
        ("Tesla V100-SXM2-16GB", (7, 0), True),
        ("NVIDIA H200", (9, 0), True),
        ("AMD Instinct MI300X", None, True),
    ],
)
def test_tensor_cores_are_known_from_capability_and_model(name, capability, has):
    gpu = Accelerator(kind="cuda", name=name, capability=capability)
    assert gpu.tensor_cores is has


def test_bf16_is_that_of_each_device_and_not_of_the_current_one(monkeypatch):
    found = [
        types.SimpleNamespace(name=name, major=major, minor=0, total_memory=2**34)
        for name, major in (("Tesla V100-SXM2-16GB", 7), ("NVIDIA H200", 9))
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_90"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert [gpu.bf16 for gpu in find_accelerators()] == [False, True]
    assert [gpu.capability for gpu in find_accelerators()] == [(7, 0), (9, 0)]


@pytest.mark.parametrize(
    ("architecture", "has"),
    [("gfx942:sramecc+:xnack-", True), ("gfx90a", True), ("gfx1100", True), ("gfx906", False)],
)
def test_an_amd_gpu_is_known_by_its_architecture(monkeypatch, architecture, has):
    properties = types.SimpleNamespace(
        name="AMD GPU", major=9, minor=4, total_memory=2**37, gcnArchName=architecture, uuid="x"
    )
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    (gpu,) = find_accelerators()
    assert (gpu.bf16, gpu.tensor_cores, gpu.tf32, gpu.capability) == (has, has, False, None)
    assert "ROCm" in gpu.channels_last_fault
    monkeypatch.setenv("PYTORCH_MIOPEN_SUGGEST_NHWC", "1")
    assert bool(gpu.channels_last_fault) is not has


def test_an_intel_gpu_has_its_own_name_memory_and_units(monkeypatch):
    """Of two integrated ones, the newer has units for matrices."""
    found = [
        types.SimpleNamespace(
            name=name,
            total_memory=2**35,
            has_subgroup_matrix_multiply_accumulate=units,
        )
        for name, units in (("Arc 140V", True), ("Iris Xe", False))
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda: types.SimpleNamespace(type="xpu")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: found[index])
    gpus = find_accelerators()
    assert [(gpu.name, gpu.index, gpu.memory_bytes) for gpu in gpus] == [
        ("Arc 140V", 0, 2**35), ("Iris Xe", 1, 2**35),
    ]  # fmt: skip
    assert [(gpu.bf16, gpu.tensor_cores) for gpu in gpus] == [(True, True), (False, False)]


@pytest.mark.parametrize(
    ("variable", "text", "one"),
    [
        ("CUDA_VISIBLE_DEVICES", "3", True),
        ("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106", True),
        ("CUDA_VISIBLE_DEVICES", "0,1", False),
        ("CUDA_VISIBLE_DEVICES", "", False),
        ("ROCR_VISIBLE_DEVICES", "5", True),
        ("ZE_AFFINITY_MASK", "1", True),
    ],
)
def test_one_visible_device_is_known_from_the_environment(monkeypatch, variable, text, one):
    for name in accelerators.VISIBILITY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not one_device_is_visible()
    monkeypatch.setenv(variable, text)
    assert one_device_is_visible() is one


def test_what_triton_lacks_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(accelerators.importlib.util, "find_spec", lambda name: None)
    assert find_triton_fault() == "Triton is not installed"
    monkeypatch.setattr(accelerators.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(accelerators.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert find_triton_fault() == "Triton finds no C compiler (CC is 'no-such-compiler')"
    monkeypatch.setenv("CC", "sh")  # some program
    assert str(tmp_path / "Python.h") in find_triton_fault()
    (tmp_path / "Python.h").write_text("")
    assert find_triton_fault() == ""
