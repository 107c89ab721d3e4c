"""Rank 0 of several processes, without the others: for as long as `fake_processes` is entered."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.testing._internal.distributed.fake_pg import FakeStore

from training_framework.machine import distributed
from training_framework.training import cuda_graph, evaluation, parts, stopping


@contextlib.contextmanager
def fake_processes(world_size: int) -> Iterator[None]:
    """The environment of torchrun on one machine, and a group whose collectives do nothing.

    The collectives go through PyTorch's dispatcher, where they are observed.

    DistributedDataParallel is the real one, but for what reads a tensor's content or needs a clock
    of CUDA: the comparison of the processes' parameters, the division into buckets after the first
    step, the statistics of the logger. Its own reduction expects results that a fake group does not
    give, so a hook of the same effect takes its place.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = ("0", str(world_size), "0", str(world_size), "127.0.0.1", "1")
    init_process_group, in_data_parallel = dist.init_process_group, parts.in_data_parallel

    def init(backend: str, *, device_id: torch.device) -> None:
        assert (backend, device_id) == ("nccl", torch.device("cuda:0"))
        init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())

    def averaged(_: None, bucket: dist.GradBucket) -> Future[Tensor]:
        gradients = bucket.buffer().div_(world_size)
        dist.all_reduce(gradients)
        done: Future[Tensor] = Future()
        done.set_result(gradients)
        return done

    def with_hook(*arguments: Any, **options: Any) -> Any:
        parallel = in_data_parallel(*arguments, **options)
        parallel.register_comm_hook(None, averaged)
        return parallel

    def largest(values: Sequence[float], device: torch.device) -> list[float]:
        distributed.largest(values, device)
        return [float(value) for value in values]  # a fake group gives no numbers of others

    def gather(values: list[Any], value: Any) -> None:
        values[:] = [value] * len(values)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, zip(names, values, strict=True)))
        for owner, name, replacement in (
            (dist, "is_backend_available", lambda _: True),
            (dist, "init_process_group", init),
            (dist, "all_gather_object", gather),
            (dist, "_verify_params_across_processes", lambda *_: None),
            (dist.Reducer, "_rebuild_buckets", lambda _: False),
            (dist.Logger, "set_runtime_stats_and_log", lambda _: None),
            (parts, "in_data_parallel", with_hook),
            (cuda_graph, "largest", largest),
            (evaluation, "largest", largest),
            (stopping, "largest", largest),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield
