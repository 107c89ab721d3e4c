"""Split a nested state of tensors and plain values into named tensors and JSON values."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["FlatState", "is_channels_last"]


@dataclass(frozen=True)
class FlatState:
    """A flat state.

    Attributes:
        description: JSON values, with `{"$tensor": name}` in the place of each tensor.
        tensors: The tensors by name, such as `model/conv1.weight`, in descending order of element
            size, so that each one starts at a multiple of its element size in the file.
    """

    description: Any
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, state: Any) -> "FlatState":
        """Flatten a state; the tensors are not copied.

        Args:
            state: Tensors, numbers, text, None, and dicts, lists and tuples of them.
        """
        tensors: dict[str, Tensor] = {}
        description = _described(state, "", tensors)
        by_size = sorted(tensors.items(), key=lambda item: -item[1].element_size())
        return cls(description, dict(by_size))

    @property
    def tensor_bytes(self) -> int:
        """Total size of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def copied(self) -> "FlatState":
        """The state with copies of the present tensors in host memory.

        Tensors on a GPU are copied to page-locked memory, all at once; this waits for the copies.
        """
        copies = {name: _host_copy(tensor) for name, tensor in self.tensors.items()}
        for device in {tensor.device for tensor in self.tensors.values()}:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return FlatState(self.description, copies)

    def put_together(self) -> Any:
        """The nested state, with copies of the tensors.

        Raises:
            Exception: The description is not one of `of`; the type depends on its fault.
        """
        return _put_together(self.description, self.tensors)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor (N, C, H, W) has the strides of (N, H, W, C) in memory."""
    if tensor.ndim != 4:
        return False
    _, channels, height, width = tensor.shape
    return tensor.stride() == (channels * height * width, 1, width * channels, channels)


def _host_copy(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone()
    if tensor.device.type == "cuda":
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
    return tensor.cpu()


def _described(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        while name in tensors:
            name += "'"
        tensors[name] = value
        # Fused optimizers rely on their state having the memory layout of the weights.
        return {"$channels_last" if is_channels_last(value) else "$tensor": name}
    if isinstance(value, dict):
        inside = f"{name}/" if name else ""
        items = {key: _described(item, f"{inside}{key}", tensors) for key, item in value.items()}
        if not all(isinstance(key, str) and not key.startswith("$") for key in items):
            return {"$items": [list(item) for item in items.items()]}
        versions = getattr(value, "_metadata", None)  # of the modules, in torch's state_dict
        return items if versions is None else {"$state_dict": items, "versions": versions}
    if isinstance(value, (list, tuple)):
        listed = [_described(item, f"{name}/{place}", tensors) for place, item in enumerate(value)]
        return listed if isinstance(value, list) else {"$tuple": listed}
    return value


def _put_together(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_put_together(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    mark = next((key for key in node if key.startswith("$")), None)
    if mark is not None:
        return _put_together_marked(mark, node, tensors)
    return {key: _put_together(item, tensors) for key, item in node.items()}


def _put_together_marked(mark: str, node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    content = node[mark]
    if mark == "$items":
        return {key: _put_together(item, tensors) for key, item in content}
    if mark == "$tuple":
        return tuple(_put_together(content, tensors))
    if mark == "$state_dict":
        items = OrderedDict(_put_together(content, tensors))
        items._metadata = OrderedDict(node["versions"])  # type: ignore[attr-defined]
        return items
    # A copy starts at a cache line, unlike the bytes of a file in memory.
    copied = tensors[content].clone()
    return copied.permute(0, 3, 1, 2) if mark == "$channels_last" else copied
