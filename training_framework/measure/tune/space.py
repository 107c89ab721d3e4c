"""What `tune` varies for one configuration on one machine."""

from collections.abc import Iterator, Sequence
from typing import Any

from training_framework.config import TrainConfig
from training_framework.config.names import nearest
from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError
from training_framework.machine.hardware import Hardware
from training_framework.measure.tune.search import Dimension
from training_framework.plan import TrainPlan

__all__ = ["tuning_space"]

SMALLEST_BATCH = 8
MOST_LOADER_PROCESSES = 8
COMPILE_MODES_ON_CUDA = ("default", "reduce-overhead")

Value = tuple[str, dict[str, Any]]


def tuning_space(
    config: TrainConfig,
    plan: TrainPlan,
    hardware: Hardware,
    facts: DatasetFacts,
    *,
    allow_batch_change: bool = False,
    keep: Sequence[str] = (),
) -> list[Dimension]:
    """The dimensions, each beginning with the plan's own choice; those with no other are left out.

    Values that this machine can only emulate are left out: they need no trial.

    Args:
        config: What is tuned.
        plan: What it comes to here.
        hardware: The machine.
        facts: Of the data set.
        allow_batch_change: Also try other numbers of images for an optimizer step.
        keep: Keys of the configuration that stay as they are.

    Raises:
        UserError: A key to keep is unknown.
    """
    for key in keep:
        if key not in TrainConfig.model_fields:
            raise UserError(f"--keep: unknown key {key!r}", nearest(key))
    on_cpu = plan.device == "cpu"
    found: dict[str, Iterator[Value]] = {
        "precision": _precisions(plan, hardware),
        "batch": _batches(config, facts, allow_batch_change),
        "compile": _compilation(config, plan),
        "loading": _loading(config, plan, hardware, facts),
        "memory format": _switch("channels_last", "channels last", plan.channels_last),
        "threads": _threads(plan, hardware) if on_cpu else iter(()),
        "small-map convolutions": _switch(
            "small_map_convolutions", "small-map convolutions", plan.small_map_convolutions
        ) if on_cpu else iter(()),
        "winograd convolutions": _switch(
            "winograd_convolutions", "winograd convolutions", plan.winograd_convolutions
        ) if on_cpu and hardware.cpp_compiler else iter(()),
        "kept memory": _switch("keep_memory", "kept memory", plan.keep_memory)
        if on_cpu and hardware.glibc else iter(()),
        "fused norms": _switch("fused_norms", "fused norms", plan.fused_norms)
        if on_cpu and hardware.cpp_compiler else iter(()),
        "fused optimizer": _switch("fused_optimizer", "fused optimizer", plan.fused_optimizer),
    }  # fmt: skip
    dimensions = []
    for name, values in found.items():
        allowed = [value for value in values if not set(value[1]) & set(keep)]
        if allowed:
            dimensions.append(Dimension(name=name, values=(("as planned", {}), *allowed)))
    return dimensions


def _switch(key: str, name: str, planned: bool) -> Iterator[Value]:
    yield f"{'no ' if planned else ''}{name}", {key: not planned}


def _precisions(plan: TrainPlan, hardware: Hardware) -> Iterator[Value]:
    known = ["32"]
    if plan.device == "cpu":
        known += ["bf16-mixed"] if hardware.cpu_bf16_pays else []
    else:
        known += ["bf16-mixed"] if hardware.usable[0].bf16 else []
        known += ["16-mixed"] if plan.device == "cuda" else []
    for precision in known:
        if precision != plan.precision:
            yield f"precision {precision}", {"precision": precision}


def _batches(config: TrainConfig, facts: DatasetFacts, allow_change: bool) -> Iterator[Value]:
    """The same images for each step in fewer or more batches; with leave, other numbers of them."""
    effective = config.batch_size * config.accumulate_grad_batches
    for accumulate in (1, 2, 4, 8):
        batch, rest = divmod(effective, accumulate)
        fits = SMALLEST_BATCH <= batch <= facts.train_images
        if not rest and fits and accumulate != config.accumulate_grad_batches:
            name = f"batch {batch}" + (f" x {accumulate}" if accumulate > 1 else "")
            yield name, {"batch_size": batch, "accumulate_grad_batches": accumulate}
    if not allow_change:
        return
    for batch in (effective // 2, 2 * effective, 4 * effective):
        if SMALLEST_BATCH <= batch <= facts.train_images:
            yield (
                f"batch {batch}, not {effective}, a step",
                {"batch_size": batch, "accumulate_grad_batches": 1},
            )


def _compilation(config: TrainConfig, plan: TrainPlan) -> Iterator[Value]:
    if plan.compile:
        yield "no compile", {"compile": False, "compile_mode": None}
    recordable = plan.device == "cuda" and plan.world_size == 1 and plan.fused_optimizer
    if recordable and config.accumulate_grad_batches == 1 and plan.precision != "16-mixed":
        graph = {"compile": False, "compile_mode": None, "cuda_graph": True}
        yield "CUDA graph", graph
        yield "compile, CUDA graph", {**graph, "compile": True, "compile_mode": "default"}
    modes = COMPILE_MODES_ON_CUDA if plan.device == "cuda" else ("default",)
    for mode in modes:
        if not (plan.compile and plan.compile_mode == mode):
            yield f"compile {mode}", {"compile": True, "compile_mode": mode}


def _loading(
    config: TrainConfig, plan: TrainPlan, hardware: Hardware, facts: DatasetFacts
) -> Iterator[Value]:
    """Where the data lies, and how many processes load it."""
    if facts.storage not in ("arrays", "files"):
        return
    if facts.storage == "arrays" and not plan.resident_data:
        yield "resident data", {"resident_data": True}
    for workers in (0, 1, 2, 4, 8):
        enough = workers <= min(hardware.cores, MOST_LOADER_PROCESSES)
        if not enough or (not plan.resident_data and workers == plan.num_workers):
            continue
        settings: dict[str, Any] = {"num_workers": workers}
        if facts.storage == "arrays" and config.resident_data is not False:
            settings["resident_data"] = False
        yield f"{workers} loader process{'' if workers == 1 else 'es'}", settings


def _threads(plan: TrainPlan, hardware: Hardware) -> Iterator[Value]:
    cores = hardware.cores
    for threads in dict.fromkeys((cores, cores * 3 // 4, cores // 2, cores // 4)):
        if threads >= 1 and threads != plan.threads:
            yield f"{threads} thread{'' if threads == 1 else 's'}", {"threads": threads}
