"""`torch.cuda` of a fake GPU, for as long as `fake_cuda` is entered."""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from observer import Device, Graph, Observed, ObservingMode, Stream, content
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

GIB = 2**30


class Event:
    """An event that is always done."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._device.wait("event.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 1.0


@contextlib.contextmanager
def fake_cuda(
    observed: Observed,
    *,
    name: str = "NVIDIA H200",
    capability: tuple[int, int] = (9, 0),
    memory_gib: int = 140,
    count: int = 1,
) -> Iterator[ObservingMode]:
    """`count` GPUs of that kind, of which this process uses cuda:0.

    Enter the mode that this gives to compute with fake tensors there.
    """
    device = Device(observed)
    properties = types.SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], total_memory=memory_gib * GIB,
        multi_processor_count=132, uuid="0",
    )  # fmt: skip
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, **attributes: Any) -> None:
            for attribute, value in attributes.items():
                stack.enter_context(mock.patch.object(owner, attribute, value, create=True))

        replace(torch.cuda, **_streams_and_graphs(device), **_facts(properties, device, count))
        replace(
            torch.accelerator,
            synchronize=lambda d=None: device.wait("synchronize"),
            current_stream=lambda d=None: device.current,
            current_accelerator=lambda check_available=False: torch.device("cuda"),
        )
        replace(FakeTensor, numpy=_numpy, **_tensor_methods(device))
        replace(torch.amp.GradScaler, get_scale=_scale_reader(torch.amp.GradScaler.get_scale))
        replace(nn.Module, _apply=_apply)
        replace(torch, compile=_compile_observer(observed))
        # The backward pass runs in the thread that observes.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield ObservingMode(device)


def _streams_and_graphs(device: Device) -> dict[str, Any]:
    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        device.stack.append(stream)
        try:
            yield
        finally:
            device.stack.pop()

    @contextlib.contextmanager
    def graph(recorded: Graph, pool: Any = None, **_: Any) -> Iterator[None]:
        assert device.capturing is None
        device.capturing = recorded
        try:
            yield
        finally:
            device.capturing = None
        device.observed.recorded.append(recorded.operators)

    return {
        "Stream": lambda d=None, priority=0: Stream(device),
        "stream": on,
        "current_stream": lambda d=None: device.current,
        "default_stream": lambda d=None: device.stack[0],
        "Event": lambda *a, **k: Event(device),
        "CUDAGraph": lambda: Graph(device),
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: device.capturing is not None,
        "synchronize": lambda d=None: device.wait("synchronize"),
    }


def _facts(properties: types.SimpleNamespace, device: Device, count: int) -> dict[str, Any]:
    capability = (properties.major, properties.minor)
    return {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "set_device": lambda d: None,
        "get_device_properties": lambda d=None: properties,
        "get_device_name": lambda d=None: properties.name,
        "get_device_capability": lambda d=None: capability,
        "get_arch_list": lambda: [f"sm_{properties.major}{properties.minor}"],
        "is_bf16_supported": lambda including_emulation=True: (
            including_emulation or capability >= (8, 0)
        ),
        "empty_cache": lambda: None,
        "memory_allocated": lambda d=None: GIB,
        "max_memory_allocated": lambda d=None: GIB,
        "reset_peak_memory_stats": lambda d=None: None,
        "get_rng_state": lambda d=None: torch.get_rng_state(),
        "set_rng_state": lambda state, d=None: None,
    }


def _tensor_methods(device: Device) -> dict[str, Any]:
    def tolist(tensor: Tensor) -> Any:
        if tensor.device.type == "cuda":
            device.wait("tolist")
        value = content(tensor.dtype)
        if tensor.dtype.is_floating_point:
            value = 1.0  # the sums of an evaluation: none would be an error
        return np.full(tuple(tensor.shape), value).tolist()

    def record_stream(tensor: Tensor, stream: Stream) -> None:
        device.record_stream(tensor, stream)

    return {"tolist": tolist, "record_stream": record_stream}


def _numpy(tensor: Tensor, *, force: bool = False) -> Any:
    if tensor.device.type == "cuda":
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _scale_reader(get_scale: Callable[..., float]) -> Callable[..., float]:
    """The scale of fp16's gradients is read from the device, and is a usual one."""

    def read(scaler: Any) -> float:
        get_scale(scaler)
        return 2.0**16

    return read


def _compile_observer(observed: Observed) -> Callable[..., Any]:
    """Inductor needs a GPU: what would be compiled runs as it is, and is noted."""

    def compiled(function: Any, *, mode: str = "default", **_: Any) -> Any:
        observed.compiled.append(mode)
        return function

    return compiled


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` with new parameters: the content of a fake one cannot be exchanged."""
    made: dict[int, nn.Parameter] = {}
    kept = []  # so that no two have one id
    for module in self.modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                kept.append(parameter)
                with torch.no_grad():
                    made[id(parameter)] = nn.Parameter(
                        fn(parameter.detach()), parameter.requires_grad
                    )
            module._parameters[key] = made[id(parameter)]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = fn(buffer)
    return self
