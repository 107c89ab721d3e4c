"""What a checkpoint holds besides the state of the step, and how a run restores all of it."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

from training_framework.checkpoint import CheckpointKeeper
from training_framework.data import Loader, UserLoader
from training_framework.errors import UserError, shown
from training_framework.machine.distributed import gathered
from training_framework.machine.randomness import random_states, restore_random_states
from training_framework.plan import PlannedRun, TrainPlan, resumed_plan
from training_framework.plan.resumption import FREE_FIELDS
from training_framework.runs.directory import next_version
from training_framework.runs.identity import identity_of
from training_framework.runs.progress import TTA_COLUMN, EpochRecord, Progress
from training_framework.runs.start import Start, changed_settings
from training_framework.training.parts import Parts

__all__ = [
    "checkpoint_extras",
    "open_keeper",
    "plan_resumption",
    "refuse_different_plans",
    "restore",
    "restore_draws",
]


class _EpochShape(NamedTuple):
    """What determines a run's number of steps."""

    batches: int
    accumulate: int

    @property
    def steps(self) -> int:
        return math.ceil(self.batches / self.accumulate)


def _shape_of(plan: TrainPlan) -> _EpochShape:
    return _EpochShape(plan.batches_per_epoch, plan.accumulate_grad_batches)


def _shape_in(state: Mapping[str, Any]) -> _EpochShape | None:
    """The shape of a checkpoint's run, if the checkpoint holds it."""
    batches = identity_of(state).get("batches an epoch")
    # The plan's: `tune` or a switch may have chosen another value than the settings asked for.
    accumulate: Any = 1
    for kept in (state["config"], state.get("plan")):  # the plan is checked later: it may be forged
        if isinstance(kept, Mapping):
            accumulate = kept.get("accumulate_grad_batches", accumulate)
    if type(batches) is not int or type(accumulate) is not int or min(batches, accumulate) < 1:
        return None
    return _EpochShape(batches, accumulate)


def refuse_different_plans(plan: TrainPlan) -> None:
    """Refuse to train together on different plans; under torchrun they cannot differ.

    All processes must call it at the same point.

    Raises:
        UserError: One of the processes chose differently.
    """
    plans = gathered({k: v for k, v in plan.as_dict().items() if k not in FREE_FIELDS})
    for key in plans[0]:
        values = list(dict.fromkeys(str(values[key]) for values in plans))
        if len(values) > 1:
            raise UserError(
                f"the processes planned differently: {key} is {' and '.join(values)}",
                f"set {key} for all of them, or start them with torchrun",
            )


def plan_resumption(planned: PlannedRun, start: Start) -> tuple[PlannedRun, Start]:
    """The plan with which to resume, and where. All processes must call it at the same point.

    The plan is the checkpoint's. If an epoch now has another number of steps, which needs
    `allow_config_change`, the run continues in a new directory: rows and checkpoints count steps,
    and those with the old count stay as they are.

    Raises:
        UserError: This machine cannot do what the plan says.
    """
    state = start.state
    if state is None:
        return planned, start
    values, lines = state.get("plan"), list(start.lines)
    if isinstance(values, dict):
        plan, more = _agreed_plan(planned, start, values)
        planned, lines = dataclasses.replace(planned, plan=plan), [*lines, *more]
    else:
        lines.append(
            "note: the checkpoint is from an older version and holds no plan, so everything left "
            "to the plan is decided anew"
        )
    then, now = _shape_in(state), _shape_of(planned.plan)
    if then not in (None, now):
        assert then is not None
        lines.append(
            f"note: an epoch had {then.steps:,} steps and now has {now.steps:,}: the run continues "
            "after the same share of it, in a new run directory"
        )
        parent = planned.plan.output_dir / planned.plan.name
        start = dataclasses.replace(start, directory=None, version=next_version(parent))
    return planned, dataclasses.replace(start, lines=tuple(lines))


def _agreed_plan(
    planned: PlannedRun, start: Start, values: Mapping[str, Any]
) -> tuple[TrainPlan, list[str]]:
    """The resumed plan, or the refusal, of the first process: its machine decides for all."""
    found: tuple[TrainPlan, list[str]] | None = None
    refusal: tuple[str, str] | None = None
    if planned.processes.is_first:
        try:
            found = resumed_plan(
                planned.plan,
                values,
                planned.hardware,
                changed=changed_settings(start, planned),
                where=str(start.checkpoint),
            )
        except UserError as error:
            refusal = error.fault, error.cure
    found, refusal = gathered((found, refusal))[0]
    if found is None:
        assert refusal is not None
        raise UserError(*refusal)
    return found


def checkpoint_extras(
    planned: PlannedRun, network: dict[str, Any], identity: Mapping[str, Any]
) -> dict[str, Any]:
    """What is the same in every checkpoint of a run.

    Args:
        planned: The run's plan, and what it rests on.
        network: Plain values of the network's card.
        identity: What `run_identity` says of the run.
    """
    return {
        # A resumption must neither resume from nor stop at the same place as this start.
        "config": {**planned.settings, "resume": "auto", "stop_after_steps": None},
        "plan": planned.plan.as_dict(),
        "network": network,
        "identity": dict(identity),
        "total_steps": planned.plan.total_steps,
    }


