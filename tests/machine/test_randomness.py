"""What makes runs equal; no GPU is asked."""

import os

import pytest
import torch

from training_framework.machine.randomness import use_deterministic_algorithms


@pytest.mark.parametrize(
    ("device_type", "before", "after"),
    [("cuda", None, ":4096:8"), ("cuda", ":16:8", ":16:8"), ("cpu", None, None)],
)
def test_cublas_gets_the_workspaces_without_which_pytorch_refuses_linear_layers(
    device_type, before, after, monkeypatch
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before or "")
    if before is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    use_deterministic_algorithms(device_type)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == after
