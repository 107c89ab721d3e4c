"""Fake tensors that note what a GPU would: who waits for whom, and what is launched."""

import collections
import dataclasses
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# They look at their operand or give it another name, and launch nothing.
FREE = {"detach", "lift_fresh", "device"}
ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# How many elements they give depends on their operand's content, which the host has to read.
DATA_DEPENDENT = {"nonzero", "masked_select", "_unique2", "unique_dim"}
RECORDED = -1  # in place of a stream's number: not computed before the graph is replayed


@dataclasses.dataclass
class Observed:
    """What happened in a run.

    Attributes:
        when: What the run is doing: "start", "step 3", "evaluation", "save", "between steps".
        waits: Where the host waits for the device: what for, file and line, and when.
        unordered: Reads, by a stream, of what another one writes and it has not waited for.
        unrecorded: Copies from the host that another stream reads, and whose memory may be reused
            meanwhile (`Tensor.record_stream`).
        host_operands: Operators on the device that are given a host tensor.
        fused: Fused optimizer kernels: name, whether recorded, whether the rate is a tensor.
        launched: Operators that the host launches, by step; views are not launched.
        replayed: Graphs that it launches, by step.
        recorded: Operators in each graph.
        compiled: Modes that torch.compile was called with.
        layouts: Steps in which a fused optimizer's state has another layout than the weights.
        collectives: What several processes do together, launched by the host: its name, the
            elements, and when.
        replayed_collectives: What they do together in a graph that is replayed, likewise.
    """

    when: str = "start"
    waits: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    unordered: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    unrecorded: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    host_operands: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    fused: list[tuple[str, bool, bool]] = dataclasses.field(default_factory=list)
    launched: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    replayed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    recorded: list[int] = dataclasses.field(default_factory=list)
    compiled: list[str] = dataclasses.field(default_factory=list)
    layouts: list[str] = dataclasses.field(default_factory=list)
    collectives: list[tuple[str, int, str]] = dataclasses.field(default_factory=list)
    replayed_collectives: list[tuple[str, int, str]] = dataclasses.field(default_factory=list)


def place() -> str:
    """The innermost line of the framework that is being run."""
    for frame in reversed(traceback.extract_stack(limit=60)):
        _, found, path = frame.filename.rpartition("training_framework/")
        if found:
            return f"{path}:{frame.lineno} {frame.name}"
    return "outside the framework"


class Stream:
    """A stream of operators. One that has waited for another knows what that one has written."""

    def __init__(self, device: "Device") -> None:
        self.device = device
        self.number = len(device.streams)
        self.written = 0
        self.knows: collections.Counter[int] = collections.Counter()
        device.streams.append(self)

    def wait_stream(self, other: "Stream") -> None:
        seen = other.knows | collections.Counter({other.number: other.written})
        self.knows |= seen  # the larger of each

    def knows_of(self, stream: int, operator: int) -> bool:
        return stream == self.number or self.knows[stream] >= operator

    def is_capturing(self) -> bool:
        return self.device.capturing is not None

    def synchronize(self) -> None:
        self.device.wait("stream.synchronize")


class Graph:
    """What is recorded: what it reads from before and what it writes, to check at each replay."""

    def __init__(self, device: "Device") -> None:
        self.device = device
        self.reads: dict[int, Any] = {}
        self.writes: dict[int, Any] = {}
        self.operators = 0
        self.collectives: list[tuple[str, int]] = []

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def replay(self) -> None:
        device = self.device
        observed = device.observed
        observed.replayed[observed.when] += 1
        observed.replayed_collectives += [(*what, observed.when) for what in self.collectives]
        for storage in self.reads:
            device.check_read(storage, "replay")
        stream = device.current
        stream.written += 1
        for storage in self.writes:
            device.writers[storage] = (stream.number, stream.written)


