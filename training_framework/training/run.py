"""One training run, from a configuration to a result: the wiring of all parts."""

import dataclasses
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from training_framework.config import TrainConfig
from training_framework.data.user_look import LookedAtLoader
from training_framework.machine.distributed import process_group
from training_framework.models import plain_network, save_weights
from training_framework.plan import TrainPlan, plan_run
from training_framework.runs.directory import check_space, check_writable, create_run_directory
from training_framework.runs.identity import run_identity
from training_framework.runs.network_card import NetworkCard
from training_framework.runs.progress import Progress, TrainResult
from training_framework.runs.record import opening_lines, write_record
from training_framework.runs.start import Start, choose_start
from training_framework.training.outputs import Outputs, open_loggers
from training_framework.training.parts import Parts, build_parts
from training_framework.training.resuming import (
    checkpoint_extras,
    open_keeper,
    plan_resumption,
    refuse_different_plans,
    restore,
    restore_draws,
)
from training_framework.training.shape_warmup import warm_up_shapes
from training_framework.training.trainer import Trainer
from training_framework.training.user_network import class_of

__all__ = ["TrainingRun"]


class TrainingRun:
    """A run that is planned but not started.

    Args:
        config: What is asked for.
        model: The user's own network; None builds the configured one.
        train_loader: The user's own loader; None opens the configured data.
        val_loader: Likewise, for evaluation.

    Attributes:
        planned: The plan, and what it is based on.
        model: The trained network after `execute`: the weight average if there is one.

    Raises:
        UserError: A setting is wrong or cannot be used on this machine.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: nn.Module | None = None,
        train_loader: LookedAtLoader | None = None,
        val_loader: LookedAtLoader | None = None,
    ) -> None:
        self.model = model
        self._identity: dict[str, Any] = {}
        self.planned = plan_run(
            config,
            train_loader=train_loader,
            val_loader=val_loader,
            own_network=None if model is None else class_of(model),
        )

    @property
    def plan(self) -> TrainPlan:
        """What was decided."""
        return self.planned.plan

    def execute(self) -> TrainResult:
        """Train; everything that was opened is closed again, whatever happens."""
        processes = self.planned.processes
        device = self.plan.torch_device(processes.local_rank)
        with process_group(processes, device, records_steps=self.plan.cuda_graph):
            # In a function of its own: what uses the group must be gone before the group ends.
            return self._train()

    def _train(self) -> TrainResult:
        with ExitStack() as stack:
            # Before anything changes the network; only the first process needs it.
            is_first = self.planned.processes.is_first
            self._identity = run_identity(self.planned, self.model) if is_first else {}
            start = self._start(stack)
            if self.model is not None:  # undo surgery on a user's network, whatever happens
                stack.callback(plain_network, self.model)
            parts = build_parts(self.planned, network=self.model, with_weights=start.state is None)
            stack.callback(parts.close)
            progress = restore(start, parts, is_first=is_first)
            # Last, so that a run that cannot start leaves no empty folder behind.
            outputs = self._outputs(start, parts, progress, stack)
            trainer = Trainer(plan=self.plan, parts=parts, outputs=outputs, progress=progress)
            warm_up_shapes(parts.step, self.plan, parts.device)
            restore_draws(start, loader=parts.loaders.train, device=parts.device)
            start = dataclasses.replace(start, state=None)  # frees a second copy of everything
            clocks = (time.time(), time.perf_counter())
            result = trainer.fit()
            result = dataclasses.replace(result, bad_images=parts.loaders.share_bad_images())
            self.model = plain_network(parts.evaluated)
            if outputs.checkpoints is not None and outputs.run_directory is not None:
                # Surface a failed checkpoint write before declaring success.
                outputs.checkpoints.wait()
                self._write_results(
                    outputs.run_directory,
                    parts,
                    start=start,
                    progress=trainer.progress,
                    result=result,
                    clocks=clocks,
                )
        return result

    def _write_results(
        self,
        directory: Path,
        parts: Parts,
        *,
        start: Start,
        progress: Progress,
        result: TrainResult,
        clocks: tuple[float, float],
    ) -> None:
        """Write the weights, then run.json, which says that the run is over."""
        path = directory / "weights.safetensors"
        save_weights(parts.evaluated.state_dict(), path, self._card().as_metadata())
        write_record(
            directory,
            planned=self.planned,
            network=self._card(),
            identity=self._identity,
            costs=parts.costs,
            resumed_from=start.checkpoint,
            started=clocks[0],
            seconds=time.perf_counter() - clocks[1],
            progress=progress,
            result=result,
        )

    def _start(self, stack: ExitStack) -> Start:
        """Where to start from; checks that files can be written there."""
        plan, processes = self.plan, self.planned.processes
        refuse_different_plans(plan)
        start = choose_start(self.planned, self._identity, processes)
        if start.lock is not None:
            stack.callback(start.lock.release)
        if processes.is_first:
            parent = plan.output_dir / plan.name
            check_writable(parent if start.directory is None else start.directory / "checkpoints")
        self.planned, start = plan_resumption(self.planned, start)
        return start

    def _card(self) -> NetworkCard:
        return NetworkCard.of(self.plan, self.planned.facts)

    def _directory(self, start: Start, parts: Parts, stack: ExitStack) -> Path:
        """The run directory, locked, on a disk that can hold a checkpoint."""
        plan = self.plan
        parent = plan.output_dir / plan.name
        check_space(start.directory or parent, parts.step.checkpoint_bytes())
        if start.directory is not None:
            start.set_damaged_aside()
            return start.directory
        lock = create_run_directory(
            plan.output_dir,
            plan.name,
            config_yaml=self.planned.config_yaml(),
            version=start.version,
        )
        stack.callback(lock.release)
        return lock.directory

    def _outputs(self, start: Start, parts: Parts, progress: Progress, stack: ExitStack) -> Outputs:
        """Loggers and checkpoints; only the first process has any."""
        planned, plan = self.planned, self.plan
        if not planned.processes.is_first:
            return Outputs()
        directory = self._directory(start, parts, stack)
        loggers, console = open_loggers(
            directory,
            plan=plan,
            resume_step=None if start.directory is None else progress.logged_step,
        )
        stack.callback(loggers.close)
        opening = opening_lines(plan, planned.facts, planned.hardware, parts.costs)
        resuming = start.opening_lines(progress.step, plan.total_steps)
        for line in [*opening, *parts.lines, *resuming, f"run directory: {directory}"]:
            loggers.message(line)
        keeper = open_keeper(directory, parts)
        stack.enter_context(keeper)
        parts.report_to(loggers.message, directory / "bad_images.txt")
        return Outputs(
            loggers=loggers,
            advance=console.advance,
            checkpoints=keeper,
            checkpoint_extras=checkpoint_extras(planned, self._card().as_dict(), self._identity),
            run_directory=directory,
        )