def open_keeper(directory: Path, parts: Parts) -> CheckpointKeeper:
    """What keeps a run's checkpoints, with the states of all generators in each.

    Args:
        directory: The run's.
        parts: The run's; a user's own loader has generators too.
    """
    plan, loader = parts.plan, parts.loaders.train

    def draws() -> dict[str, Any]:
        own = loader.state_dict() if isinstance(loader, UserLoader) else None
        return {"random": random_states(parts.device), "loader": own}

    return CheckpointKeeper(
        directory / "checkpoints",
        prefix=plan.model,
        keep=plan.save_top_k,
        every_n_steps=plan.save_every_n_steps,
        every_seconds=plan.save_every_seconds,
        more_state=draws,
    )


def restore(start: Start, parts: Parts, *, is_first: bool) -> Progress:
    """Restore a checkpoint's state, and return the run's progress.

    Raises:
        UserError: The state does not fit the network or the optimizer, or is not a run's state.
    """
    state = start.state
    if state is None:
        return Progress()
    try:
        # Sums are added up over the ranks before they are read, so only one rank restores them.
        parts.step.load_state_dict(state, with_sums=is_first)
        progress = _progress(state["progress"])
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unfit(start, error) from None
    progress = _converted(progress, start, parts.plan)
    if progress.batch >= parts.plan.batches_per_epoch and progress.unlogged is None:
        # With other settings an epoch may have fewer batches than are already done.
        progress.epoch, progress.batch = progress.epoch + 1, 0
    return progress


def _converted(progress: Progress, start: Start, plan: TrainPlan) -> Progress:
    """The progress in this plan's steps, at the same share of the schedule and of the epoch.

    Raises:
        UserError: The run has already made more than these settings ask for.
    """
    assert start.state is not None
    then, now = _shape_in(start.state), _shape_of(plan)
    if then not in (None, now):
        assert then is not None
        batch = math.floor(progress.batch / then.batches * now.batches + 1e-9)
        if batch < now.batches:
            batch -= batch % now.accumulate
        steps = progress.epoch * now.steps + math.ceil(batch / now.accumulate)
        progress = dataclasses.replace(progress, step=steps, batch=batch, unlogged=None)
    if progress.step > plan.total_steps or progress.epoch > math.ceil(plan.epochs):
        raise UserError(
            f"{start.checkpoint}: its run is at step {progress.step:,}, in epoch "
            f"{progress.epoch + 1:,}, and a run with these settings has {plan.total_steps:,} steps "
            f"in {plan.epochs:,} epoch(s)",
            "raise epochs, or start anew with --resume never",
        )
    return progress


def restore_draws(start: Start, *, loader: Loader, device: torch.device) -> None:
    """Set the generators of Python, NumPy and PyTorch to the states that the run had.

    A user's own loader will start the current epoch as it did before. Several processes all take
    the states of the first one, since all had started with the same.

    Raises:
        UserError: The checkpoint does not hold valid states.
    """
    state = start.state
    if state is None:
        return
    try:
        if state.get("random") is not None:
            restore_random_states(state["random"], device)
        if state.get("loader") is not None and isinstance(loader, UserLoader):
            loader.load_state_dict(state["loader"])
    except (RuntimeError, ValueError, TypeError, LookupError, OverflowError) as error:
        raise _unfit(start, error) from None


def _unfit(start: Start, error: Exception) -> UserError:
    reason = next(iter(reversed(str(error).strip().splitlines())), type(error).__name__).strip()
    return UserError(
        f"{start.checkpoint}: does not fit this run's network or optimizer ({reason})",
        "resume with the configuration that it was trained with",
    )


def _progress(values: dict[str, Any]) -> Progress:
    """The progress that a checkpoint holds; everything that is used later is checked.

    Raises:
        TypeError, ValueError: It is not a valid progress.
    """
    progress = Progress(**values)
    _check_fields(progress)
    for record in progress.epochs:
        _check_fields(EpochRecord(**record))
    if progress.last and progress.last.keys() - {TTA_COLUMN} != {
        "val/loss",
        "val/acc1",
        "val/acc5",
    }:
        raise ValueError(f"progress: last has {shown(list(progress.last))}")
    if (progress.best_acc1 is None) != (progress.best_acc5 is None):
        raise ValueError("progress: best_acc1 without best_acc5, or the other way round")
    return progress


def _check_fields(values: Progress | EpochRecord) -> None:
    for name, kind in get_type_hints(type(values)).items():
        value = getattr(values, name)
        try:
            TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError:
            raise TypeError(f"progress: {name} is {shown(value)}") from None
        if isinstance(value, (int, float)) and value < 0:
            raise ValueError(f"progress: {name} is negative")
