"""Whether two runs did the same, bit for bit, and where they first differ."""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training_framework.checkpoint import load_checkpoint
from training_framework.errors import shown
from training_framework.loggers import COLUMNS

__all__ = ["MEASURED_COLUMNS", "RunComparison", "compare_rows", "compare_runs", "compare_states"]

MEASURED_COLUMNS = frozenset({"images_per_second", "data_wait", "memory", "mfu", "eval_seconds"})
"""Columns that measure speed and memory, and so differ from run to run."""

# `images` only counts images of timed steps, and a stop removes some steps from the timing.
_MEASURED = MEASURED_COLUMNS | {
    "epoch_seconds", "epoch_evaluation_seconds", "train_seconds", "images", "seconds",
    "evaluation_seconds",
}  # fmt: skip
# The run's name and folder differ, so we compare what the settings led to instead.
_IGNORED_PARTS = frozenset({"config", "plan"})
_NAMES = {
    "model": "weights and buffers",
    "average": "weight average",
    "optimizer": "optimizer state",
    "scaler": "gradient scaler",
    "sums": "metrics under way",
    "progress": "progress and sample order",
}


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """What was compared, and what differed.

    Attributes:
        compared: One line for each part that was compared: its name, and its size.
        differences: One line for each part that differs, the logged rows first: where it first
            differs, and by how much. Empty if the runs are equal bit for bit.
    """

    compared: tuple[str, ...]
    differences: tuple[str, ...]


def compare_runs(straight: Path, other: Path) -> RunComparison:
    """Compare the logged rows and the newest checkpoints of two run directories.

    Raises:
        UserError: A checkpoint is missing or damaged.
    """
    rows, states = [], []
    for directory in (straight, other):
        with (directory / "metrics.csv").open(encoding="utf-8", newline="") as file:
            rows.append(list(csv.DictReader(file)))
        states.append(load_checkpoint(directory / "checkpoints" / "last.ckpt"))
    logged, final = compare_rows(*rows), compare_states(*states)
    return RunComparison(
        compared=logged.compared + final.compared,
        differences=logged.differences + final.differences,
    )


def compare_rows(rows: list[dict[str, str]], others: list[dict[str, str]]) -> RunComparison:
    """Compare the rows of two metrics.csv, except the columns that measure time and memory."""
    columns = [name for name in COLUMNS if name not in MEASURED_COLUMNS]
    differences = [
        f"step {row.get('step')}: {name} is {row.get(name) or 'empty'} straight and "
        f"{other.get(name) or 'empty'} resumed"
        for row, other in zip(rows, others, strict=False)
        for name in columns
        if row.get(name) != other.get(name)
    ]
    if len(rows) != len(others):
        differences.append(f"{len(rows)} rows straight and {len(others)} resumed")
    return RunComparison(
        compared=(f"metrics.csv: {len(rows)} rows of {len(columns)} columns",),
        differences=tuple(f"metrics.csv: {line}" for line in differences[:1]),
    )


def compare_states(state: Mapping[str, Any], other: Mapping[str, Any]) -> RunComparison:
    """Compare what two checkpoints hold, part by part; times are left out."""
    compared, differences = [], []
    for part in dict.fromkeys([*state, *other]):
        ours, theirs = (dict(_leaves(whole.get(part))) for whole in (state, other))
        if part in _IGNORED_PARTS or not (ours or theirs):
            continue
        name = _NAMES.get(part, part.replace("_", " "))
        tensors = sum(isinstance(value, Tensor) for value in ours.values())
        amounts = [_count(tensors, "tensor"), _count(len(ours) - tensors, "value")]
        compared.append(f"{name}: {' and '.join(filter(None, amounts)) or 'nothing'}")
        line = _first_difference(ours, theirs)
        if line:
            differences.append(f"{name}: {line}")
    return RunComparison(compared=tuple(compared), differences=tuple(differences))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}" if number else ""


def _first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The first difference in the order of the state, and how many more; empty if all is equal."""
    differing = [
        name
        for name in dict.fromkeys([*ours, *theirs])
        if name not in ours or name not in theirs or not _equal(ours[name], theirs[name])
    ]
    if not differing:
        return ""
    first = differing[0]
    more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    if first not in ours or first not in theirs:
        return f"{first} is only in the {'straight' if first in ours else 'resumed'} run{more}"
    mine, other = ours[first], theirs[first]
    both = isinstance(mine, Tensor) and isinstance(other, Tensor)
    if both and mine.dtype == other.dtype and mine.shape == other.shape:
        gap = (mine.double() - other.double()).abs().max().item()
        return f"{first} differs by at most {gap:.3g}{more}"
    return f"{first} is {_described(mine)} straight and {_described(other)} resumed{more}"


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        alike = value.dtype == other.dtype and value.shape == other.shape
        return alike and torch.equal(_bytes(value), _bytes(other))
    # Compared as text, so that a NaN equals itself and 0.0 differs from -0.0.
    return type(value) is type(other) and repr(value) == repr(other)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors, numbers and text, by their place in the nested state; no empty containers."""
    if isinstance(value, Mapping):
        for key, member in value.items():
            if key not in _MEASURED:
                yield from _leaves(member, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for position, member in enumerate(value):
            yield from _leaves(member, f"{name}[{position}]")
    elif value is not None:
        yield name, value


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
