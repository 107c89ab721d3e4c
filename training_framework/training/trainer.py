"""The loop, nothing else."""

import time
from contextlib import suppress
from dataclasses import asdict

from training_framework.errors import UserError
from training_framework.faults import fault_point
from training_framework.plan import TrainPlan
from training_framework.runs.progress import EpochRecord, Progress, TrainResult
from training_framework.training.evaluation import Evaluation
from training_framework.training.finiteness import FinitenessGuard
from training_framework.training.interval import Interval
from training_framework.training.outputs import Outputs
from training_framework.training.parts import Parts
from training_framework.training.rows import TrainingLog
from training_framework.training.signals import StopRequested, StopSignals
from training_framework.training.stop_agreement import StopAgreement
from training_framework.training.training_steps import TrainingSteps

__all__ = ["Trainer"]


class Trainer:
    """Trains until the plan's last step, or until it is told to stop.

    Args:
        plan: Steps, batch sizes and intervals.
        parts: What computes, and what it computes with.
        outputs: Where numbers, lines and checkpoints go.
        progress: Where to go on from.
    """

    def __init__(
        self, *, plan: TrainPlan, parts: Parts, outputs: Outputs, progress: Progress
    ) -> None:
        self._plan = plan
        self._step = parts.step
        self._loader = parts.loaders.train
        self._outputs = outputs
        self.progress = progress
        self._last_step = min(plan.total_steps, plan.stop_after_steps or plan.total_steps)
        self._guard = FinitenessGuard(
            parts.step, sample_name=parts.sample_name, device=parts.device
        )
        self._agreement = StopAgreement(world_size=plan.world_size, device=parts.device)
        self._signals = StopSignals()
        self._interval = Interval()
        self._steps = TrainingSteps(
            plan=plan,
            step=parts.step,
            transform=parts.loaders.train_transform,
            schedule=parts.schedule,
            progress=progress,
            interval=self._interval,
            guard=self._guard,
            signals=self._signals,
            report=outputs.loggers.message,
            device=parts.device,
            auto_micro_batch=plan.auto_micro_batch,
        )
        self._log = TrainingLog(
            plan=plan,
            step=parts.step,
            evaluate=parts.evaluate,
            schedule=parts.schedule,
            loggers=outputs.loggers,
            progress=progress,
            interval=self._interval,
            guard=self._guard,
            signals=self._signals,
            flops_per_image=parts.costs.flops_per_image,
            peak_flops=parts.costs.peak_flops,
            device=parts.device,
        )

    def fit(self) -> TrainResult:
        """Train to the end. A first SIGINT, SIGTERM or SIGHUP saves and ends early; a second kills.

        Raises:
            UserError: The loader, the numbers of the training, memory, a log or a checkpoint do not
                allow to go on.
        """
        progress = self.progress
        stopped_by = ""
        if progress.step:
            fault_point("resume.before_first_step")
        self._epoch_start = time.perf_counter() - progress.epoch_seconds
        with self._signals:
            if progress.unlogged is not None:
                stopped_by = self._finish_step(logs=True)
            while progress.step < self._last_step and not stopped_by:
                stopped_by = self._train_epoch()
        if not stopped_by and progress.step < self._plan.total_steps:
            stopped_by = "stop_after_steps"
        return self._result(stopped_by)

    def _train_epoch(self) -> str:
        """Train the rest of the epoch under way. Returns the name of a signal that ended it."""
        progress = self.progress
        self._step.model.train()
        self._interval.restart()
        self._epoch_start = time.perf_counter() - progress.epoch_seconds
        batches = self._loader.epoch(progress.epoch, start_batch=progress.batch)
        stopped_by = ""
        epoch = progress.epoch
        while progress.epoch == epoch and progress.step < self._last_step and not stopped_by:
            logs = self._logs_after(progress.step + 1)
            try:
                self._steps.make(batches, measure_grad_norm=logs)
            except StopRequested:  # while the step waited for its first batch
                logs = False
            else:
                self._outputs.advance(progress.step)
            stopped_by = self._finish_step(logs=logs)
        with suppress(AttributeError):  # an iterator that is no generator has nothing to close
            batches.close()  # type: ignore[attr-defined]
        return stopped_by

    def _finish_step(self, *, logs: bool) -> str:
        """Log, evaluate, end the epoch and save, as due. Returns the name of a signal to stop."""
        progress = self.progress
        evaluation = self._write_row() if logs else None
        progress.epoch_seconds = time.perf_counter() - self._epoch_start
        epoch_ends = progress.batch == self._plan.batches_per_epoch and progress.unlogged is None
        if epoch_ends:
            self._end_epoch()
        checkpoints = self._outputs.checkpoints
        stopped_by, save_is_due = self._agreement.decide(
            self._signals,
            step=progress.step,
            step_seconds=self._log.step_seconds,
            save_is_due=checkpoints is not None and checkpoints.is_due(progress.step),
            at_logged_step=logs,
        )
        is_last = progress.step == self._last_step
        if evaluation or epoch_ends or stopped_by or is_last or save_is_due:
            start = time.perf_counter()
            if not logs:
                self._log.gather_sums()  # a stop between two rows must not lose the ranks' shares
            self._save(evaluation)
            self._interval.leave_out(time.perf_counter() - start)
        return stopped_by

    def _write_row(self) -> Evaluation | None:
        try:
            return self._log.write()
        except UserError:
            if self.progress.unlogged is not None and self._plan.world_size == 1:
                with suppress(UserError):  # the first error is the one to show
                    self._save(None)
            raise

    def _logs_after(self, step: int) -> bool:
        """Whether a row is logged after `step`: regularly, and wherever something else happens."""
        return (
            step % self._plan.log_every_n_steps == 0
            or step % self._plan.steps_per_epoch == 0
            or step == self._last_step
            or self._plan.evaluates_after(step)
        )

    def _end_epoch(self) -> None:
        progress = self.progress
        record = EpochRecord(
            epoch=progress.epoch,
            seconds=progress.epoch_seconds,
            evaluation_seconds=progress.epoch_evaluation_seconds,
            val_acc1=progress.last.get("val/acc1"),
            sample_digest=self._steps.sample_digest(),
        )
        progress.epochs.append(asdict(record))
        progress.epoch += 1
        progress.batch = 0
        progress.sample_digest = ""
        self._steps.start_epoch()
        progress.epoch_seconds = progress.epoch_evaluation_seconds = 0.0

    def _save(self, evaluation: Evaluation | None) -> None:
        if self._outputs.checkpoints is None and self._plan.world_size == 1:
            return
        progress = self.progress
        self._guard.check(progress.step, weights=True)
        if self._outputs.checkpoints is None:
            return
        progress.sample_digest = self._steps.sample_digest()
        state = {
            **self._step.state_dict(),
            "progress": asdict(progress),
            **self._outputs.checkpoint_extras,
        }
        good = evaluation is not None and evaluation.is_finite
        self._outputs.checkpoints.save(
            state,
            epoch=progress.epoch - (progress.batch == 0),
            val_acc1=evaluation.metrics.acc1 if evaluation is not None and good else None,
        )

    def _result(self, stopped_by: str) -> TrainResult:
        progress = self.progress
        return TrainResult(
            best_acc1=progress.best_acc1,
            best_acc5=progress.best_acc5,
            last_acc1=progress.last.get("val/acc1"),
            last_acc5=progress.last.get("val/acc5"),
            train_loss=self._log.train_loss,
            val_loss=progress.last.get("val/loss"),
            epoch_seconds=tuple(record["seconds"] for record in progress.epochs),
            images_per_second=progress.images / max(progress.train_seconds, 1e-9),
            steps=progress.step,
            run_directory=self._outputs.run_directory,
            stopped_by=stopped_by,
        )
