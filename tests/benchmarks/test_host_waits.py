"""Counting the host's waits in a trace: what is in a step counts, and nothing else."""

import importlib
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

host_waits = importlib.import_module("host_waits")


def event(name, start, end, *, thread=1, parent=None, device=DeviceType.CPU):
    return SimpleNamespace(
        name=name, thread=thread, device_type=device,
        time_range=SimpleNamespace(start=start, end=end),
        cpu_parent=None if parent is None else SimpleNamespace(name=parent),
    )  # fmt: skip


TRACE = [
    event(host_waits.STEP, 0, 10),
    event("cudaLaunchKernel", 1, 2, parent="aten::relu"),
    event("cudaStreamSynchronize", 3, 9, parent="aten::item"),
    event(host_waits.STEP, 20, 30),
    event("cudaLaunchKernel", 21, 22, parent="aten::relu"),
    event("cudaStreamSynchronize", 23, 29, parent="aten::item"),
    event("cudaEventSynchronize", 24, 25),
    # Not of a step: between two, in a loader's thread, and the profiler's own at the end.
    event("cudaStreamSynchronize", 15, 16),
    event("cudaStreamSynchronize", 5, 6, thread=2),
    event("cudaDeviceSynchronize", 40, 41),
    # The step as it appears on the GPU is no step of the host.
    event(host_waits.STEP, 12, 18, device=DeviceType.CUDA),
]


def test_waits_inside_a_step_are_counted_by_their_operator():
    assert host_waits.calls_inside(TRACE, host_waits.WAITS) == {
        "cudaStreamSynchronize (aten::item)": 1.0,
        "cudaEventSynchronize": 0.5,
    }
    assert host_waits.calls_inside(TRACE, host_waits.LAUNCHES) == {
        "cudaLaunchKernel (aten::relu)": 1.0
    }


@pytest.mark.parametrize(
    ("waits", "status"), [({}, 0), ({"cudaStreamSynchronize (aten::item)": 1.0}, 1)]
)
def test_a_wait_on_a_gpu_fails_and_a_variant_that_cannot_run_says_why(
    monkeypatch, tmp_path, waits, status
):
    def measure(settings):
        if settings.get("cuda_graph"):
            raise host_waits.UserError("no graph here", "leave it off")
        return {"device": "cuda", "waits": waits, "launches": {}}

    monkeypatch.setattr(host_waits, "measure", measure)
    file = tmp_path / "waits.json"
    monkeypatch.setattr("sys.argv", ["host_waits.py", "--output", str(file)])
    assert host_waits.main() == status
    assert "no graph here" in file.read_text()


def test_steps_on_a_cpu_call_nothing_of_cuda():
    found = host_waits.measure(
        {"data": "synthetic", "synthetic_train_images": 16, "model": "resnet10", "img_size": 8,
         "batch_size": 8, "accelerator": "cpu", "threads": 1, "precision": "32"}
    )  # fmt: skip
    assert (found["device"], found["waits"], found["launches"]) == ("cpu", {}, {})
