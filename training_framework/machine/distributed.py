"""Processes that train together: torchrun's environment and torch.distributed."""

import atexit
import gc
import importlib
import json
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training_framework.errors import UserError

__all__ = [
    "BACKENDS",
    "Processes",
    "gathered",
    "is_first_to_report",
    "largest",
    "process_group",
    "share_buffers",
    "share_largest",
    "value_of_first_process",
]

# How processes talk to each other, by PyTorch's type of their devices. A type that is missing here
# has no such way, and one process trains on it.
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
# Read by PyTorch when a group of NCCL is formed.
ASYNC_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
BOARD_TIMEOUT = timedelta(seconds=5)
# One process may take longer than another to open a large data set or to compile kernels.
FIRST_PROCESS_TIMEOUT = timedelta(minutes=10)
# ncclCommAbort needs no other process and takes milliseconds, but some versions of NCCL hang in it.
ABORT_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The position of this process among those that train together.

    Attributes:
        rank: Its number, from 0.
        world_size: Number of processes.
        local_rank: Its number on this machine.
        local_world_size: Number of processes on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Processes":
        """Read from torchrun's environment variables; a single process without them.

        Raises:
            UserError: A variable is missing or has an invalid value.
        """
        names = {
            "rank": "RANK",
            "world_size": "WORLD_SIZE",
            "local_rank": "LOCAL_RANK",
            "local_world_size": "LOCAL_WORLD_SIZE",
        }
        if "TORCHELASTIC_RUN_ID" not in os.environ and "MASTER_ADDR" not in os.environ:
            _check_alone()
            return cls()
        values = {field: _number_from_environment(name) for field, name in names.items()}
        for place, count in (("rank", "world_size"), ("local_rank", "local_world_size")):
            if values[place] >= values[count]:
                raise UserError(
                    f"environment variable {names[place]} is {values[place]}, and "
                    f"{names[count]} is {values[count]}; ranks count from 0",
                    "start the run with torchrun",
                )
        if values["world_size"] > 1:
            _number_from_environment("MASTER_PORT")
        return cls(**values)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which logs and saves."""
        return self.rank == 0


def _number_from_environment(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise UserError(f"environment variable {name} is {text!r}", "start the run with torchrun")
    return int(text)


def _check_alone() -> None:
    """Several processes that do not know of each other would write into the same run."""
    count = os.environ.get("WORLD_SIZE", "")
    if count.isdecimal() and int(count) > 1:
        raise UserError(
            f"environment variable WORLD_SIZE is {count}, but MASTER_ADDR is not set",
            "start the run with torchrun, or unset WORLD_SIZE to train with one process",
        )


@contextmanager
def process_group(
    processes: Processes, device: torch.device, *, records_steps: bool = False
) -> Iterator[None]:
    """Join the other processes, by the backend for their device; a no-op for one.

    A UserError in one process ends the others with the same UserError; otherwise they would only
    report that the process is gone.

    After an error, a group of NCCL stays until the process ends, and is aborted there. Destroying
    it would wait for the other processes, which may wait for this one, so that nobody ever sees the
    error ("Shutdown" in PyTorch's documentation of torch.distributed).

    All users of the group, such as a DistributedDataParallel, must be out of scope at the end.
    gloo's threads end only with the last user, and a thread that still owns a Python tensor while
    the interpreter shuts down aborts the process (see PyTorch's pull request 179291).

    Args:
        processes: All of them.
        device: Where this one trains.
        records_steps: Whether NCCL's operations are to be recorded in CUDA graphs.

    Raises:
        UserError: This process is in a group already.
    """
    if processes.world_size == 1:
        yield
        return
    if dist.is_initialized():
        raise UserError(
            "this process is already in a process group: the script formed one, or an earlier "
            "training ended with an error",
            "do not call init_process_group yourself; after an error, start the script again",
        )
    # torch.distributed.nn binds the current group as default arguments at import. A later import,
    # by DistributedDataParallel, would keep this group for ever.
    importlib.import_module("torch.distributed.nn.functional")
    _check_backend(device.type)
    _form_group(device, records_steps)
    must_abort = False
    try:
        yield
    except BaseException as error:
        must_abort = device.type == "cuda"
        traceback.clear_frames(error.__traceback__)  # their variables may use the group
        if isinstance(error, UserError):
            _post_cause(error)
        elif isinstance(error, RuntimeError) and (cause := _posted_cause()) is not None:
            raise cause from None
        raise
    finally:
        gc.collect()
        if must_abort:
            atexit.register(_abort_group)  # by then, the error has been shown
        else:
            dist.destroy_process_group()


def _form_group(device: torch.device, records_steps: bool) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        with _no_error_handling() if records_steps else nullcontext():
            dist.init_process_group("nccl", device_id=device)
    elif device.type == "xpu":
        torch.xpu.set_device(device)
        dist.init_process_group("xccl")
    else:
        dist.init_process_group("gloo")


@contextmanager
def _no_error_handling() -> Iterator[None]:
    """A group of NCCL that is formed inside ends no process by itself.

    PyTorch's notes on CUDA graphs require it of a group whose operations are recorded. torchrun
    asks for the opposite, so the variable is there and must be replaced.
    """
    before = os.environ.get(ASYNC_ERROR_HANDLING)
    os.environ[ASYNC_ERROR_HANDLING] = "0"
    try:
        yield
    finally:
        del os.environ[ASYNC_ERROR_HANDLING]
        if before is not None:
            os.environ[ASYNC_ERROR_HANDLING] = before


def _abort_group() -> None:
    """Abort the group of all processes. Ends this process by SIGALRM if that takes too long."""
    group = dist.group.WORLD
    assert group is not None
    # A thread could not start while the interpreter ends, nor a handler run during a call of NCCL.
    signal.alarm(ABORT_SECONDS)
    group.abort()
    dist.destroy_process_group()  # which waits for nobody now
    signal.alarm(0)


def _check_backend(device_type: str) -> None:
    backend = BACKENDS[device_type]
    if not dist.is_backend_available(backend):
        raise UserError(
            f"processes on {device_type} need {backend}, which PyTorch {torch.__version__} lacks",
            "install a PyTorch build with it, or set accelerator to cpu",
        )


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """The maximum of each value over all processes, in fp32.

    Several processes wait for the device, once, and must all call it at the same point.
    """
    if not dist.is_initialized():
        return [float(value) for value in values]
    # Filled there: a copy from the host would be waited for too.
    filled = [torch.full((), value, dtype=torch.float32, device=device) for value in values]
    numbers: list[float] = share_largest(torch.stack(filled)).tolist()
    return numbers


def share_largest(numbers: Tensor) -> Tensor:
    """Replace numbers on the device by their maximum over all processes, and return them.

    Does not wait for the device. All processes must call it at the same point.
    """
    if dist.is_initialized():
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in order of rank; meant for a few plain values.

    All processes must call it at the same point.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers, such as the running statistics of batch norms, to all processes.

    All processes must call it at the same point. Buffers of one dtype travel together.
    """
    if not dist.is_initialized():
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        together = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(together, src=0)
        pieces = together.split([buffer.numel() for buffer in buffers])
        for buffer, piece in zip(buffers, pieces, strict=True):
            buffer.copy_(piece.view_as(buffer))


def is_first_to_report(text: str) -> bool:
    """Whether this is the first process of this start to report a text. Marks it as reported.

    The processes need not have formed a group yet. If something other than torchrun started them,
    they do not know of each other, and each one is the first.
    """
    board = _board()
    return board is None or board.add(f"reported/{text}", 1) == 1


def value_of_first_process(key: str, value: str, processes: Processes) -> str:
    """Rank 0's value of a text, for all processes to use instead of their own.

    All processes must call it, once per key. They need not have formed a group yet. If something
    other than torchrun started them, each one keeps its own value.

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
            f"rank 0 has not reported its {key} in {FIRST_PROCESS_TIMEOUT.seconds // 60} minutes",
            "find out what delays it, and start again",
        ) from None
    return board.get(f"value/{key}").decode()


def _post_cause(error: UserError) -> None:
    board = _board()
    if board is not None:
        # Keep the first cause; later errors may only be its consequences.
        board.compare_set("cause", "", json.dumps([error.fault, error.cure]))


def _posted_cause() -> UserError | None:
    board = _board()
    if board is None or not board.check(["cause"]):
        return None
    return UserError(*json.loads(board.get("cause")))


def _board() -> dist.Store | None:
    """A store that all processes can read and write, whatever the state of their group.

    It is the store of torchrun itself, which outlives the processes; None without torchrun.
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
