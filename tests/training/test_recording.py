"""Recording work: what is left behind when it fails. The device is a substitute."""

import contextlib
import gc
import types
import weakref

import pytest
import torch

from training_framework.training.recording import CudaRecord


class Graph:
    def replay(self):
        pass


@pytest.fixture
def device(monkeypatch):
    """Recordings that fail at their end if `fails` is set; `open_pools` as PyTorch's allocator."""

    found = types.SimpleNamespace(fails=False, open_pools=[])

    @contextlib.contextmanager
    def graph(recorded, pool, **_):
        found.open_pools.append(pool)
        yield
        if found.fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        found.open_pools.remove(pool)

    def end(device, pool):
        if pool not in found.open_pools:
            raise RuntimeError("not currently recording to mempool_id")
        found.open_pools.remove(pool)

    for name, value in {
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 7),
        "current_stream": lambda: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_device": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    return found


def test_a_failed_recording_leaves_no_pool_open(device):
    device.fails = True
    with pytest.raises(RuntimeError, match="previous error during capture"):
        CudaRecord()(lambda: None)
    assert device.open_pools == []


def test_an_error_in_a_recording_that_the_device_ends_well_is_the_one_that_is_raised(device):
    def work():
        device.open_pools.clear()  # a PyTorch that ends the recording itself
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        CudaRecord()(work)


def test_a_graph_lives_as_long_as_its_replay(device):
    record = CudaRecord()
    replay = record(lambda: None)
    graph = weakref.ref(replay.__self__)
    del replay
    gc.collect()
    assert graph() is None
