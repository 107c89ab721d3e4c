"""Repeats a step in smaller parts when memory is full."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from training_framework.data import Batch
from training_framework.errors import UserError
from training_framework.loggers import LoggerGroup
from training_framework.machine.hardware import memory_in_use
from training_framework.machine.memory_shortage import memory_shortage
from training_framework.machine.randomness import random_states, restore_random_states
from training_framework.runs.progress import Progress
from training_framework.training.finiteness import WatchedBatch
from training_framework.training.step import TrainStep

__all__ = ["MicroBatching", "StepStart"]

_ONE_VALUE = "Expected more than 1 value per channel"  # so torch's batch norm refuses a batch


class MicroBatching:
    """Halves the images of a forward pass until a step fits into memory.

    Args:
        step: What computes.
        progress: The run's progress; it keeps the size of the parts.
        device: Where the model is.
        loggers: They get a message about each halving.
        retries: Repeat a step that does not fit, in smaller parts; only for a process that trains
            alone. Otherwise such a step ends the run.
    """

    def __init__(
        self,
        step: TrainStep,
        progress: Progress,
        device: torch.device,
        loggers: LoggerGroup,
        *,
        retries: bool,
    ) -> None:
        self._step = step
        self._progress = progress
        self._device = device
        self._loggers = loggers
        self._start = StepStart(step, device) if retries else None
        step.micro_batch_size = progress.micro_batch_size

    def accumulate(
        self, batches: Iterable[Batch], add_gradient: Callable[[int, Batch], WatchedBatch]
    ) -> list[WatchedBatch]:
        """Add the gradients of a group of batches; if memory is full, repeat in smaller parts.

        Args:
            batches: Of one step; each is taken when those before it are computed.
            add_gradient: Adds a batch's gradient, given its position in the group and the batch.

        Raises:
            UserError: Memory is full, and a retry is not asked for or one image is too much; or a
                batch of one image has one value a channel for a batch norm.
        """
        taken: list[Batch] = []
        done: list[WatchedBatch] = []
        for batch in batches:
            if self._start is not None:
                if not taken:
                    self._start.keep()  # only now: the loader may have drawn random numbers
                taken.append(batch)
            left = [batch]
            while left:
                try:
                    done.append(add_gradient(len(done), left[0]))
                except (RuntimeError, MemoryError) as error:
                    shortage = memory_shortage(error)
                    if shortage is None:
                        raise
                except ValueError as error:
                    if _ONE_VALUE not in str(error):
                        raise
                    raise _one_value(self._progress.step + 1, len(left[0].labels)) from None
                else:
                    del left[0]
                    continue
                # Outside the handler, so that no traceback keeps the step's memory alive.
                self._make_room(shortage, len(left[0].labels))
                done, left = [], taken.copy()
        return done

    def _make_room(self, shortage: str, batch_size: int) -> None:
        """Go back to the step's start and halve the parts."""
        step_number = self._progress.step + 1
        at_once = min(batch_size, self._step.micro_batch_size or batch_size)
        if self._start is None or at_once == 1:
            used = memory_in_use(self._device) / 2**30
            raise UserError(
                f"memory is full in step {step_number} with {at_once} images at once: "
                f"{shortage} ({used:.1f} GiB used by this process)",
                "lower batch_size or img_size, set auto_micro_batch or activation_checkpointing, "
                "or start from --config memory-efficient",
            )
        self._start.restore()
        smaller = self._step.micro_batch_size = self._progress.micro_batch_size = (at_once + 1) // 2
        self._loggers.message(
            f"note: memory is full in step {step_number} with {at_once} images at once; from now "
            f"on each batch is computed in parts of at most {smaller} (the gradients add up to the "
            "same; batch norm sees one part at a time)"
        )


class StepStart:
    """A copy of what the forward passes of a step change, so that the step can be repeated.

    These are the buffers (batch norm's running statistics), the sums of loss and hits, and the
    states of the random generators (for dropout). A copy of each in every step costs time, so only
    runs that ask for it do this.

    Args:
        step: Between two steps.
        device: Where its model is.
    """

    def __init__(self, step: TrainStep, device: torch.device) -> None:
        self._step = step
        self._device = device
        self._buffers = list(step.network.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the state before a step's first forward pass, without waiting for the device."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)
        sums = self._step.sums
        self._sums: dict[str, Tensor] | None = None if sums is None else sums.state_dict()
        self._random = random_states(self._device)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the state at the last `keep`, drop the gradients, and free cached memory."""
        self._step.discard()
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
        if self._step.sums is not None and self._sums is not None:
            self._step.sums.load_state_dict(self._sums)
        restore_random_states(self._random, self._device)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # blocks that only the larger parts could use


def _one_value(step_number: int, batch_size: int) -> UserError:
    why = "batch norm cannot train on one value per channel"
    if batch_size > 1:
        return UserError(
            f"step {step_number} trains on one image of its batch of {batch_size}, and {why}",
            "raise train_on_hardest or batch_size, or choose a larger img_size",
        )
    return UserError(
        f"step {step_number} has a batch of 1 image, and {why}",
        "choose a batch_size that leaves no batch of one image, or a larger img_size; a DataLoader "
        "drops such a last batch with drop_last=True",
    )
