import dataclasses

import pytest
import torch

from training_framework.config import TrainConfig
from training_framework.errors import UserError
from training_framework.kernels import compiler as library
from training_framework.kernels.norm import load_norm_kernels
from training_framework.machine.hardware import detect_hardware
from training_framework.plan import make_plan
from training_framework.training.assembly import open_configured_dataset
from training_framework.training.network_assembly import assemble_network

SETTINGS = {
    "data": "synthetic", "img_size": 16, "model": "resnet10", "precision": "32",
    "compile": False, "accelerator": "cpu",
}  # fmt: skip


@pytest.fixture
def facts():
    return open_configured_dataset(TrainConfig(**SETTINGS)).facts


@pytest.fixture
def _no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (library.load_library, load_norm_kernels):
        cached.cache_clear()
    yield
    for cached in (library.load_library, load_norm_kernels):
        cached.cache_clear()


def planned(facts, **settings):
    config = TrainConfig(**SETTINGS, **settings)
    plan = make_plan(config, detect_hardware(), facts)
    return config, dataclasses.replace(plan, fused_norms=True, winograd_convolutions=False)


@pytest.mark.usefixtures("_no_compiler")
def test_kernels_that_nobody_asked_for_stop_no_run(facts):
    model, lines = assemble_network(*planned(facts), torch.device("cpu"))
    assert "goes on without fused_norms: no C++ compiler is installed" in lines[0]
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.usefixtures("_no_compiler")
def test_kernels_that_were_asked_for_are_one_line_with_the_cure(facts):
    with pytest.raises(
        UserError, match=r"fused_norms: no C\+\+ compiler.*install a C\+\+ compiler"
    ):
        assemble_network(*planned(facts, fused_norms=True), torch.device("cpu"))
