"""Switches for processes and threads."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from training_framework.models import synchronize_norms
from training_framework.switches.switch import Card, Decision, Network, Situation, Switch, Trial

__all__ = ["PROCESSES"]


def _sync_batchnorm(situation: Situation) -> Decision:
    wanted = situation.config.sync_batchnorm
    if wanted and situation.world_size == 1:
        return Decision(False, "one process: nothing to synchronize")
    return Decision(wanted)


def _synchronize(model: nn.Module, network: Network) -> None:
    synchronize_norms(model, network.device_type)


SYNC_BATCHNORM = Switch(
    key="sync_batchnorm",
    name="synchronized batch norm",
    numbers="different",
    choose=_sync_batchnorm,
    change_network=_synchronize,
    card=Card(
        use="Several processes with few images each (below about 16), or results that must not "
        "depend on the number of processes.",
        price="Two small messages between all processes for each norm and step. On CUDA the host "
        "also waits for the device in each norm (PyTorch issue 78656).",
        failure="With one process there is nothing to synchronize. It turns fused_norms off.",
        source="PyTorch documentation of torch.nn.SyncBatchNorm",
    ),
)


def _threads(situation: Situation) -> Decision:
    wanted, hardware = situation.config.threads, situation.hardware
    if wanted != "auto":
        threads, why = wanted, "asked for"
    else:
        threads = hardware.cores_each(situation.local_world_size)
        shared = "" if hardware.own_cores else f", {situation.local_world_size} process(es)"
        why = f"{hardware.cores} cores{shared}"
    limit = hardware.thread_limit
    if limit is not None and threads > limit:
        return Decision(limit, f"OMP_THREAD_LIMIT allows no more ({threads}: {why})")
    return Decision(threads, why)


def _thread_trials(situation: Situation) -> Iterator[Trial]:
    if situation.on_gpu:
        return
    cores = situation.hardware.cores
    for threads in dict.fromkeys((cores, cores * 3 // 4, cores // 2, cores // 4)):
        if threads >= 1 and threads != situation.chosen["threads"]:
            yield Trial(f"{threads} thread{'' if threads == 1 else 's'}", {"threads": threads})


def _set_threads(value: Any, device_type: str) -> None:
    torch.set_num_threads(value)


THREADS = Switch(
    key="threads",
    name="threads",
    numbers="rounding",
    choose=_threads,
    set_up_process=_set_threads,
    dimension="threads",
    trials=_thread_trials,
    card=Card(
        use="A CPU whose cores are shared: between processes, with other programs, or in pairs as "
        "hyper-threads.",
        price="None.",
        failure="More threads than cores make every step wait for the slowest. Sums are added in "
        "another order with another number of threads.",
        source="PyTorch documentation of torch.set_num_threads",
    ),
)

PROCESSES = (SYNC_BATCHNORM, THREADS)
