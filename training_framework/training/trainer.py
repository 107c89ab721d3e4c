"""The training loop: epochs of steps, with rows, evaluations and checkpoints when they are due."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial

from training_framework.data import Batch
from training_framework.data.sample_digest import SampleDigest
from training_framework.errors import UserError
from training_framework.faults import fault_point
from training_framework.plan import TrainPlan
from training_framework.runs.progress import Progress, TrainResult
from training_framework.training.evaluation import (
    Evaluation,
    evaluate_unless_stopped,
    evaluation_row,
)
from training_framework.training.finiteness import FinitenessGuard, WatchedBatch
from training_framework.training.interval import Interval
from training_framework.training.micro_batching import MicroBatching
from training_framework.training.outputs import Outputs
from training_framework.training.parts import Parts
from training_framework.training.rows import training_row
from training_framework.training.stopping import StopAgreement, StopRequested, StopSignals

__all__ = ["Trainer"]


class Trainer:
    """Trains until the plan's last step, or until it is told to stop. Read `fit` first.

    Args:
        plan: Steps, batch sizes and intervals.
        parts: What trains: the step, its data and its schedule.
        outputs: Where numbers and checkpoints go.
        progress: Where to start; every step advances it.
    """

    def __init__(
        self, *, plan: TrainPlan, parts: Parts, outputs: Outputs, progress: Progress
    ) -> None:
        self.progress = progress
        self._plan, self._parts, self._outputs = plan, parts, outputs
        # The costs are measured now, and not while steps are timed.
        self._row = partial(training_row, parts, parts.costs)
        self._last_step = min(plan.total_steps, plan.stop_after_steps or plan.total_steps)
        self._train_loss: float | None = None
        self._stopped_by = ""
        self._interval = Interval()
        self._samples = SampleDigest(progress.sample_digest)
        self._signals = StopSignals()
        self._agreement = StopAgreement(world_size=plan.world_size, device=parts.device)
        self._guard = FinitenessGuard(parts.step, parts.sample_name, parts.device)
        self._micro_batching = MicroBatching(
            parts.step, progress, parts.device, outputs.loggers, retries=plan.auto_micro_batch
        )

    def fit(self) -> TrainResult:
        """Train to the end. A first SIGINT, SIGTERM or SIGHUP saves and ends early; a second kills.

        Raises:
            UserError: The training cannot continue: the loader, a value that is not finite, memory,
                a log or a checkpoint is the reason.
        """
        progress, step, loader = self.progress, self._parts.step, self._parts.loaders.train
        with self._signals:
            self._epoch_start = time.perf_counter() - progress.epoch_seconds
            if progress.unlogged is not None:  # the run was stopped after the step, before its row
                self._after_step(is_logged=True)
            while self._goes_on():
                epoch, batches = progress.epoch, loader.epoch(progress.epoch, progress.batch)
                step.model.train()
                self._interval.restart()
                self._epoch_start = time.perf_counter() - progress.epoch_seconds
                while self._goes_on() and progress.epoch == epoch:
                    is_logged = self._logs_after(progress.step + 1)
                    try:
                        self._make_step(batches, measure_grad_norm=is_logged)
                    except StopRequested:  # while the step waited for its first batch
                        is_logged = False
                    self._after_step(is_logged=is_logged)
                with suppress(AttributeError):  # only a generator has something to close
                    batches.close()  # type: ignore[attr-defined]
        if not self._stopped_by and progress.step < self._plan.total_steps:
            self._stopped_by = "stop_after_steps"
        return TrainResult.of(
            progress,
            train_loss=self._train_loss,
            run_directory=self._outputs.run_directory,
            stopped_by=self._stopped_by,
        )

    def _goes_on(self) -> bool:
        return self.progress.step < self._last_step and not self._stopped_by

    def _logs_after(self, step_number: int) -> bool:
        """Whether a row is logged after a step: regularly, and when something else happens too."""
        plan = self._plan
        return (
            step_number % plan.log_every_n_steps == 0
            or step_number % plan.steps_per_epoch == 0
            or step_number == self._last_step
            or plan.evaluates_after(step_number)
        )

    def _make_step(self, batches: Iterator[Batch], *, measure_grad_norm: bool) -> None:
        """Add up the gradients of a group of batches, and move the weights."""
        plan, progress, parts, step = self._plan, self.progress, self._parts, self._parts.step
        group_size = plan.group_size(progress.epoch, progress.batch)
        # No function in here: after an error its closure would keep the step, and with it DDP.
        watched = self._micro_batching.accumulate(
            self._group(batches, group_size), partial(self._add_gradient, group_size)
        )
        with step.phase("optimizer"):
            fault_point("step.before_update")
            lr = plan.lr * parts.schedule(progress.step)
            norm = step.update(lr, step=progress.step, measure_grad_norm=measure_grad_norm)
            fault_point("step.after_update")
            progress.step += 1
            self._guard.watch(
                watched, norm, step=progress.step, epoch=progress.epoch, first_batch=progress.batch
            )
            for batch in watched:
                self._samples.add(batch.indices)
                self._interval.images += batch.indices.shape[0] * plan.world_size
            progress.batch += group_size
        self._outputs.advance(progress.step)

    def _add_gradient(self, group_size: int, position: int, batch: Batch) -> WatchedBatch:
        plan, progress, step = self._plan, self.progress, self._parts.step
        transform, start = self._parts.loaders.train_transform, time.perf_counter()
        with step.phase("transform"):
            done = progress.epoch * plan.batches_per_epoch + progress.batch + position
            inputs = step.transformed(transform, batch, step=done, epoch=progress.epoch)
        self._interval.data_wait += time.perf_counter() - start
        inputs = self._parts.select(*inputs)
        is_last = position == group_size - 1
        loss = step.accumulate(*inputs, group_size=group_size, last_of_group=is_last)
        return WatchedBatch.of(batch, loss)

    def _group(self, batches: Iterator[Batch], size: int) -> Iterator[Batch]:
        """The batches of a step. A signal ends the wait for the first one of a single process."""
        for position in range(size):
            start = time.perf_counter()
            with self._parts.step.phase("data"):
                if position == 0 and self._plan.world_size == 1:
                    # Nothing of the step is done yet, and no other process counts on it.
                    batch = self._signals.interruptibly(next, batches, None)
                else:
                    batch = next(batches, None)
            self._interval.data_wait += time.perf_counter() - start
            if batch is None:
                raise UserError(
                    f"the training loader ended after {self.progress.batch + position} of "
                    f"{self._plan.batches_per_epoch} batches",
                    "make its length the number of batches that it yields",
                )
            yield batch

    def _after_step(self, *, is_logged: bool) -> None:
        """Log, evaluate, end the epoch, agree on a stop and save, if these are due."""
        progress, checkpoints = self.progress, self._outputs.checkpoints
        evaluation = self._log_row() if is_logged else None
        progress.epoch_seconds = time.perf_counter() - self._epoch_start
        epoch_ends = progress.batch == self._plan.batches_per_epoch and progress.unlogged is None
        if epoch_ends:
            progress.end_epoch(self._samples.read())
            self._samples = SampleDigest()
        self._stopped_by, save_is_due = self._agreement.decide(
            self._signals,
            step=progress.step,
            step_seconds=self._interval.step_seconds,
            save_is_due=checkpoints is not None and checkpoints.is_due(progress.step),
            at_logged_step=is_logged,
        )
        if evaluation or epoch_ends or save_is_due or not self._goes_on():
            start = time.perf_counter()
            self._save(evaluation)
            self._interval.leave_out(time.perf_counter() - start)

    def _log_row(self) -> Evaluation | None:
        """Write a row, after an evaluation if one is due.

        Until it is written, the row is kept in the progress (`unlogged`): a run that is stopped
        here, or cannot write, resumes with it. Returns the evaluation, if one was completed.
        """
        progress, plan, parts, step = self.progress, self._plan, self._parts, self._parts.step
        evaluate = parts.evaluate if plan.evaluates_after(progress.step) else None
        if progress.unlogged is None:
            with step.phase("logging"):
                progress.unlogged = self._row(progress, self._interval, self._guard)
        row, evaluation = progress.unlogged, None
        try:
            if evaluate is not None:
                evaluation = evaluate_unless_stopped(
                    evaluate, self._signals, device=parts.device, alone=plan.world_size == 1
                )
                if evaluation is None:
                    return None
                row = row | evaluation_row(evaluation, progress, self._outputs.loggers.message)
            with step.phase("logging"):
                self._outputs.loggers.log(progress.step, row)
        except UserError:
            if plan.world_size == 1:
                with suppress(UserError):  # the first error is the one to show
                    self._save(None)
            raise
        progress.unlogged = None
        self._train_loss = row["train/loss"]
        self._interval.restart()
        return evaluation

    def _save(self, evaluation: Evaluation | None) -> None:
        """Save a checkpoint of sound weights; all processes must call it at the same point."""
        progress, checkpoints, step = self.progress, self._outputs.checkpoints, self._parts.step
        if checkpoints is None and self._plan.world_size == 1:
            return
        if step.sums is not None:
            step.sums.all_reduce()  # a stop between two rows must not lose the ranks' shares
        self._guard.check(progress.step, weights=True)
        if checkpoints is None:
            return
        progress.sample_digest = self._samples.read()
        checkpoints.save(
            {**step.state_dict(), "progress": asdict(progress), **self._outputs.checkpoint_extras},
            epoch=progress.epoch - (progress.batch == 0),
            val_acc1=evaluation.metrics.acc1 if evaluation and evaluation.is_finite else None,
        )
