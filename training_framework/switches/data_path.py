"""Switches for how images get from disk or memory to the device."""

from collections.abc import Iterator
from typing import Any

from training_framework.errors import UserError
from training_framework.switches.switch import (
    Card,
    Decision,
    Situation,
    Switch,
    Trial,
    as_asked,
    off_and_on,
)

__all__ = ["DATA_PATH"]

# The set must leave most of the memory to weights, activations and everything else.
RESIDENT_SHARE_OF_MEMORY = 0.25
MAX_LOADER_WORKERS = 16
MAX_TRIED_WORKERS = 8
LOADED_BY_THE_USER = "your own loader decides how it loads"


def _resident_data(situation: Situation) -> Decision:
    wanted, facts = situation.config.resident_data, situation.facts
    if facts.storage == "loader":
        return Decision(False, LOADED_BY_THE_USER if wanted is True else "")
    if facts.storage == "files":
        if wanted is True:
            raise UserError(
                "resident_data: true needs images held as arrays, and these are files",
                "use resident_data: auto",
            )
        return Decision(False, "image files are decoded by loader processes")
    size = f"{facts.array_bytes / 2**20:,.0f} MB of images"
    if facts.storage == "generated":
        return Decision(True, f"{size} are made on the device, and stay there")
    if wanted != "auto":
        return Decision(wanted, f"asked for; {size}")
    gpu_bytes = situation.accelerators[0].memory_bytes if situation.on_gpu else 0
    memory = gpu_bytes or situation.hardware.memory_bytes // situation.local_world_size
    fits = facts.array_bytes <= RESIDENT_SHARE_OF_MEMORY * memory
    where = f"{memory / 2**30:,.0f} GB of memory"
    return Decision(fits, f"{size} {'fit' if fits else 'do not fit'} {where}")


def _resident_trials(situation: Situation) -> Iterator[Trial]:
    if situation.facts.storage == "arrays" and not situation.chosen["resident_data"]:
        yield Trial("resident data", {"resident_data": True})


RESIDENT_DATA = Switch(
    key="resident_data",
    name="resident data",
    numbers="same",
    choose=_resident_data,
    ablation=off_and_on("resident_data"),
    can_matter=lambda config, facts: facts.storage == "arrays",
    dimension="loading",
    trials=_resident_trials,
    card=Card(
        use="Sets held as arrays that take less than a quarter of the device's memory: after the "
        "start, nothing is loaded or copied.",
        price="The memory that the images take.",
        failure="Image files are decoded by loader processes and cannot be resident.",
        source="K. Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, arXiv 2404.00498",
    ),
)


def _num_workers(situation: Situation) -> Decision:
    wanted = situation.config.num_workers
    if situation.facts.storage == "loader":
        return Decision(0, "" if wanted in ("auto", 0) else LOADED_BY_THE_USER)
    if situation.chosen["resident_data"]:
        useless = wanted not in ("auto", 0)
        return Decision(0, "the data is resident: nothing is left to load" if useless else "")
    if wanted != "auto":
        return Decision(wanted, "asked for")
    cores = situation.hardware.cores_each(situation.local_world_size)
    if situation.on_gpu:
        return Decision(min(cores, MAX_LOADER_WORKERS), f"{cores} cores for each process")
    return Decision(1, "the step needs the cores and is slower")


def _worker_trials(situation: Situation) -> Iterator[Trial]:
    chosen, storage = situation.chosen, situation.facts.storage
    if storage not in ("arrays", "files"):
        return
    for workers in (0, 1, 2, 4, 8):
        enough = workers <= min(situation.hardware.cores, MAX_TRIED_WORKERS)
        planned = not chosen["resident_data"] and workers == chosen["num_workers"]
        if not enough or planned:
            continue
        settings: dict[str, Any] = {"num_workers": workers}
        if storage == "arrays" and situation.config.resident_data is not False:
            settings["resident_data"] = False
        yield Trial(f"{workers} loader process{'' if workers == 1 else 'es'}", settings)


NUM_WORKERS = Switch(
    key="num_workers",
    name="loader processes",
    numbers="same",
    choose=_num_workers,
    dimension="loading",
    trials=_worker_trials,
    card=Card(
        use="Images are decoded while the device computes. `profile` shows the time a step waits "
        "for data.",
        price="Memory, and cores that a CPU run needs for its steps.",
        failure="With resident data there is nothing to load.",
        source="PyTorch documentation of torch.utils.data",
    ),
)

PREFETCH_FACTOR = Switch(
    key="prefetch_factor",
    name="prefetching",
    numbers="same",
    choose=as_asked("prefetch_factor"),
    card=Card(
        use="The time to load a batch varies: a queue of batches keeps the device busy.",
        price="Host memory for that many batches of each loader process.",
        failure="It does not help if loading is slower than the step on average.",
        source="PyTorch documentation of torch.utils.data",
    ),
)


def _pin_memory(situation: Situation) -> Decision:
    wanted = situation.config.pin_memory
    if situation.facts.storage == "loader":
        return Decision(False, LOADED_BY_THE_USER if wanted is True else "")
    if wanted == "auto":
        return Decision(situation.on_cuda and not situation.chosen["resident_data"])
    if wanted and not situation.on_cuda:
        return Decision(False, "no CUDA device to copy to")
    return Decision(wanted)


PIN_MEMORY = Switch(
    key="pin_memory",
    name="pinned memory",
    numbers="same",
    choose=_pin_memory,
    card=Card(
        use="Batches go from host memory to a CUDA GPU: the copy runs beside the computation.",
        price="Host memory that the system cannot swap out.",
        failure="Without a CUDA GPU, or with resident data, there is nothing to copy.",
        source="PyTorch documentation, CUDA semantics: use pinned memory buffers",
    ),
)

DATA_PATH = (RESIDENT_DATA, NUM_WORKERS, PREFETCH_FACTOR, PIN_MEMORY)
