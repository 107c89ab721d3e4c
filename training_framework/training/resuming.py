"""What a checkpoint holds of a run beside its steps, and how a run takes all of it over."""

from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

from training_framework.checkpoint import CheckpointKeeper
from training_framework.data import ForeignLoader, Loader
from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError, shown
from training_framework.machine.randomness import random_states, restore_random_states
from training_framework.plan import PlannedRun, TrainPlan
from training_framework.runs.progress import EpochRecord, Progress
from training_framework.runs.start import Start
from training_framework.training.parts import Parts

__all__ = ["checkpoint_extras", "open_keeper", "restore", "restore_draws", "training_data"]


def training_data(facts: DatasetFacts, plan: TrainPlan) -> dict[str, Any]:
    """What a checkpoint holds of the training data: with other numbers its position is another."""
    return {"training images": facts.train_images, "batches an epoch": plan.batches_per_epoch}


def checkpoint_extras(planned: PlannedRun, network: dict[str, Any]) -> dict[str, Any]:
    """What every checkpoint of a run holds alike.

    Args:
        planned: The run's plan, and what it rests on.
        network: Plain values of the network's card.
    """
    return {
        # What resumes the run neither resumes from nor stops where this start did.
        "config": {**planned.settings, "resume": "auto", "stop_after_steps": None},
        "network": network,
        "data": training_data(planned.facts, planned.plan),
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
        own = loader.state_dict() if isinstance(loader, ForeignLoader) else None
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
    """Take a checkpoint's state over, and return where the run stands.

    Raises:
        UserError: It does not fit the network, the optimizer or what a run's state looks like.
    """
    state = start.state
    if state is None:
        return Progress()
    try:
        # Sums are added up over the ranks before they are read, so one rank takes them over.
        parts.step.load_state_dict(state, with_sums=is_first)
        progress = _progress(state["progress"])
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unfit(start, error) from None
    if progress.batch >= parts.plan.batches_per_epoch and progress.unlogged is None:
        # With other settings an epoch may have fewer batches than were made of it.
        progress.epoch, progress.batch = progress.epoch + 1, 0
    return progress


def restore_draws(start: Start, *, loader: Loader, device: torch.device) -> None:
    """Set Python's, NumPy's and PyTorch's generators to where the run had them.

    A user's own loader will begin the epoch under way as it had begun. Several processes all take
    the generators of the first one, which they had begun alike.

    Raises:
        UserError: The checkpoint's states are none.
    """
    state = start.state
    if state is None:
        return
    try:
        if state.get("random") is not None:
            restore_random_states(state["random"], device)
        if state.get("loader") is not None and isinstance(loader, ForeignLoader):
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
    """The progress that a checkpoint holds, checked in all that is computed with or shown later.

    Raises:
        TypeError, ValueError: It is none.
    """
    progress = Progress(**values)
    _check_fields(progress)
    for record in progress.epochs:
        _check_fields(EpochRecord(**record))
    if progress.last and progress.last.keys() != {"val/loss", "val/acc1", "val/acc5"}:
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
