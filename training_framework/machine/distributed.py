"""Several processes that train together: torchrun's environment and torch.distributed."""

import gc
import importlib
import json
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from training_framework.errors import UserError

__all__ = [
    "Processes",
    "gathered",
    "is_first_to_say",
    "largest",
    "process_group",
    "share_buffers",
    "value_of_first_process",
]

BOARD_TIMEOUT = timedelta(seconds=5)
# Opening a large data set, and compiling kernels, may take one process longer than another.
FIRST_PROCESS_TIMEOUT = timedelta(minutes=10)


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
    """Join the other processes: NCCL for CUDA devices, gloo elsewhere; alone, nothing happens.

    A UserError of one process ends the others with the same UserError where they would otherwise
    only report that it has left them.

    What uses the group, such as a DistributedDataParallel, must have gone out of scope where this
    ends. Only with its last user gone do gloo's threads end, and one that still held a tensor of
    Python's while the interpreter is taken down would abort the process (PyTorch's pull request
    179291 describes it).
    """
    if processes.world_size == 1:
        yield
        return
    # It has the group of the time of its import as defaults of its functions; imported later, by
    # DistributedDataParallel, it would hold this group for good.
    importlib.import_module("torch.distributed.nn.functional")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # what their variables hold uses the group
        if isinstance(error, UserError):
            _leave_word(error)
        elif isinstance(error, RuntimeError) and (cause := _word_left()) is not None:
            raise cause from None
        raise
    finally:
        gc.collect()
        dist.destroy_process_group()


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each value over all processes, in fp32.

    Several processes wait for the device, and must all call it at the same point.
    """
    if not dist.is_initialized():
        return [float(value) for value in values]
    numbers = torch.tensor(values, dtype=torch.float32, device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers.tolist()


def gathered(value: Any) -> list[Any]:
    """Every process's value, in the order of their ranks: plain values, a few.

    All processes must call it at the same point.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give every process rank 0's buffers, such as the running statistics of its batch norms.

    All processes must call it at the same point.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def is_first_to_say(text: str) -> bool:
    """Whether no other process of this start has said the same; it is then taken as said.

    The processes need not have formed a group yet. Where something else than torchrun started
    them, none knows of the others, and each is the first.
    """
    board = _board()
    return board is None or board.add(f"said/{text}", 1) == 1


def value_of_first_process(key: str, value: str, processes: Processes) -> str:
    """Rank 0's value of a text that each process has found for itself; all take that one.

    All processes must call it, each key once. They need not have formed a group yet. Where
    something else than torchrun started them, each keeps its own.

    Raises:
        UserError: Rank 0 did not call it in time.
    """
    board = _board() if processes.world_size > 1 else None
    if board is None:
        return value
    if processes.is_first:
        board.set(f"value/{key}", value)
        return value
    try:
        board.wait([f"value/{key}"], FIRST_PROCESS_TIMEOUT)
    except RuntimeError:
        raise UserError(
            f"rank 0 has not said its {key} in {FIRST_PROCESS_TIMEOUT.seconds // 60} minutes",
            "look for what keeps it, and start again",
        ) from None
    return board.get(f"value/{key}").decode()


def _leave_word(error: UserError) -> None:
    board = _board()
    if board is not None:
        # The first cause stays; those that follow may only be its consequences.
        board.compare_set("cause", "", json.dumps([error.fault, error.cure]))


def _word_left() -> UserError | None:
    board = _board()
    if board is None or not board.check(["cause"]):
        return None
    return UserError(*json.loads(board.get("cause")))


def _board() -> dist.Store | None:
    """Where processes can leave word for each other whatever state their group is in.

    It is the store of torchrun itself, which outlives them; None without torchrun.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=BOARD_TIMEOUT,
        )
    except RuntimeError:  # torchrun itself has ended
        return None
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"training_framework/{start}", store)
