"""Metrics as a CSV file: one row per logged step, complete after every row."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from training_framework.errors import UserError
from training_framework.faults import fault_point
from training_framework.loggers.record_file import RecordFile, unwritable

__all__ = ["COLUMNS", "CsvLogger"]

COLUMNS = {
    "epoch": "epoch that the step belongs to, counted from 0",
    "step": "optimizer steps made, counted from 1",
    "train/loss": "mean training loss since the previous row",
    "train/acc1": "top-1 accuracy on the training images since the previous row, percent",
    "train/acc5": "top-5 accuracy on the training images since the previous row, percent",
    "val/loss": "mean loss on the validation set",
    "val/acc1": "top-1 accuracy on the validation set, percent",
    "val/acc5": "top-5 accuracy on the validation set, percent",
    "val/acc1_tta": "top-1 accuracy on the validation set with test-time augmentation, percent",
    "lr": "learning rate of the step",
    "grad_norm": "norm of the gradient before clipping",
    "images_per_second": "training images per second over all devices",
    "data_wait": "share of the time spent waiting for data, 0 to 1",
    "memory": "peak memory of the device, or the process's resident memory on a CPU, bytes",
    "mfu": "model FLOP/s as a share of the device's peak, 0 to 1",
    "eval_seconds": "time of the evaluation, seconds",
}
"""Columns of the file, in order, with their meaning and unit."""

_HEADER = ",".join(COLUMNS)


class CsvLogger:
    """Appends a row for every call of `log`, immediately; a missing value is an empty field.

    Whole numbers are written in full, others with the fewest digits that identify the float32.
    Messages are not written.

    Args:
        path: The file, in an existing directory.
        resume_step: For a resumed run, the number of steps so far. Rows after that step are
            dropped, since they will be logged again, and so is an incomplete last row. The file
            is replaced atomically, so a crash here loses nothing. None: a new run.

    Raises:
        UserError: The file of a new run already exists, the file to append to is of another kind,
            or it cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self._path = Path(path)
        self._last_step = -1
        if resume_step is not None and self._path.exists():
            rows = _rows_to_keep(self._path, resume_step)
            _replace(self._path, rows)
            if rows:
                self._last_step = _step_of(rows[-1])
            self._file = RecordFile(self._path, new=False)
            return
        try:
            self._file = RecordFile(self._path, new=True)
        except FileExistsError:
            raise UserError(
                f"{self._path} already exists", "choose another run directory or resume that run"
            ) from None
        self._file.write(f"{_HEADER}\n".encode())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a row.

        Args:
            step: Number of optimizer steps; greater than in the previous row.
            values: Values by column; `step` itself may be missing.

        Raises:
            UserError: A name is not a column, or the row cannot be written.
        """
        assert step > self._last_step, f"step {step} is logged after step {self._last_step}"
        unknown = sorted(values.keys() - COLUMNS.keys())
        if unknown:
            raise UserError(
                f"{self._path} has no column {unknown[0]!r}",
                f"its columns are: {', '.join(COLUMNS)}",
            )
        numbers = {**values, "step": step}
        row = ",".join(_number(numbers[name]) if name in numbers else "" for name in COLUMNS)
        try:
            fault_point("logging.before_row")
            self._file.write(f"{row}\n".encode())
            fault_point("logging.after_row")
        except OSError as error:
            raise unwritable(self._path, error) from None
        self._last_step = step

    def message(self, text: str) -> None:
        """Do nothing: the file contains only numbers."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _number(value: float) -> str:
    if abs(value) < 2**53 and value == int(value):
        return str(int(value))
    if 1e-37 < abs(value) < 1e38:
        return str(np.float32(value))
    return repr(float(value))


def _rows_to_keep(path: Path, resume_step: int) -> list[str]:
    # A power cut may leave bytes that are not text; such a row counts as incomplete.
    text = path.read_text(encoding="utf-8", errors="replace")
    header, *rows = text.split("\n")
    if _HEADER.startswith(header) and not any(rows):
        return []
    columns = header.split(",")
    if not {"epoch", "step"} <= set(columns) <= COLUMNS.keys():
        raise UserError(
            f"{path}: the first line does not list the columns of this version",
            "move the file away to start a new one",
        )
    if header != _HEADER:  # an earlier version had fewer columns
        rows = [_with_all_columns(row, columns) for row in rows]
    # After the last newline there is nothing, or a row whose last number may be incomplete.
    rows.pop()
    kept: list[str] = []
    last_step = -1
    for row in rows:
        step = _step_of(row)
        if last_step < step <= resume_step:
            kept.append(row)
            last_step = step
    return kept


def _with_all_columns(row: str, columns: list[str]) -> str:
    """A row under today's columns; an incomplete row stays incomplete."""
    fields = row.split(",")
    if len(fields) != len(columns):
        return row
    values = dict(zip(columns, fields, strict=True))
    return ",".join(values.get(name, "") for name in COLUMNS)


def _step_of(row: str) -> int:
    """The step of a row; -1 if the row is incomplete."""
    fields = row.split(",")
    step = fields[list(COLUMNS).index("step")] if len(fields) == len(COLUMNS) else ""
    return int(step) if step.isascii() and step.isdecimal() else -1


def _replace(path: Path, rows: list[str]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.writelines(line + "\n" for line in [_HEADER, *rows])
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from None
