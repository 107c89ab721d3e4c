"""The values of a logged row; `evaluation.evaluation_row` adds those of an evaluation."""

from training_framework.machine.hardware import memory_in_use
from training_framework.runs.progress import Progress
from training_framework.runs.record import Costs
from training_framework.training.finiteness import FinitenessGuard
from training_framework.training.interval import Interval
from training_framework.training.parts import Parts

__all__ = ["training_row"]


def training_row(
    parts: Parts, costs: Costs, progress: Progress, interval: Interval, guard: FinitenessGuard
) -> dict[str, float]:
    """Values of an interval's steps by their logged names. Waits for the device and all ranks once.

    This checks that all is finite, resets the sums, and adds time and images to `progress`.
    """
    plan, step = parts.plan, parts.step
    weights = plan.evaluates_after(progress.step)  # looked at before an evaluation
    assert step.sums is not None
    norm = {} if step.grad_norm is None else {"grad_norm": step.grad_norm}
    read = step.sums.read_over_processes(guard.suspicion(weights=weights), *norm.values())
    metrics, (suspicion, *norm_read) = read
    guard.settle(suspicion, step=progress.step, weights=weights)
    step.sums.reset()
    seconds = interval.seconds()
    progress.train_seconds += seconds
    progress.images += interval.images
    interval.step_seconds = seconds * plan.images_per_step / interval.images
    row = {
        "epoch": float(progress.epoch),
        "train/loss": metrics.loss,
        "train/acc1": metrics.acc1,
        "train/acc5": metrics.acc5,
        "lr": plan.lr * parts.schedule(progress.step - 1),
        "images_per_second": interval.images / seconds,
        "data_wait": interval.data_wait / seconds,
        "memory": float(memory_in_use(parts.device)),
    }
    row |= zip(norm, norm_read, strict=True)
    if costs.peak_flops:
        row["mfu"] = row["images_per_second"] * parts.flops_in(progress.epoch) / costs.peak_flops
    return row
