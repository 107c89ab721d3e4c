"""Recognizes and validates the files that a report shows."""

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import from_json

from training_framework.errors import UserError, shown
from training_framework.measure.compare.result import Result, load_result
from training_framework.measure.tune.result import TuningResult

__all__ = ["ProfileRecord", "RunRecord", "Source", "read_source"]

KINDS = (
    "name a file that `compare`, `tune`, `profile` or benchmarks/record_run.py wrote, "
    "such as results/NAME.json"
)


MAX_BYTES = 256 << 20

Count = Annotated[int, Field(ge=0, le=2**53)]


class _Part(BaseModel):
    # These files hold more than a report needs.
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


class RunEpoch(_Part):
    """Wall seconds of an epoch, the part that evaluations took, and its last top-1 in percent."""

    seconds: float
    evaluation_seconds: float
    val_acc1: float | None = None


class RunOutcome(_Part):
    """What a run reached: accuracies in percent, mean losses, speed over the training steps."""

    best_acc1: float | None = None
    last_acc1: float | None = None
    last_acc5: float | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    images_per_second: float
    steps: Count


class RunPlan(_Part):
    """The part of a run's plan that places its steps in time."""

    steps_per_epoch: Annotated[Count, Field(ge=1)]
    epochs: Annotated[float, Field(gt=0, le=2**53)]


class RunRecord(_Part):
    """A training run, as benchmarks/record_run.py keeps it.

    Attributes:
        seconds: Seconds of the whole process.
        metrics: Rows of metrics.csv, as text.
    """

    experiment: str
    command: str
    date: str = ""
    commit: str = ""
    clock: str = ""
    seconds: float
    cpu_busy_before_percent: float | None = None
    dataset: str
    environment: dict[str, Any]
    config: dict[str, Any]
    plan: RunPlan
    epochs: list[RunEpoch]
    results: RunOutcome
    metrics: list[dict[str, str | None]]

    @field_validator("metrics")
    @classmethod
    def _are_numbers(cls, rows: list[dict[str, str | None]]) -> list[dict[str, str | None]]:
        for number, row in enumerate(rows, 1):
            for column, text in row.items():
                if text and not _is_number(text, whole=column == "step"):
                    raise ValueError(f"row {number}: {column}: {shown(text)} is not a number")
        return rows

    def curve(self, column: str) -> tuple[tuple[float, float], ...]:
        """A column of the metrics against the seconds since the start of training.

        Rows hold no times, so all steps of an epoch are assumed to take equally long. Empty if no
        epoch was finished.
        """
        if not self.epochs:
            return ()
        ends = np.cumsum([0.0, *(epoch.seconds for epoch in self.epochs)])
        boundaries = self.plan.steps_per_epoch * np.arange(len(ends))
        points = []
        for row in self.metrics:
            step, value = row.get("step"), row.get(column)
            if not step or not value or int(step) > boundaries[-1]:
                continue
            if math.isfinite(float(value)):
                points.append((float(np.interp(int(step), boundaries, ends)), float(value)))
        return tuple(points)

    def phases(self) -> dict[str, float]:
        """Where the seconds of the process went; empty if the run was a resumption."""
        evaluation = sum(epoch.evaluation_seconds for epoch in self.epochs)
        training = sum(epoch.seconds for epoch in self.epochs) - evaluation
        rest = self.seconds - training - evaluation
        if rest < 0 or training <= 0:
            return {}
        waiting = training * self._data_wait()
        return {
            "waiting for data": waiting,
            "training steps": training - waiting,
            "evaluation": evaluation,
            "start, saving and end": rest,
        }

    def _data_wait(self) -> float:
        """The share of the training steps spent on waiting for data, 0 to 1."""
        rows = [row for row in self.metrics if row.get("data_wait") and row.get("step")]
        steps = np.diff([0, *(int(row["step"] or 0) for row in rows)])
        speeds = np.array([float(row.get("images_per_second") or 1) for row in rows])
        waits = np.array([float(row["data_wait"] or 0) for row in rows])
        weights = steps / speeds
        return float(np.average(waits, weights=weights)) if weights.sum() > 0 else 0.0


class ProfilePhases(_Part):
    """Mean seconds a step by phase."""

    steps: Count
    seconds: dict[str, float]


class ProfileCeilings(_Part):
    """Images per second of the loader alone, the model alone, and both together."""

    loader: float
    model: float
    both: float


class ProfileVerdict(_Part):
    """What limits the run, the figures behind that, and what to try next."""

    limit: str
    figures: str
    next_step: str


class ProfileRecord(_Part):
    """What a report shows of a profile.json."""

    command: str
    date: str = ""
    phases: ProfilePhases
    ceilings: ProfileCeilings
    verdict: ProfileVerdict
    versions: dict[str, Any]
    hardware: dict[str, Any]
    config: dict[str, Any]


Source = Result | TuningResult | RunRecord | ProfileRecord


def read_source(path: Path) -> Source:
    """Read a file that a report can show.

    Raises:
        UserError: It is missing, not JSON, or of an unknown kind.
    """
    try:
        if not path.is_file() and path.exists():  # a device may never end
            raise UserError(f"{path}: not a file", KINDS)
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MiB", KINDS)
        content = from_json(path.read_bytes())
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", KINDS) from None
    except ValueError as error:  # not UTF-8, not JSON, too deep
        raise UserError(f"{path}: not JSON ({error})", KINDS) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a result", KINDS)
    if "variants" in content:
        return load_result(path)
    kind = _kind(content)
    if kind is None:
        raise UserError(f"{path}: not a result", KINDS)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        fault = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {fault}", KINDS) from None


def _is_number(text: str, *, whole: bool) -> bool:
    if whole:
        return text.isascii() and text.isdecimal() and len(text) < 16
    try:
        float(text)
    except ValueError:
        return False
    return True


def _kind(content: dict[str, Any]) -> type[TuningResult | RunRecord | ProfileRecord] | None:
    if "trials" in content:
        return TuningResult
    if "metrics" in content:
        return RunRecord
    return ProfileRecord if "ceilings" in content else None
