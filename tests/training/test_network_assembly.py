import dataclasses

import pytest
import torch

from training_framework.config import TrainConfig
from training_framework.errors import UserError
from training_framework.kernels import compiler as library
from training_framework.kernels.norm import load_norm_kernels
from training_framework.kernels.winograd import load_winograd_kernels
from training_framework.machine.hardware import detect_hardware
from training_framework.plan import plan_run, planned_run
from training_framework.training.network_assembly import assemble_network

SETTINGS = {
    "data": "synthetic", "img_size": 16, "model": "resnet10", "precision": "32",
    "compile": False, "accelerator": "cpu",
}  # fmt: skip


@pytest.fixture
def _no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (library.load_library, load_norm_kernels, load_winograd_kernels):
        cached.cache_clear()
    yield
    for cached in (library.load_library, load_norm_kernels, load_winograd_kernels):
        cached.cache_clear()


@pytest.mark.usefixtures("_no_compiler")
def test_kernels_that_nobody_asked_for_are_not_planned_where_they_cannot_be_compiled(monkeypatch):
    """A compiler is there but fails, which only shows when it is called."""
    monkeypatch.setattr(
        planned_run,
        "detect_hardware",
        lambda: dataclasses.replace(
            detect_hardware(), instruction_sets=("avx512",), cpp_compiler="g++"
        ),
    )
    planned = plan_run(TrainConfig(**SETTINGS))
    assert not planned.plan.fused_norms
    assert not planned.plan.winograd_convolutions
    reasons = [choice.reason for choice in planned.plan.choices if choice.name == "fused_norms"]
    assert "but no C++ compiler is installed" in reasons[0]
    model, _ = assemble_network(planned.plan, torch.device("cpu"))
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.usefixtures("_no_compiler")
def test_kernels_that_were_asked_for_are_one_line_with_the_cure():
    with pytest.raises(
        UserError,
        match=r"^fused_norms: no C\+\+ compiler is installed \(CXX is 'no-such-compiler'\); "
        r"install a C\+\+ compiler \(g\+\+\), or set fused_norms to false$",
    ):
        plan_run(TrainConfig(**SETTINGS, fused_norms=True))
