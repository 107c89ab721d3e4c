"""The loop, nothing else."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training_framework.checkpoint import CheckpointKeeper
from training_framework.data import Batch, Loader, MixedLabels
from training_framework.distributed import largest
from training_framework.errors import UserError
from training_framework.evaluation import Evaluation
from training_framework.hardware import memory_in_use
from training_framework.loggers import LoggerGroup
from training_framework.metrics import ClassificationSums
from training_framework.optimizers import Schedule
from training_framework.plan import TrainPlan
from training_framework.progress import EpochRecord, Progress, TrainResult
from training_framework.signals import StopSignals
from training_framework.step import TrainStep

__all__ = ["Trainer"]

# torchrun gives its processes 30 seconds from the signal to the end.
STOP_AGREEMENT_SECONDS = 2.0


class _Interval:
    """Times of the steps since the last logged row."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.start = time.perf_counter()
        self.data_wait = 0.0
        self.images = 0


class Trainer:
    """Trains until the plan's last step, or until it is told to stop.

    Args:
        plan: Steps, batch sizes and intervals.
        step: Makes the optimizer steps.
        loader: Training batches.
        transform: From a batch, with the run's count of batches before it and the epoch, to images,
            labels and mixed labels.
        evaluate: One evaluation; None where there is no validation set.
        schedule: Multiplier of the plan's learning rate by step.
        loggers: Where numbers go; an empty group on processes that do not log.
        advance: Called with the count of steps after each of them, for a progress bar.
        checkpoints: Keeps checkpoints; None on processes that do not.
        checkpoint_extras: What every checkpoint holds beside the state of the training.
        progress: Where to go on from.
        flops_per_image: Training FLOPs of an image.
        peak_flops: Peak FLOP/s of all devices together; 0 if unknown.
        log_every_n_steps: Steps between two logged rows.
        stop_after_steps: Stop when so many steps have been made; None: at the plan's end.
        device: Where the model is.
        run_directory: For the result.
    """

    def __init__(
        self,
        *,
        plan: TrainPlan,
        step: TrainStep,
        loader: Loader,
        transform: Callable[..., tuple[Tensor, Tensor, MixedLabels | None]],
        evaluate: Callable[[], Evaluation] | None,
        schedule: Schedule,
        loggers: LoggerGroup,
        advance: Callable[[int], None],
        checkpoints: CheckpointKeeper | None,
        checkpoint_extras: dict[str, Any],
        progress: Progress,
        flops_per_image: float,
        peak_flops: float,
        log_every_n_steps: int,
        stop_after_steps: int | None,
        device: torch.device,
        run_directory: Path | None,
    ) -> None:
        self._plan = plan
        self._step = step
        self._loader = loader
        self._transform = transform
        self._evaluate = evaluate
        self._schedule = schedule
        self._loggers = loggers
        self._advance = advance
        self._checkpoints = checkpoints
        self._checkpoint_extras = checkpoint_extras
        self.progress = progress
        self._flops_per_image = flops_per_image
        self._peak_flops = peak_flops
        self._log_every_n_steps = log_every_n_steps
        self._last_step = min(plan.total_steps, stop_after_steps or plan.total_steps)
        self._device = device
        self._run_directory = run_directory
        self._interval = _Interval()
        self._train_loss: float | None = None
        self._step_seconds = STOP_AGREEMENT_SECONDS
        self._steps_between_agreements = 1

    def fit(self) -> TrainResult:
        """Train to the end. A first SIGINT or SIGTERM saves and ends early; a second one kills."""
        progress = self.progress
        stopped_by = ""
        with StopSignals() as signals:
            while progress.step < self._last_step and not stopped_by:
                stopped_by = self._train_epoch(signals)
        if not stopped_by and progress.step < self._plan.total_steps:
            stopped_by = "stop_after_steps"
        return self._result(stopped_by)

    def _train_epoch(self, signals: StopSignals) -> str:
        """Train the rest of the epoch under way. Returns the name of a signal that ended it."""
        plan, progress = self._plan, self.progress
        self._step.model.train()
        self._interval.restart()
        epoch_start = time.perf_counter() - progress.epoch_seconds
        batches = self._loader.epoch(progress.epoch, start_batch=progress.batch)
        while progress.batch < plan.batches_per_epoch:
            logs = self._logs_after(progress.step + 1)
            self._optimizer_step(batches, measure_grad_norm=logs)
            self._advance(progress.step)
            evaluation = self._log() if logs else None
            progress.epoch_seconds = time.perf_counter() - epoch_start
            epoch_ends = progress.batch == plan.batches_per_epoch
            if epoch_ends:
                self._end_epoch()
            stopped_by = self._agreed_stop(signals, at_logged_step=logs)
            is_last = progress.step == self._last_step
            if evaluation or epoch_ends or stopped_by or is_last:
                if not logs:
                    self._gather_sums()  # a stop between two rows must not lose the ranks' shares
                self._save(evaluation)
                self._interval.restart()
            if stopped_by:
                return stopped_by
            if is_last or epoch_ends:
                break
        with suppress(AttributeError):  # an iterator that is no generator has nothing to close
            batches.close()  # type: ignore[attr-defined]
        return ""

    def _agreed_stop(self, signals: StopSignals, *, at_logged_step: bool) -> str:
        """Name of the signal to stop for here; empty to go on.

        All processes must stop at the same step. To agree takes a collective and waits for the
        device, so it is done at logged steps, and in between only where steps take long.
        """
        received = signals.received
        if self._plan.world_size == 1:
            return received.name if received else ""
        if not at_logged_step and self.progress.step % self._steps_between_agreements:
            return ""
        number, step_seconds = largest([received or 0, self._step_seconds], self._device)
        self._steps_between_agreements = max(1, int(STOP_AGREEMENT_SECONDS / step_seconds))
        return signal.Signals(int(number)).name if number else ""

    def _optimizer_step(self, batches: Iterator[Batch], *, measure_grad_norm: bool) -> None:
        plan, progress, interval = self._plan, self.progress, self._interval
        group = min(plan.accumulate_grad_batches, plan.batches_per_epoch - progress.batch)
        for position in range(group):
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                raise UserError(
                    f"the training loader ended after {progress.batch} of "
                    f"{plan.batches_per_epoch} batches",
                    "let its length be the number of batches it yields",
                )
            images, labels, mixed = self._transform(
                batch,
                step=progress.epoch * plan.batches_per_epoch + progress.batch,
                epoch=progress.epoch,
            )
            interval.data_wait += time.perf_counter() - asked
            self._step.accumulate(
                images,
                labels,
                None if mixed is None else (mixed.other_labels, mixed.lam),
                group_size=group,
                last_of_group=position == group - 1,
            )
            interval.images += len(labels) * plan.world_size
            progress.batch += 1
        lr = plan.lr * self._schedule(progress.step)
        self._step.update(lr, step=progress.step, measure_grad_norm=measure_grad_norm)
        progress.step += 1

    def _logs_after(self, step: int) -> bool:
        """Whether a row is logged after `step`: regularly, and wherever something else happens."""
        return (
            step % self._log_every_n_steps == 0
            or step % self._plan.steps_per_epoch == 0
            or step == self._last_step
            or self._plan.evaluates_after(step)
        )

    def _log(self) -> Evaluation | None:
        """Read the gathered numbers (this waits for the device), evaluate if due, write a row."""
        progress, interval = self.progress, self._interval
        values = self._training_values()
        evaluation = None
        if self._evaluate is not None and self._plan.evaluates_after(progress.step):
            evaluation = self._evaluate()
            values |= self._evaluation_values(evaluation)
        self._loggers.log(progress.step, values)
        interval.restart()
        return evaluation

    def _training_values(self) -> dict[str, float]:
        progress, interval, plan = self.progress, self._interval, self._plan
        sums = self._gather_sums()
        metrics = sums.read()
        sums.reset()
        seconds = time.perf_counter() - interval.start
        progress.train_seconds += seconds
        progress.images += interval.images
        self._step_seconds = seconds * plan.images_per_step / interval.images
        self._train_loss = metrics.loss
        if not math.isfinite(metrics.loss):
            raise UserError(
                f"the training loss became {metrics.loss} by step {progress.step}",
                "lower lr, lengthen the warm-up or set grad_clip_val; the last checkpoint is good",
            )
        images_per_second = interval.images / seconds
        values = {
            "epoch": float(progress.epoch),
            "train/loss": metrics.loss,
            "train/acc1": metrics.acc1,
            "train/acc5": metrics.acc5,
            "lr": plan.lr * self._schedule(progress.step - 1),
            "images_per_second": images_per_second,
            "data_wait": interval.data_wait / seconds,
            "memory": float(memory_in_use(self._device)),
        }
        if self._step.grad_norm is not None:
            values["grad_norm"] = self._step.grad_norm.item()
        if self._peak_flops:
            values["mfu"] = images_per_second * self._flops_per_image / self._peak_flops
        return values

    def _gather_sums(self) -> ClassificationSums:
        """The sums of this interval, now over all processes."""
        sums = self._step.sums
        assert sums is not None
        sums.all_reduce()
        return sums

    def _evaluation_values(self, evaluation: Evaluation) -> dict[str, float]:
        metrics, progress = evaluation.metrics, self.progress
        progress.epoch_evaluation_seconds += evaluation.seconds
        progress.last = {
            "val/loss": metrics.loss,
            "val/acc1": metrics.acc1,
            "val/acc5": metrics.acc5,
        }
        if progress.best_acc1 is None or metrics.acc1 > progress.best_acc1:
            progress.best_acc1, progress.best_acc5 = metrics.acc1, metrics.acc5
        return {**progress.last, "eval_seconds": evaluation.seconds}

    def _end_epoch(self) -> None:
        progress = self.progress
        record = EpochRecord(
            epoch=progress.epoch,
            seconds=progress.epoch_seconds,
            evaluation_seconds=progress.epoch_evaluation_seconds,
            val_acc1=progress.last.get("val/acc1"),
        )
        progress.epochs.append(asdict(record))
        progress.epoch += 1
        progress.batch = 0
        progress.epoch_seconds = progress.epoch_evaluation_seconds = 0.0

    def _save(self, evaluation: Evaluation | None) -> None:
        if self._checkpoints is None:
            return
        step, progress = self._step, self.progress
        state = {
            "model": _unwrapped(step.model).state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "scaler": step.scaler.state_dict(),
            "sums": None if step.sums is None else step.sums.state_dict(),
            "average": None if step.average is None else step.average.state_dict(),
            "progress": asdict(progress),
            **self._checkpoint_extras,
        }
        self._checkpoints.save(
            state,
            epoch=progress.epoch - (progress.batch == 0),
            val_acc1=None if evaluation is None else evaluation.metrics.acc1,
        )

    def _result(self, stopped_by: str) -> TrainResult:
        progress = self.progress
        return TrainResult(
            best_acc1=progress.best_acc1,
            best_acc5=progress.best_acc5,
            last_acc1=progress.last.get("val/acc1"),
            last_acc5=progress.last.get("val/acc5"),
            train_loss=self._train_loss,
            val_loss=progress.last.get("val/loss"),
            epoch_seconds=tuple(record["seconds"] for record in progress.epochs),
            images_per_second=progress.images / max(progress.train_seconds, 1e-9),
            steps=progress.step,
            run_directory=self._run_directory,
            stopped_by=stopped_by,
        )


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        inner: torch.nn.Module = model.module
        return inner
    return model
