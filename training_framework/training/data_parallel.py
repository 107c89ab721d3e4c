"""The network in DistributedDataParallel, as every process of several trains it."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training_framework.training.recording import on_stream

__all__ = ["InnerForward", "in_data_parallel"]


class InnerForward(nn.Module):
    """Between DistributedDataParallel and the network: the forward pass, compiled or not.

    DistributedDataParallel calls it with whatever it is called with. torch.compile cannot trace
    DistributedDataParallel itself: compiled around it, forward and loss fall into one graph before
    it, those of the network, and one behind it. Compiled in here, they are one graph for each
    bucket of gradients, so that a bucket still travels while the next one is computed ("DDP" in
    PyTorch's notes on torch.compile).

    Args:
        network: The network, on its device.

    Attributes:
        compute: What is called; the network, unless set.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.compute: Callable[..., Any] | None = None

    def forward(self, *arguments: Any) -> Any:
        """What `compute` makes of the arguments."""
        return (self.compute or self.network)(*arguments)


def in_data_parallel(
    network: nn.Module, device: torch.device, stream: torch.cuda.Stream | None = None
) -> DistributedDataParallel:
    """The network, whose gradients are averaged over all processes in each backward pass.

    All processes start with the parameters and buffers of rank 0. Later, a process keeps buffers of
    its own, such as the running statistics of norms: only an evaluation needs rank 0's, and
    `share_buffers` copies them once for it instead of in every forward pass.

    Args:
        network: The network, on the device.
        device: Where it trains.
        stream: For steps that are recorded as CUDA graphs: what gathers the gradients belongs to
            the stream it is made on, and a recording must not wait for the default one.
    """
    with nullcontext() if stream is None else on_stream(stream):
        parallel = DistributedDataParallel(
            InnerForward(network),
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    # As an argument, it would also leave the buffers of the start alone, and in PyTorch 2.13 warn.
    parallel.broadcast_buffers = False
    return parallel
