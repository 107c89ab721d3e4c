"""Several processes that train together: torchrun's environment and torch.distributed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from training_framework.errors import UserError

__all__ = ["Processes", "any_process", "process_group"]


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: Its number, from 0.
        world_size: How many there are.
        local_rank: Its number on this machine.
        local_world_size: How many there are on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Processes":
        """As torchrun says in the environment; one process without it.

        Raises:
            UserError: The variables are set but make no sense.
        """
        names = {
            "rank": "RANK",
            "world_size": "WORLD_SIZE",
            "local_rank": "LOCAL_RANK",
            "local_world_size": "LOCAL_WORLD_SIZE",
        }
        if "TORCHELASTIC_RUN_ID" not in os.environ and "MASTER_ADDR" not in os.environ:
            return cls()
        values = {}
        for field, variable in names.items():
            text = os.environ.get(variable, "")
            if not text.isdecimal():
                raise UserError(
                    f"environment variable {variable} is {text!r}", "start the run with torchrun"
                )
            values[field] = int(text)
        return cls(**values)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which logs and saves."""
        return self.rank == 0


@contextmanager
def process_group(processes: Processes, device: torch.device) -> Iterator[None]:
    """Join the other processes: NCCL for CUDA devices, gloo elsewhere; alone, nothing happens."""
    if processes.world_size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process. All of them must call it at the same point."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor([int(flag)], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())
