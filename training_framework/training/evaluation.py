"""Evaluate a model: every sample once, whatever the number of processes."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from training_framework.data import Loader
from training_framework.errors import UserError
from training_framework.faults import fault_point
from training_framework.machine.distributed import largest
from training_framework.machine.randomness import random_states, restore_random_states
from training_framework.runs.progress import TTA_COLUMN, Progress
from training_framework.training.batch_counting import BatchCounter
from training_framework.training.metrics import ClassificationMetrics
from training_framework.training.stopping import StopRequested, StopSignals

__all__ = ["Evaluate", "Evaluation", "evaluate", "evaluate_unless_stopped", "evaluation_row"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found, and how long it took (all ranks, loading included).

    Attributes:
        metrics: Of the plain images.
        seconds: Wall time.
        acc1_tta: Top-1 accuracy in percent with test-time augmentation; None without it.
    """

    metrics: ClassificationMetrics
    seconds: float
    acc1_tta: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether the loss is finite; otherwise the accuracy says little about the weights."""
        return math.isfinite(self.metrics.loss)


Evaluate = Callable[[Callable[[], bool] | None], Evaluation]
"""One evaluation. If it gets a function, it calls it after every batch; if that returns True, the
evaluation raises StopRequested."""


@torch.inference_mode()
def evaluate(
    counter: BatchCounter,
    loader: Loader,
    *,
    device: torch.device,
    should_stop: Callable[[], bool] | None = None,
) -> Evaluation:
    """Loss (without label smoothing), top-1 and top-5 over a split.

    Each rank counts its own share of the samples and the sums are added up: nothing is padded,
    and no rank waits for another within the pass. The device is waited for once, at the end.

    Args:
        counter: Has the network, and counts its batches; it can be used again.
        loader: Yields this rank's share once.
        device: Where the model is.
        should_stop: Called after every batch. If it returns True on any rank, no rank has a result.

    Raises:
        StopRequested: The evaluation was stopped.
        UserError: There are no images, or memory is too small for one.
    """
    start = time.perf_counter()
    model, sums = counter.model, counter.sums
    was_training = model.training
    model.eval()
    counter.reset()
    stopped = False
    try:
        for batch in loader.epoch(0):
            fault_point("evaluation.batch")
            counter.count(batch)
            stopped = should_stop is not None and should_stop()
            if stopped:
                break
    finally:
        model.train(was_training)
    if should_stop is not None and any(largest([stopped], device)):
        raise StopRequested
    sums.all_reduce()
    metrics = sums.read()
    if not metrics.count:
        raise UserError(
            "the validation data has no image to evaluate",
            "add validation images, or train without a validation set",
        )
    acc1_tta = None
    if counter.sums_tta is not None:
        counter.sums_tta.all_reduce()
        acc1_tta = counter.sums_tta.read().acc1
    return Evaluation(metrics=metrics, seconds=time.perf_counter() - start, acc1_tta=acc1_tta)


def evaluate_unless_stopped(
    evaluate: Evaluate, signals: StopSignals, *, device: torch.device, alone: bool
) -> Evaluation | None:
    """Evaluate; None if a signal ended the evaluation, so that the resumed run must repeat it.

    Args:
        evaluate: What to call.
        signals: Of this process.
        device: Where the model is.
        alone: Whether this process trains alone. Several stop at the same batch.
    """
    random = random_states(device)
    try:
        if alone:
            return signals.interruptibly(lambda: evaluate(None))
        return evaluate(lambda: signals.received is not None)
    except StopRequested:
        restore_random_states(random, device)  # a user's loader may have drawn from them
        return None


def evaluation_row(
    evaluation: Evaluation, progress: Progress, say: Callable[[str], None]
) -> dict[str, float]:
    """Values of an evaluation by their logged names; `progress` keeps them, and the best.

    Args:
        evaluation: Of the weights as they are.
        progress: Of the run.
        say: Says a line to people.
    """
    metrics = evaluation.metrics
    progress.epoch_evaluation_seconds += evaluation.seconds
    progress.last = {"val/loss": metrics.loss, "val/acc1": metrics.acc1, "val/acc5": metrics.acc5}
    if evaluation.acc1_tta is not None:
        progress.last[TTA_COLUMN] = evaluation.acc1_tta
    if not evaluation.is_finite:
        say(
            f"note: the validation loss is {metrics.loss} at step {progress.step}, so these "
            "weights do not count among the best"
        )
    elif progress.best_acc1 is None or metrics.acc1 > progress.best_acc1:
        progress.best_acc1, progress.best_acc5 = metrics.acc1, metrics.acc5
    return {**progress.last, "eval_seconds": evaluation.seconds}
