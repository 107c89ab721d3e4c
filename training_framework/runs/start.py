"""Where a run starts: anew, or from the checkpoint of one that was not finished."""

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from training_framework.checkpoint import (
    load_checkpoint,
    load_newest,
    previous_of,
    read_description,
)
from training_framework.config.schema import TRAJECTORY_FREE_KEYS
from training_framework.errors import UserError, shown
from training_framework.faults import fault_point
from training_framework.machine.distributed import Processes, gathered
from training_framework.plan import PlannedRun, TrainPlan
from training_framework.runs.directory import (
    DirectoryLock,
    next_version,
    run_directories,
    run_directory_of,
    under_way,
)

__all__ = ["Start", "choose_start", "refuse_other_settings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts from.

    Attributes:
        state: Content of a checkpoint; None: the run starts at its beginning.
        checkpoint: The file that it is from.
        directory: Run directory to go on in; None: a new one.
        version: Number of the new one; None: any that is free.
        lines: What to tell the user.
        lock: On `directory`, held by the first process.
    """

    state: dict[str, Any] | None = None
    checkpoint: Path | None = None
    directory: Path | None = None
    version: int | None = None
    lines: tuple[str, ...] = ()
    lock: DirectoryLock | None = None

    def opening_lines(self, step: int, total_steps: int) -> list[str]:
        """What is damaged, and what is gone on with."""
        if self.checkpoint is None:
            return []
        where = f"{step:,} of {total_steps:,} (--resume never starts anew)"
        return [*self.lines, f"resuming {self.directory or self.checkpoint} at step {where}"]

    def set_damaged_aside(self) -> None:
        """Move a damaged `last.ckpt` away, so that it never takes the place of a good one."""
        if self.directory is None or self.checkpoint is None:
            return
        last = self.directory / "checkpoints" / "last.ckpt"
        if self.checkpoint == previous_of(last) and last.exists():
            last.replace(last.with_name("last.ckpt.damaged"))


def choose_start(plan: TrainPlan, processes: Processes) -> Start:
    """Find what `resume` means here; the first process decides for all.

    `auto` is the newest run of the same name that has a checkpoint, if it is not finished; else a
    new run. A path of a run's last.ckpt goes on in its directory, another one in a new directory.

    Args:
        plan: With `resume`, `output_dir` and `name`.
        processes: All of them call this at the same point.

    Raises:
        UserError: The checkpoint cannot be read, or its run is still under way.
    """
    start = _choose(plan) if processes.is_first else Start()
    if processes.world_size > 1:
        shared = (start.checkpoint, start.directory)
        checkpoint, directory = gathered(shared if processes.is_first else None)[0]
        if not processes.is_first and checkpoint is not None:
            state = load_checkpoint(checkpoint)
            start = Start(state=state, checkpoint=checkpoint, directory=directory)
    if start.state is not None:
        fault_point("resume.after_load")
    return start


def _choose(plan: TrainPlan) -> Start:
    if plan.resume == "never":
        return Start()
    if plan.resume == "auto":
        return _newest_unfinished(plan.output_dir / plan.name)
    assert isinstance(plan.resume, Path)
    directory = run_directory_of(plan.resume) if plan.resume.name == "last.ckpt" else None
    if directory is None:
        return Start(state=load_checkpoint(plan.resume), checkpoint=plan.resume)
    lock = DirectoryLock.take(directory)
    if lock is None:
        raise UserError(under_way(directory).fault, "wait for its end, or stop it")
    return _going_on(directory, lock)


def _newest_unfinished(parent: Path) -> Start:
    for directory in run_directories(parent):
        lock = None
        if (directory / ".lock").exists():  # elsewhere nobody is, and nothing is touched
            lock = DirectoryLock.take(directory)
            if lock is None:
                raise under_way(directory)
        last = directory / "checkpoints" / "last.ckpt"
        saved = last.exists() or previous_of(last).exists()
        if saved and not _is_finished(directory, last):
            lock = lock or DirectoryLock.take(directory)
            if lock is None:
                raise under_way(directory)
            return _going_on(directory, lock)
        if lock is not None:
            lock.release()
        if saved:
            break
    return Start(version=next_version(parent))


def _is_finished(directory: Path, last: Path) -> bool:
    """Whether all was written that a run leaves, and for no fewer steps than it was last to make.

    A run can be killed after its last checkpoint, and a finished one continued with more epochs.
    """
    try:
        record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        results, planned = record["results"], record["plan"]["total_steps"]
        if results["stopped_by"]:
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # Where it is damaged although all is done, what it was to make stands in the record too.
    with suppress(UserError, KeyError, TypeError):
        planned = read_description(last)["total_steps"]
    return bool(results["steps"] >= planned)


def _going_on(directory: Path, lock: DirectoryLock) -> Start:
    try:
        state, checkpoint, lines = load_newest(directory / "checkpoints" / "last.ckpt")
    except BaseException:
        lock.release()
        raise
    return Start(
        state=state, checkpoint=checkpoint, directory=directory, lines=tuple(lines), lock=lock
    )


def refuse_other_settings(
    planned: PlannedRun, start: Start, *, facts: Mapping[str, Any], class_names: tuple[str, ...]
) -> None:
    """Refuse what would lead elsewhere than the run that is resumed.

    Args:
        planned: What would run now.
        start: What is resumed.
        facts: Of the training data, as the checkpoint holds them under `data`.
        class_names: In label order.

    Raises:
        UserError: Something differs, all of which is listed, and allow_config_change is off.
    """
    state = start.state
    if state is None or planned.plan.allow_config_change:
        return
    # A path takes the run's settings over, except for the weights that it started from.
    free = TRAJECTORY_FREE_KEYS - ({"weights"} if planned.plan.resume == "auto" else set())
    now = {**planned.settings, **facts, "class_names": list(class_names)}
    then = {
        **{key: value for key, value in (state["config"] or {}).items() if key not in free},
        **(state.get("data") or {}),
        "class_names": (state["network"] or {}).get("class_names"),
    }
    differing = [
        f"{key} {shown(value)} -> {shown(now[key])}"
        for key, value in then.items()
        if key in now and now[key] != value
    ]
    if differing:
        cure = "drop them, or go on with --allow-config-change"
        if planned.plan.resume == "auto":
            cure = (
                "train with those again, start anew with --resume never, or go on with "
                "--allow-config-change"
            )
        raise UserError(
            f"{start.checkpoint}: its run had other settings: {', '.join(differing)}", cure
        )