class Device:
    """The fake GPU's state: streams, the graph that is being recorded, who wrote what."""

    def __init__(self, observed: Observed) -> None:
        self.observed = observed
        self.streams: list[Stream] = []
        self.stack = [Stream(self)]
        self.capturing: Graph | None = None
        self.writers: dict[int, tuple[int, int]] = {}
        self.pinned: set[int] = set()
        self.copies: dict[int, set[int]] = {}  # by storage: the streams recorded

    @property
    def current(self) -> Stream:
        return self.stack[-1]

    def wait(self, what: str) -> None:
        """The host waits for the device."""
        self.observed.waits.append((what, place(), self.observed.when))
        if self.capturing is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing ({what})")

    def run(
        self, name: str, read: list[FakeTensor], written: list[FakeTensor], *, is_new: bool
    ) -> None:
        """Launch an operator, or record it; `is_new`: what it writes has memory of its own."""
        graph, stream = self.capturing, self.current
        for tensor in read:
            storage = storage_of(tensor)
            if graph is None:
                self.check_read(storage, name)
            elif storage not in graph.writes:
                graph.reads.setdefault(storage, tensor.untyped_storage())
        if graph is None:
            self.observed.launched[self.observed.when] += 1
            stream.written += 1
        else:
            graph.operators += 1
        for tensor in written:
            storage = storage_of(tensor)
            if graph is None:
                self.writers[storage] = (stream.number, stream.written)
            else:
                graph.writes.setdefault(storage, tensor.untyped_storage())
                if is_new or storage not in self.writers:  # else its content stays
                    self.writers[storage] = (RECORDED, 1)

    def check_read(self, storage: int, name: str) -> None:
        stream, observed = self.current, self.observed
        writer = self.writers.get(storage)
        if writer is not None and not stream.knows_of(*writer):
            says = "what is recorded and never replayed" if writer[0] == RECORDED else "too early"
            observed.unordered.append((f"{name} reads {says}", place(), observed.when))
        # Other streams than the first are waited for by it before the memory is given back.
        if storage in self.copies and stream.number == 0 and 0 not in self.copies[storage]:
            observed.unrecorded.append((name, place(), observed.when))

    def forget(self, tensor: FakeTensor) -> None:
        """A tensor has new memory, where another one may have been."""
        for known in (self.writers, self.copies):
            known.pop(storage_of(tensor), None)
        if self.capturing is not None:  # the graph's own, and no content that it reads
            self.capturing.writes[storage_of(tensor)] = tensor.untyped_storage()

    def record_stream(self, tensor: FakeTensor, stream: Stream) -> None:
        if storage_of(tensor) in self.copies:
            self.copies[storage_of(tensor)].add(stream.number)

    def copy(self, source: FakeTensor, kind: str, *, non_blocking: bool, to: FakeTensor) -> None:
        """A copy between host and device; `kind` is what to call it."""
        host = source if source.device.type == "cpu" else to
        if not non_blocking:
            self.wait(kind)
        elif storage_of(host) not in self.pinned:
            self.wait(f"{kind} of pageable memory")
        self.copies.pop(storage_of(to), None)
        if host is source and self.current.number:  # the first stream's memory is not reused early
            self.copies[storage_of(to)] = set()


def storage_of(tensor: FakeTensor) -> int:
    return tensor.untyped_storage()._cdata


def _on(device_type: str, values: Any) -> list[FakeTensor]:
    return [
        leaf
        for leaf in tree_leaves(values)
        if isinstance(leaf, FakeTensor) and leaf.device.type == device_type
    ]


