"""Where a run starts: from the beginning, or from the checkpoint of an unfinished run."""

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
from training_framework.config import TrainConfig
from training_framework.config.loading import config_to_dict
from training_framework.config.schema import TRAJECTORY_FREE_KEYS, sections
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
from training_framework.runs.identity import identity_differences

__all__ = ["Start", "changed_settings", "choose_start"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts from.

    Attributes:
        state: Content of a checkpoint; None: the run starts from the beginning.
        checkpoint: The checkpoint's file.
        directory: Run directory to continue in; None: a new one.
        version: Number of the new directory; None: the next free one.
        lines: What to tell the user.
        lock: Lock on `directory`, held by the first process.
    """

    state: dict[str, Any] | None = None
    checkpoint: Path | None = None
    directory: Path | None = None
    version: int | None = None
    lines: tuple[str, ...] = ()
    lock: DirectoryLock | None = None

    def opening_lines(self, step: int, total_steps: int) -> list[str]:
        """What is damaged, and what the run resumes from."""
        if self.checkpoint is None:
            return list(self.lines)
        where = f"{step:,} of {total_steps:,} (--resume never starts anew)"
        return [*self.lines, f"resuming {self.directory or self.checkpoint} at step {where}"]

    def set_damaged_aside(self) -> None:
        """Move a damaged `last.ckpt` away, so that it never takes the place of a good one."""
        if self.directory is None or self.checkpoint is None:
            return
        last = self.directory / "checkpoints" / "last.ckpt"
        if self.checkpoint == previous_of(last) and last.exists():
            last.replace(last.with_name("last.ckpt.damaged"))


def choose_start(planned: PlannedRun, identity: Mapping[str, Any], processes: Processes) -> Start:
    """Find what `resume` means here; the first process decides for all.

    `auto` resumes the newest run of the same name that has a checkpoint, if it is unfinished and
    had the same data and network; otherwise a new run starts. The path of a run's last.ckpt
    continues in that run's directory, any other path in a new directory.

    Args:
        planned: Has `resume`, `output_dir`, `name` and the settings to compare.
        identity: This run's `run_identity`; only the first process reads it.
        processes: All of them call this at the same point.

    Raises:
        UserError: The checkpoint cannot be read, its run is still running, or it had other
            settings, data or another network and `allow_config_change` is off.
    """
    start = Start()
    if processes.is_first:
        start = _choose(planned.plan)
        try:
            start = _same_run(start, planned, identity)
        except BaseException:
            if start.lock is not None:
                start.lock.release()
            raise
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
        raise UserError(under_way(directory).fault, "wait until it ends, or stop it")
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
    """Whether a run wrote all its files, after all the steps that it last had to make.

    A run can be killed after its last checkpoint, and a finished run can be continued with more
    epochs.
    """
    try:
        record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        results, planned = record["results"], record["plan"]["total_steps"]
        if results["stopped_by"]:
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # If the checkpoint is damaged, the record also says how many steps were planned.
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


def _same_run(start: Start, planned: PlannedRun, identity: Mapping[str, Any]) -> Start:
    """The start, if it resumes the same run; otherwise a new run, or an error."""
    plan, state = planned.plan, start.state
    if state is None:
        return start
    others = identity_differences(state, identity)
    if plan.allow_config_change:
        if not others:
            return start
        line = f"note: the checkpoint is from another run: {', '.join(others)}"
        return dataclasses.replace(start, lines=(*start.lines, line))
    then, now = _settings_of(state), planned.settings
    settings = [
        f"{key} {shown(then[key])} -> {shown(now[key])}" for key in changed_settings(start, planned)
    ]
    if settings:
        cure = "drop them, or resume with --allow-config-change"
        if plan.resume == "auto":
            cure = (
                "use those settings, start anew with --resume never, or resume with "
                "--allow-config-change"
            )
        raise UserError(
            f"{start.checkpoint}: its run had other settings: {', '.join([*settings, *others])}",
            cure,
        )
    if others and plan.resume != "auto":
        raise UserError(
            f"{start.checkpoint}: belongs to another run: {', '.join(others)}",
            "give the data, loaders and network that it was trained with, or resume with "
            "--allow-config-change",
        )
    if others:
        if start.lock is not None:
            start.lock.release()
        line = f"note: {start.directory} holds another run ({', '.join(others)}): a new one starts"
        return Start(version=next_version(plan.output_dir / plan.name), lines=(line,))
    return start


def changed_settings(start: Start, planned: PlannedRun) -> list[str]:
    """Keys of settings that change results and differ from those of the run that is resumed."""
    if start.state is None:
        return []
    # With a path, the run's settings are the defaults, except for its initial weights.
    free = TRAJECTORY_FREE_KEYS - ({"weights"} if planned.plan.resume == "auto" else set())
    then, now = _settings_of(start.state), planned.settings
    plan = start.state.get("plan")
    if isinstance(plan, dict) and not planned.plan.allow_config_change:
        # What is left to the plan now stays as in the run, so nothing changes.
        free |= {key for key in sections()["machine"] if now[key] == "auto" and key in plan}
    return [
        key for key, value in then.items() if key not in free and key in now and now[key] != value
    ]


def _settings_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint's run; those that its version lacked have their defaults."""
    settings = state["config"] or {}
    return {**config_to_dict(TrainConfig()), **settings} if settings else {}
