"""The logged rows of a training: its own numbers, and those of the evaluations."""

from collections.abc import Callable

import torch

from training_framework.loggers import LoggerGroup
from training_framework.machine.hardware import memory_in_use
from training_framework.machine.randomness import random_states, restore_random_states
from training_framework.optimizers import Schedule
from training_framework.plan import TrainPlan
from training_framework.runs.progress import Progress
from training_framework.training.evaluation import Evaluation
from training_framework.training.finiteness import FinitenessGuard
from training_framework.training.interval import Interval
from training_framework.training.metrics import ClassificationSums
from training_framework.training.signals import StopRequested, StopSignals
from training_framework.training.step import TrainStep

__all__ = ["Evaluate", "TrainingLog"]

Evaluate = Callable[[Callable[[], bool] | None], Evaluation]


class TrainingLog:
    """Makes and writes the rows, with an evaluation where one is due.

    Args:
        plan: When to evaluate, and what a step is made of.
        step: Holds the sums and the gradient's norm.
        evaluate: One evaluation, which asks what it is given after every batch whether to stop and
            then raises StopRequested; None where there is no validation set.
        schedule: Multiplier of the plan's learning rate by step.
        loggers: Where the rows go.
        progress: Where the run stands.
        interval: Times and images since the last row.
        guard: Looks at the numbers before they are written or evaluated.
        signals: End an evaluation, which is then made again after a resumption.
        flops_per_image: Training FLOPs of an image.
        peak_flops: Peak FLOP/s of all devices together; 0 if unknown.
        device: Where the model is.

    Attributes:
        train_loss: Of the last row; None before it.
        step_seconds: What a step took in the interval before the last row.
    """

    def __init__(
        self,
        *,
        plan: TrainPlan,
        step: TrainStep,
        evaluate: Evaluate | None,
        schedule: Schedule,
        loggers: LoggerGroup,
        progress: Progress,
        interval: Interval,
        guard: FinitenessGuard,
        signals: StopSignals,
        flops_per_image: float,
        peak_flops: float,
        device: torch.device,
    ) -> None:
        self._plan = plan
        self._step = step
        self._evaluate = evaluate
        self._schedule = schedule
        self._loggers = loggers
        self._progress = progress
        self._interval = interval
        self._guard = guard
        self._signals = signals
        self._flops_per_image = flops_per_image
        self._peak_flops = peak_flops
        self._device = device
        self.train_loss: float | None = None
        # Until one is measured, a step is taken to last long enough that processes agree in each.
        self.step_seconds = 60.0

    def write(self) -> Evaluation | None:
        """Read the gathered numbers (this waits for the device), evaluate if due, write a row.

        What is not written yet stands in the progress (`unlogged`), so that a run that is stopped
        here, or cannot write, goes on with this row.

        Returns:
            The evaluation; None where none was due, or a signal ended it.

        Raises:
            UserError: The numbers are not finite, the data cannot be read, or the row not written.
        """
        progress = self._progress
        evaluates = self._evaluate is not None and self._plan.evaluates_after(progress.step)
        if progress.unlogged is None:
            progress.unlogged = self._training_values(followed_by_evaluation=evaluates)
        values = progress.unlogged
        evaluation = None
        if evaluates:
            evaluation = self._evaluation()
            if evaluation is None:
                return None
            values = values | self._evaluation_values(evaluation)
        self._loggers.log(progress.step, values)
        progress.unlogged = None
        self.train_loss = values["train/loss"]
        self._interval.restart()
        return evaluation

    def _training_values(self, *, followed_by_evaluation: bool) -> dict[str, float]:
        progress, interval, plan = self._progress, self._interval, self._plan
        self._guard.check(progress.step, weights=followed_by_evaluation)
        sums = self.gather_sums()
        metrics = sums.read()
        sums.reset()
        seconds = interval.seconds()
        progress.train_seconds += seconds
        progress.images += interval.images
        self.step_seconds = seconds * plan.images_per_step / interval.images
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

    def gather_sums(self) -> ClassificationSums:
        """The sums of this interval, now over all processes."""
        sums = self._step.sums
        assert sums is not None
        sums.all_reduce()
        return sums

    def _evaluation(self) -> Evaluation | None:
        """Evaluate; None where a signal ended it, and the evaluation is for the resumption."""
        assert self._evaluate is not None
        evaluate, signals = self._evaluate, self._signals
        random = random_states(self._device)
        try:
            if self._plan.world_size == 1:
                return signals.interruptibly(lambda: evaluate(None))
            return evaluate(lambda: signals.received is not None)
        except StopRequested:
            restore_random_states(random, self._device)  # a user's loader may have drawn from them
            return None

    def _evaluation_values(self, evaluation: Evaluation) -> dict[str, float]:
        metrics, progress = evaluation.metrics, self._progress
        progress.epoch_evaluation_seconds += evaluation.seconds
        progress.last = {
            "val/loss": metrics.loss,
            "val/acc1": metrics.acc1,
            "val/acc5": metrics.acc5,
        }
        if not evaluation.is_finite:
            self._loggers.message(
                f"note: the validation loss is {metrics.loss} at step {progress.step}, so these "
                "weights do not count among the best"
            )
        elif progress.best_acc1 is None or metrics.acc1 > progress.best_acc1:
            progress.best_acc1, progress.best_acc5 = metrics.acc1, metrics.acc5
        return {**progress.last, "eval_seconds": evaluation.seconds}
