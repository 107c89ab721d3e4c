from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from training_framework.measure.profile.trace import (
    Kernel,
    KernelWindow,
    OperatorCall,
    busy_seconds,
    group_calls,
    layer_type_of,
    read_calls,
    read_kernels,
)


def event(name, *, parent=None, cpu=(0.0, 0.0), device=(0.0, 0.0), annotation=False):
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        device_type=DeviceType.CPU,
        is_user_annotation=annotation,
        input_shapes=[[2, 3], []],
        concrete_inputs=[None, 1],
        cpu_time_total=cpu[0],
        self_cpu_time_total=cpu[1],
        device_time_total=device[0],
        self_device_time_total=device[1],
    )


def kernel(name, start, end, *, annotation=False):
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CUDA,
        is_user_annotation=annotation,
        time_range=SimpleNamespace(start=start, end=end),
    )


def call(name, seconds, shapes=(), values=()):
    return OperatorCall(name=name, shapes=shapes, values=values, seconds=seconds, in_backward=False)


@pytest.mark.parametrize(("on_device", "seconds"), [(False, 50e-6), (True, 900e-6)])
def test_a_convolution_has_the_time_of_all_that_it_calls_and_they_have_none(on_device, seconds):
    node = event("autograd::engine::evaluate_function: ConvolutionBackward0")
    convolution = event(
        "aten::convolution_backward", parent=node, cpu=(50.0, 5.0), device=(900.0, 0.0)
    )
    inner = event("aten::cudnn_backward", parent=convolution, cpu=(45.0, 45.0), device=(900, 900))
    (found,) = read_calls([node, convolution, inner], on_device=on_device)
    assert found.name == "aten::convolution_backward"
    assert found.seconds == pytest.approx(seconds)
    assert found.in_backward
    assert found.shapes == ((2, 3), ())


def test_other_operators_have_their_own_time_alone():
    outer = event("aten::to", cpu=(10.0, 2.0))
    inner = event("aten::copy_", parent=outer, cpu=(8.0, 8.0))
    found = read_calls([outer, inner], on_device=False)
    assert [(one.name, one.seconds) for one in found] == [
        ("aten::to", pytest.approx(2e-6)),
        ("aten::copy_", pytest.approx(8e-6)),
    ]
    assert not any(one.in_backward for one in found)


def test_kernels_are_what_ran_on_the_device_and_no_annotation():
    events = [
        event("aten::add", cpu=(1.0, 1.0)),
        kernel("vectorized_add", 1.0, 3.0),
        kernel("Optimizer.step", 0.0, 9.0, annotation=True),
    ]
    assert read_kernels(events) == [Kernel(name="vectorized_add", start=1e-6, end=3e-6)]


def test_kernels_side_by_side_count_once():
    spans = [(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]
    assert busy_seconds([Kernel(name="k", start=a, end=b) for a, b in spans]) == 4.0
    assert busy_seconds([]) == 0.0


def test_groups_have_means_per_step_and_shares_and_the_rate_while_they_run():
    product = ((100, 10), (10, 100))
    calls = [
        call("aten::mm", 1e-3, product),
        call("aten::mm", 3e-3, product),
        call("aten::relu", 5e-3, ((7,),)),
        call("aten::relu", 7e-3, ((9,),)),
    ]
    relu, mm = group_calls(calls, by="operator", steps=2)
    assert (relu.name, relu.calls, relu.seconds, relu.share) == (
        "aten::relu", 1, pytest.approx(6e-3), pytest.approx(0.75),
    )  # fmt: skip
    assert mm.flops_per_second == pytest.approx(2 * 2 * 100 * 100 * 10 / 4e-3)
    assert relu.flops_per_second is None
    by_shape = group_calls(calls, by="shape", steps=2, limit=2)
    assert [row.shapes for row in by_shape] == ["9", "7"]
    by_layer = group_calls(calls, by="layer_type", steps=2)
    assert [row.name for row in by_layer] == ["activation", "matrix product"]
    assert group_calls([], by="operator", steps=2) == []


@pytest.mark.parametrize(
    ("name", "layer_type"),
    [
        ("aten::convolution_backward", "convolution"),
        ("sm80_xmma_dgrad_implicit_gemm_bf16f32", "convolution"),
        ("aten::native_batch_norm", "batch norm"),
        ("void cudnn::bn_bw_1C11_kernel_new<float>", "batch norm"),
        ("aten::threshold_backward", "activation"),
        ("aten::addmm", "matrix product"),
        ("ampere_sgemm_128x64_nn", "matrix product"),
        ("aten::_fused_sgd_", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies and casts"),
        ("AddmmBackward0", "autograd"),
        ("autograd::engine::evaluate_function: ReluBackward0", "autograd"),
        ("triton_poi_fused_0", "compiled"),
        ("aten::detach", "other"),
    ],
)
def test_names_tell_the_type_of_the_layer(name, layer_type):
    assert layer_type_of(name) == layer_type


def test_the_memory_history_of_a_gpu_has_stacks_of_python_alone(tmp_path, monkeypatch):
    """Those of C++ too would take most of the time of each allocation."""
    asked = {}
    trace = "training_framework.measure.profile.trace"
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **how: asked.update(how)
    )
    monkeypatch.setattr(f"{trace}.synchronize", lambda device: None)
    monkeypatch.setattr(f"{trace}.profile", lambda **how: SimpleNamespace(start=lambda: None))
    files = {"trace": tmp_path / "trace.json", "memory_snapshot": tmp_path / "memory.pickle"}
    KernelWindow(device=torch.device("cuda"), **files).begin()
    assert asked["stacks"] == "python"
