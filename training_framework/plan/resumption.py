"""The plan of a resumed run: its checkpoint's plan, as far as this machine can carry it out."""

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from training_framework.config import TrainConfig
from training_framework.errors import UserError
from training_framework.machine.hardware import Hardware
from training_framework.optimizers import has_fused_optimizer
from training_framework.plan.train_plan import TrainPlan
from training_framework.switches import Choice

__all__ = ["FREE_FIELDS", "resumed_plan"]

MAX_THREADS = 4096
_AS_BEFORE = "as its run had decided"
# Fields of the plan that do not affect the training's numbers: decided anew at each start.
FREE_FIELDS = frozenset(
    {
        "allow_config_change", "asked_for", "auto_micro_batch", "choices", "device_indices",
        "device_name", "evaluation_interval_steps", "keep_memory", "log_every_n_steps", "name",
        "num_workers", "on_bad_image", "output_dir", "pin_memory", "prefetch_factor",
        "resident_data", "resume", "save_every_n_steps", "save_every_seconds", "save_top_k",
        "stop_after_steps", "tensorboard", "tta", "weights",
    }
)  # fmt: skip
# Fields that change with the number of processes.
_OF_PROCESSES = (
    "cuda_graph", "device_batch_size", "evaluation_batch_size", "fused_norms", "sync_batchnorm",
    "threads", "world_size",
)  # fmt: skip
# The machine's choices depend on these settings: if one differs, all choices are made anew.
_DECISIVE = frozenset(
    {
        "accelerator", "channels_last", "compile", "cuda_graph", "img_size", "model", "optimizer",
        "precision", "stem",
    }
)  # fmt: skip
# If one of these differs, the data differs, and what follows from it is decided anew.
_OF_DATA = ("batches_per_epoch", "image_size", "num_classes")


# What runs did before the plan had these fields, where a new run may choose otherwise.
_BEFORE_THE_FIELD = {"bf16_products": False}


class _Obstacle(NamedTuple):
    """A part of the run's plan that cannot be done here, its fields, and the cure."""

    fault: str
    fields: tuple[str, ...]
    cure: str


def resumed_plan(
    fresh: TrainPlan,
    values: Mapping[str, Any],
    hardware: Hardware,
    *,
    changed: Collection[str],
    where: str,
) -> tuple[TrainPlan, list[str]]:
    """Take every choice from a run's earlier plan; none is made again.

    Args:
        fresh: What would be decided now.
        values: The plan in the checkpoint, as `TrainPlan.as_dict` gives it.
        hardware: This machine.
        changed: Keys of settings that differ from the run's. The new values are used, and so are
            the choices that follow from them; the machine's choices stay.
        where: Name of the checkpoint in messages.

    Returns:
        The plan to resume with, and lines to show the user.

    Raises:
        UserError: The machine cannot do what the plan says and `allow_config_change` is off, or
            the checkpoint does not hold a valid plan.
    """
    known = {field.name for field in dataclasses.fields(TrainPlan)}
    try:  # a plan of another version may lack a field, and have others
        own = {key: value for key, value in values.items() if key in known}
        then = TrainPlan.from_dict({**fresh.as_dict(), **_BEFORE_THE_FIELD, **own})
        if not 1 <= then.threads <= MAX_THREADS:
            raise ValueError(f"{then.threads} threads")
    except ValueError:
        raise UserError(
            f"{where}: its plan is damaged", "take another checkpoint, or start anew"
        ) from None
    obstacles = list(_obstacles(then, fresh, hardware))
    if obstacles and not fresh.allow_config_change:
        faults = ", ".join(obstacle.fault for obstacle in obstacles)
        cures = " and ".join(dict.fromkeys(obstacle.cure for obstacle in obstacles))
        raise UserError(
            f"{where}: this machine cannot continue the run as planned: {faults}",
            f"{cures}, or resume with --allow-config-change",
        )
    anew = {field for obstacle in obstacles for field in obstacle.fields}
    plan = _merged(fresh, then, anew=anew, changed=changed)
    return plan, _lines(fresh, then, plan, hardware)


