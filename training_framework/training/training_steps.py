"""Optimizer steps from a loader's batches."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from training_framework.data import Batch
from training_framework.data.sample_digest import SampleDigest
from training_framework.errors import UserError
from training_framework.faults import fault_point
from training_framework.machine.hardware import memory_in_use
from training_framework.machine.memory_shortage import memory_shortage
from training_framework.optimizers import Schedule
from training_framework.plan import TrainPlan
from training_framework.runs.progress import Progress
from training_framework.training.finiteness import FinitenessGuard, WatchedBatch
from training_framework.training.interval import Interval
from training_framework.training.loaders import Transform
from training_framework.training.micro_batching import StepStart, smaller_micro_batch
from training_framework.training.signals import StopSignals
from training_framework.training.step import TrainStep

__all__ = ["TrainingSteps"]


class TrainingSteps:
    """Takes the batches of a step from the loader, through the transform, to the weights.

    Args:
        plan: Batches of a step and of an epoch, and the learning rate.
        step: What computes.
        transform: From a batch, with the run's count of batches before it and the epoch, to images,
            labels and mixed labels.
        schedule: Multiplier of the plan's learning rate by step.
        progress: Where the run stands; every step moves it on.
        interval: Takes down waiting times and images.
        guard: Is shown every batch and gradient norm.
        signals: May end the wait for a step's first batch.
        report: Says a line to people.
        device: Where the model is.
        auto_micro_batch: Where memory is full, make the step again from its start with half the
            images at a time; for a process that trains alone.
    """

    def __init__(
        self,
        *,
        plan: TrainPlan,
        step: TrainStep,
        transform: Transform,
        schedule: Schedule,
        progress: Progress,
        interval: Interval,
        guard: FinitenessGuard,
        signals: StopSignals,
        report: Callable[[str], None],
        device: torch.device,
        auto_micro_batch: bool,
    ) -> None:
        self._plan = plan
        self._step = step
        self._transform = transform
        self._schedule = schedule
        self._progress = progress
        self._interval = interval
        self._guard = guard
        self._signals = signals
        self._report = report
        self._device = device
        self._samples = SampleDigest(progress.sample_digest)
        self._step_start = StepStart(step, device) if auto_micro_batch else None
        step.micro_batch_size = progress.micro_batch_size

    def sample_digest(self) -> str:
        """Digest of the epoch's samples so far. Waits for the device."""
        return self._samples.read()

    def start_epoch(self) -> None:
        """The samples from here on are those of another epoch."""
        self._samples = SampleDigest()

    def make(self, batches: Iterator[Batch], *, measure_grad_norm: bool) -> None:
        """One step over a group of batches; where memory is full, again in smaller parts.

        Raises:
            StopRequested: A signal came while the step waited for its first batch: the step is as
                if it had not begun.
        """
        plan, progress, step = self._plan, self._progress, self._step
        group_size = min(plan.accumulate_grad_batches, plan.batches_per_epoch - progress.batch)
        again: list[Batch] = []
        done: list[WatchedBatch] = []
        while len(done) < group_size:
            position = len(done)
            batch = again[position] if position < len(again) else self._next(batches, position)
            if self._step_start is not None and position == len(again):
                if position == 0:
                    self._step_start.keep()  # after a loader may have drawn what it augments with
                again.append(batch)
            loss = self._accumulate(batch, position, group_size)
            if loss is None:
                done.clear()
            else:
                done.append(WatchedBatch.of(batch, loss))
        lr = plan.lr * self._schedule(progress.step)
        fault_point("step.before_update")
        norm = step.update(lr, step=progress.step, measure_grad_norm=measure_grad_norm)
        fault_point("step.after_update")
        progress.step += 1
        self._guard.watch(
            done, norm, step=progress.step, epoch=progress.epoch, first_batch=progress.batch
        )
        for watched in done:
            self._samples.add(watched.indices)
            self._interval.images += len(watched.indices) * plan.world_size
        progress.batch += group_size

    def _next(self, batches: Iterator[Batch], position: int) -> Batch:
        asked = time.perf_counter()
        if position == 0 and self._plan.world_size == 1:
            # Nothing of the step is done yet, and no other process counts on it.
            batch = self._signals.interruptibly(lambda: next(batches, None))
        else:
            batch = next(batches, None)
        if batch is None:
            raise UserError(
                f"the training loader ended after {self._progress.batch + position} of "
                f"{self._plan.batches_per_epoch} batches",
                "let its length be the number of batches it yields",
            )
        self._interval.data_wait += time.perf_counter() - asked
        return batch

    def _accumulate(self, batch: Batch, position: int, group_size: int) -> Tensor | None:
        """Add a batch's gradient: its loss, or None where the step is to be made again."""
        plan, progress = self._plan, self._progress
        try:
            start = time.perf_counter()
            images, labels, mixed = self._transform(
                batch,
                step=progress.epoch * plan.batches_per_epoch + progress.batch + position,
                epoch=progress.epoch,
            )
            self._interval.data_wait += time.perf_counter() - start
            return self._step.accumulate(
                images,
                labels,
                None if mixed is None else (mixed.other_labels, mixed.lam),
                group_size=group_size,
                last_of_group=position == group_size - 1,
            )
        except (RuntimeError, MemoryError) as error:
            shortage = memory_shortage(error)
            if shortage is None:
                raise
        # Here, where no traceback holds on to what the step had in memory.
        self._make_room(shortage, len(batch.labels))
        return None

    def _make_room(self, shortage: str, batch_size: int) -> None:
        """Go back to the step's start, for smaller parts of its batches.

        Raises:
            UserError: That is not asked for, or one image is too much.
        """
        step, progress = self._step, self._progress
        at_once = min(batch_size, step.micro_batch_size or batch_size)
        smaller = smaller_micro_batch(at_once)
        if self._step_start is None or smaller is None:
            used = memory_in_use(self._device) / 2**30
            raise UserError(
                f"memory is full in step {progress.step + 1} with {at_once} images at once: "
                f"{shortage} ({used:.1f} GiB used by this process)",
                "lower batch_size or img_size, set auto_micro_batch or activation_checkpointing, "
                "or start from --config memory-efficient",
            )
        self._step_start.restore()
        step.micro_batch_size = progress.micro_batch_size = smaller
        self._report(
            f"note: memory is full in step {progress.step + 1} with {at_once} images at once; from "
            f"here on each batch goes in parts of at most {smaller} (the same gradients summed; "
            "batch norm sees a part at a time)"
        )