class ObservingMode(FakeTensorMode):
    """Runs operators on fake tensors, and tells a `Device` of them."""

    avoid_device_init = True

    def __init__(self, device: Device) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.device = device
        self._depth = 0  # fake tensors take some operators apart, which a device runs whole

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if name in DATA_DEPENDENT and _on("cuda", args):
            self.device.wait(name)
        self._depth += 1
        try:
            return self._dispatch(func, name, types, args, kwargs)
        finally:
            self._depth -= 1

    def _dispatch(self, func: Any, name: str, types: Any, args: Any, kwargs: Any) -> Any:
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            if args[0].device.type == "cuda":
                self.device.wait("item")
            return content(args[0].dtype)
        if name in ("record_stream", "is_pinned"):
            return None if name == "record_stream" else False
        pins = kwargs.pop("pin_memory", False) or name in ("_pin_memory", "pin_memory")
        if name.startswith("_fused_"):  # it changes its operands in place
            result = None
            rate = isinstance(kwargs.get("lr"), torch.Tensor)
            self.device.observed.fused.append((str(func), self.device.capturing is not None, rate))
            if any(_other_layouts(*args)):
                self.device.observed.layouts.append(self.device.observed.when)
        elif name in ("_pin_memory", "pin_memory"):
            result = super().__torch_dispatch__(aten.clone.default, types, args[:1], {})
        else:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        if not (func.is_view or func._schema.is_mutable or name in FREE):  # in memory of its own
            for tensor in _on("cpu", result):
                known = self.device.pinned
                (known.add if pins else known.discard)(storage_of(tensor))
        if self._depth == 1:
            self._observe(func, name, args, kwargs, result)
        return result

    def _observe(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        read, made = _on("cuda", (args, kwargs)), _on("cuda", result)
        if func.is_view or name in FREE or not (read or made):
            return
        if name in ALLOCATING:
            for tensor in made:
                self.device.forget(tensor)
            return
        if func.namespace == "c10d":
            elements = sum(tensor.numel() for tensor in _on("cuda", args[0]))
            if self.device.capturing is not None:
                self.device.capturing.collectives.append((name, elements))
            else:
                self.device.observed.collectives.append((name, elements, self.device.observed.when))
        copies = list(_copies(name, args, kwargs, result))
        for source, target, non_blocking in copies:
            kind = f"copy {source.device.type} to {target.device.type}"
            self.device.copy(source, kind, non_blocking=non_blocking, to=target)
        if not copies:
            # A number in host memory is read when the operator is launched, or recorded.
            capturing = self.device.capturing is not None
            if any(tensor.ndim or capturing for tensor in _on("cpu", (args, kwargs))):
                observed = self.device.observed
                observed.host_operands.append((str(func), place(), observed.when))
        # The schema of c10d's operators does not say that they write.
        in_place = func._schema.is_mutable or func.namespace == "c10d"
        written = [*made, *read] if in_place else made
        self.device.run(str(func), read, written, is_new=not in_place)


def _copies(
    name: str, args: Any, kwargs: Any, result: Any
) -> Iterator[tuple[FakeTensor, FakeTensor, bool]]:
    """Copies between host and device that an operator makes: from, to, and whether it goes on."""
    pairs: list[tuple[Any, Any]] = []
    non_blocking = bool(kwargs.get("non_blocking"))
    if name == "_to_copy":
        pairs = [(args[0], result)]
    elif name in ("copy_", "_foreach_copy_"):
        non_blocking |= len(args) > 2 and bool(args[2])
        pairs = list(zip(tree_leaves(args[1]), tree_leaves(args[0]), strict=True))
    for source, target in pairs:
        both = isinstance(source, FakeTensor) and isinstance(target, FakeTensor)
        if both and source.device.type != target.device.type:
            yield source, target, non_blocking


def _other_layouts(
    weights: list[torch.Tensor], gradients: list[torch.Tensor], *more: Any
) -> Iterator[bool]:
    """Whether each state of a fused optimizer has other strides than its weight.

    The gradients' strides are not looked at: fake ones have those of a CPU's operators.
    """
    for states in more:
        if isinstance(states, list) and len(states) == len(weights):
            for weight, state in zip(weights, states, strict=True):
                yield state.shape == weight.shape and state.stride() != weight.stride()


def content(dtype: torch.dtype) -> float | bool:
    """What reading an element gives: nothing special happened."""
    return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 1