def _obstacles(then: TrainPlan, fresh: TrainPlan, hardware: Hardware) -> Iterator[_Obstacle]:
    if then.world_size != fresh.world_size:
        yield _Obstacle(
            f"it trained in {then.world_size} process(es), and there are {fresh.world_size} now",
            _OF_PROCESSES,
            f"start {then.world_size} process(es)"
            + (f" (torchrun --nproc-per-node={then.world_size})" if then.world_size > 1 else ""),
        )
    if then.device != fresh.device:
        # Choices for one kind of device are not right for another.
        machine = tuple(field.name for field in dataclasses.fields(TrainPlan))
        yield _Obstacle(
            f"it trained on {then.device} and this run is on {fresh.device}",
            machine,
            f"resume on a machine with {then.device}",
        )
    kernels = ("winograd_convolutions", "fused_norms")
    compiled = tuple(key for key in kernels if getattr(then, key) and not getattr(fresh, key))
    if compiled and then.device == "cpu" and not hardware.cpp_compiler:
        yield _Obstacle(
            f"{' and '.join(compiled)}: {hardware.cpp_compiler_fault}",
            (*compiled, "bf16_products"),
            "install a C++ compiler (g++)",
        )
    if then.fused_optimizer and not has_fused_optimizer(then.optimizer, fresh.device):
        yield _Obstacle(
            f"this PyTorch has no fused {then.optimizer} for {fresh.device}",
            ("fused_optimizer",),
            "use the PyTorch that it was trained with",
        )
    gpu = next(iter(hardware.usable), None)
    if then.product_format == "tf32" and fresh.device == "cuda" and gpu and not gpu.tf32:
        yield _Obstacle(
            f"it multiplied in TF32, which {gpu.name} does not have",
            ("fp32_precision",),
            "resume on a GPU of compute capability 8.0 or newer",
        )
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    if limit.isdecimal() and 0 < int(limit) < then.threads:
        yield _Obstacle(
            f"it trained with {then.threads} threads and OMP_THREAD_LIMIT is {limit}",
            ("threads",),
            f"set OMP_THREAD_LIMIT to {then.threads}",
        )


def _merged(
    fresh: TrainPlan, then: TrainPlan, *, anew: Collection[str], changed: Collection[str]
) -> TrainPlan:
    other_data = any(getattr(fresh, key) != getattr(then, key) for key in _OF_DATA)
    if _DECISIVE & set(changed):
        kept = set()
    elif changed or other_data:
        kept = _machine_fields() - set(changed)
    else:
        kept = _machine_fields() | _fields_left_to_the_plan()
        if then.more_switches.keys() == fresh.more_switches.keys():
            kept.add("more_switches")
    values = {key: getattr(then, key) for key in kept if key not in anew}
    return dataclasses.replace(fresh, **values, choices=_reasons(fresh, then, values))


def _reasons(fresh: TrainPlan, then: TrainPlan, values: Mapping[str, Any]) -> tuple[Choice, ...]:
    """The fresh plan's choices, and those of the run where a value of it is kept."""
    kept = {**values, **values.get("more_switches", {})}
    now = {**dataclasses.asdict(fresh), **fresh.more_switches}
    before = {choice.name: choice for choice in then.choices}
    listed = before.keys() | {choice.name for choice in fresh.choices}
    as_before = {
        key: Choice(key, _readable(kept[key]), _as_before(before.get(key)))
        for key in sorted(listed & kept.keys())
        if kept[key] != now.get(key)
    }
    choices = [as_before.pop(choice.name, choice) for choice in fresh.choices]
    return (*choices, *as_before.values())


def _as_before(choice: Choice | None) -> str:
    """The reason for keeping a choice of the run; a second resumption does not lengthen it."""
    if choice is None:
        return _AS_BEFORE
    known = choice.reason.startswith(_AS_BEFORE)
    return choice.reason if known else f"{_AS_BEFORE}: {choice.reason}"


def _fields_left_to_the_plan() -> set[str]:
    """Fields of settings that may be `auto`; the others are as they were asked for."""
    known = {field.name for field in dataclasses.fields(TrainPlan)}
    auto = {key for key, field in TrainConfig.model_fields.items() if field.default == "auto"}
    return (auto & known) - FREE_FIELDS


def _machine_fields() -> set[str]:
    """Fields that the machine decides where nobody asks for a value."""
    of_machine = {
        key
        for key, field in TrainConfig.model_fields.items()
        if isinstance(field.json_schema_extra, dict)
        and field.json_schema_extra["section"] == "machine"
    }
    known = {field.name for field in dataclasses.fields(TrainPlan)}
    return (of_machine & known) - FREE_FIELDS


def _lines(fresh: TrainPlan, then: TrainPlan, plan: TrainPlan, hardware: Hardware) -> list[str]:
    """What stays as in the run although a new run would choose otherwise, and what changes."""
    keys = sorted(_machine_fields() | {"device", "world_size", "stem", "lr"})
    as_before = [
        f"{key} {_readable(getattr(plan, key))} (a new run here: {_readable(getattr(fresh, key))})"
        for key in keys
        if getattr(plan, key) != getattr(fresh, key)
    ]
    otherwise = [
        f"{key} {_readable(getattr(then, key))} -> {_readable(getattr(plan, key))}"
        for key in keys
        if getattr(plan, key) != getattr(then, key)
    ]
    lines = []
    if as_before:
        lines.append(f"note: continues as its run was planned: {', '.join(as_before)}")
    if otherwise:
        lines.append(f"note: differs from its run: {', '.join(otherwise)}")
    if plan.device == "cpu" and plan.threads > hardware.cores:
        lines.append(
            f"note: {plan.threads} threads share {hardware.cores} core(s), which is slow; the "
            "number stays, since another one would round differently"
        )
    return lines


def _readable(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
