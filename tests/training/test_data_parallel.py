"""The network in DDP, with a gloo group of this process alone."""

import contextlib
import importlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training_framework.machine.distributed import share_buffers
from training_framework.training import data_parallel
from training_framework.training.data_parallel import in_data_parallel
from training_framework.training.step import TrainStep

CPU = torch.device("cpu")
IMAGES, LABELS = torch.randn(4, 3, 4, 4), torch.arange(4)


class Collectives(TorchDispatchMode):
    """Notes the elements that each collective carries."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            elements = sum(tensor.numel() for tensor in tensors)
            self.seen.append((func.overloadpacket.__name__, elements))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _group(tmp_path):
    importlib.import_module("torch.distributed.nn.functional")  # see process_group
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
    )


def step_of(network: nn.Module, **options) -> TrainStep:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return TrainStep(in_data_parallel(network, CPU), optimizer, device_type="cpu", **options)


@pytest.mark.usefixtures("_group")
def test_buffers_travel_at_the_start_and_for_an_evaluation_but_in_no_step():
    network = small_network()
    numbers = sum(parameter.numel() for parameter in network.parameters())
    with Collectives() as at_start:
        step = step_of(network)
    assert {("broadcast_", numbers + 2 * 8), ("broadcast_", 1)} <= set(at_start.seen)
    for number in range(3):
        with Collectives() as in_step:  # before the second one, DDP agrees on its buckets once
            step.accumulate(IMAGES, LABELS)
            step.update(0.1, step=number)
    assert in_step.seen == [("allreduce_", numbers)]
    with Collectives() as evaluation:
        share_buffers(network)
    assert evaluation.seen == [("broadcast_", 16), ("broadcast_", 1)]  # one a dtype


@pytest.mark.usefixtures("_group")
def test_a_step_in_ddp_makes_the_numbers_of_one_without_it():
    parallel, plain = step_of(small_network()), small_network()
    alone = TrainStep(plain, torch.optim.SGD(plain.parameters(), lr=0.1), device_type="cpu")
    for number in range(3):
        for step in (parallel, alone):
            step.accumulate(IMAGES, LABELS, group_size=2, last_of_group=False)
            step.accumulate(IMAGES.flip(0), LABELS.flip(0), (LABELS, torch.tensor(0.3)),
                            group_size=2)  # fmt: skip
            step.update(0.1, step=number)
    found, expected = parallel.state_dict()["model"], alone.state_dict()["model"]
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("_group")
def test_forward_and_loss_are_compiled_into_one_graph_inside_ddp(monkeypatch):
    graphs = []

    def note(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, mode: compile_with(call, backend=note))
    step = step_of(small_network(), compile_mode="default", precision="bf16-mixed")
    with torch._dynamo.config.patch(suppress_errors=False):
        for number in range(2):
            step.accumulate(IMAGES, LABELS)
            step.update(0.1, step=number)
    assert len(graphs) == 1  # all gradients are in one bucket
    assert any("cross_entropy" in str(target) for target in graphs[0])


@pytest.mark.usefixtures("_group")
def test_what_gathers_the_gradients_is_made_on_the_stream_of_a_recording(monkeypatch):
    order = []

    @contextlib.contextmanager
    def on_stream(stream):
        order.append(f"on {stream}")
        yield
        order.append("back")

    class Parallel(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, *arguments, **options):
            order.append("made")
            super().__init__(*arguments, **options)

    monkeypatch.setattr(data_parallel, "on_stream", on_stream)
    monkeypatch.setattr(data_parallel, "DistributedDataParallel", Parallel)
    in_data_parallel(small_network(), CPU)
    in_data_parallel(small_network(), CPU, "a side stream")
    assert order == ["made", "on a side stream", "made", "back"]
