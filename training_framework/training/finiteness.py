"""NaN and infinity: found where the device is waited for anyway, named by step and samples."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from training_framework.data import Batch
from training_framework.errors import UserError
from training_framework.machine.distributed import gathered, largest
from training_framework.training.step import TrainStep

__all__ = ["FinitenessGuard", "WatchedBatch"]

_MOST_NAMED_SAMPLES = 16
# Below fp16's smallest normal number not even a gradient of 1 is left of a scaled loss; a scale
# gets there from its first value by 30 skipped steps in a row.
_SMALLEST_SCALE = 2.0**-14
_LOWER = "lower lr, lengthen the warm-up or set grad_clip_val"
_GOOD_CHECKPOINTS = "the checkpoints of this run are from before it"


class WatchedBatch(NamedTuple):
    """What is kept of a batch until the next check: references, on the device.

    Attributes:
        indices: (N,) int64, positions in the split.
        loss: The batch's mean loss, a scalar.
        image_sums: (N,) sums of images that came as floats, from a user's own loader; None where
            they came as bytes, which are always finite.
    """

    indices: Tensor
    loss: Tensor
    image_sums: Tensor | None

    @classmethod
    def of(cls, batch: Batch, loss: Tensor) -> "WatchedBatch":
        """Of a batch as the loader gave it. Does not wait for the device."""
        sums = None
        if batch.images.is_floating_point():
            sums = batch.images.sum(dim=(1, 2, 3), dtype=torch.float32)
        return cls(batch.indices, loss, sums)


class _Step(NamedTuple):
    """A watched step: counted from 1, its epoch and the place of its first batch from 0."""

    step: int
    epoch: int
    first_batch: int
    batches: Sequence[WatchedBatch]


class _Fault(NamedTuple):
    """What went wrong, ordered by the step that it happened in."""

    step: int
    fault: str
    cure: str


class FinitenessGuard:
    """Finds the first step whose loss, gradient, weights or norm statistics are not finite.

    A step adds references alone. `check` reads one number from the device; only where
    that is not finite does it look closer. A sum or a norm may overflow where every number is
    finite; then nothing is wrong.

    With fp16, gradients that overflow are normal: their steps are skipped and the scale is lowered.
    So there a gradient is no fault, but a scale that has fallen to nearly nothing is.

    Args:
        step: Whose model and optimizer are watched.
        sample_name: From a sample's position in the training split to its name.
        device: Where the model is.
    """

    def __init__(
        self, step: TrainStep, *, sample_name: Callable[[int], str], device: torch.device
    ) -> None:
        self._step = step
        self._sample_name = sample_name
        self._device = device
        self._buffers = [
            (name, buffer)
            for name, buffer in step.network.named_buffers()
            if buffer.is_floating_point() and buffer.numel()
        ]
        self._steps: list[_Step] = []
        self._norms: list[tuple[int, Tensor]] = []
        self._sound_step = -1

    def watch(
        self,
        batches: Sequence[WatchedBatch],
        gradient_norm: Tensor | None,
        *,
        step: int,
        epoch: int,
        first_batch: int,
    ) -> None:
        """Take note of a step. Does not wait for the device.

        Args:
            batches: Of the step, in their order.
            gradient_norm: A scalar; None where it was not measured.
            step: Counted from 1.
            epoch: Of the step, from 0.
            first_batch: Place of the step's first batch in the epoch, from 0.
        """
        self._steps.append(_Step(step, epoch, first_batch, batches))
        if gradient_norm is not None and not self._step.scaler.is_enabled():
            self._norms.append((step, gradient_norm))

    def check(self, step: int, *, weights: bool) -> None:
        """Raise where anything since the last check is not finite. Waits for the device.

        All processes must call it at the same point.

        Args:
            step: Steps made.
            weights: Look at the weights and the optimizer's state too, as before a save or an
                evaluation; it takes about as long as to copy them.

        Raises:
            UserError: Something is not finite; it names the first step and its samples.
        """
        if weights and step == self._sound_step:
            return
        suspects = []
        losses = [batch.loss for watched in self._steps for batch in watched.batches]
        if losses:
            suspects.append(torch.stack(losses).sum())
        if self._norms:
            suspects.append(torch.stack([norm for _, norm in self._norms]).sum())
        if self._buffers:
            suspects.append(get_total_norm([buffer for _, buffer in self._buffers]))
        if weights:
            suspects.append(get_total_norm([tensor for _, tensor in self._state()]))
        suspicious = self._scale_collapsed()
        if suspects:
            suspicious |= not math.isfinite(torch.stack(suspects).sum().item())
        if any(largest([suspicious], self._device)):
            found = [fault for fault in gathered(self._first_fault(step)) if fault is not None]
            if found:
                raise UserError(*min(found)[1:])
        # The samples of this step are wanted if it is checked again before a save.
        self._steps = [watched for watched in self._steps if watched.step == step]
        self._norms.clear()
        if weights:
            self._sound_step = step

    def _scale_collapsed(self) -> bool:
        scaler = self._step.scaler
        return scaler.is_enabled() and scaler.get_scale() < _SMALLEST_SCALE

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """The weights, and the optimizer's state where the weights tell nothing of it."""
        parameters = [
            (name, parameter.detach())
            for name, parameter in self._step.network.named_parameters()
            if parameter.numel()
        ]
        yield from parameters
        optimizer = self._step.optimizer
        if isinstance(optimizer, torch.optim.SGD):
            return  # its momentum is added to the weights
        # Adam's second moment can become infinite, which stops a weight without a sign.
        for name, parameter in self._step.network.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                if key != "step" and isinstance(value, Tensor) and value.is_floating_point():
                    yield f"{key} of {name}", value

    def _first_fault(self, step: int) -> _Fault | None:
        faults = [self._fault_of_loss(), self._fault_of_gradient(), self._fault_of_state(step)]
        # Of one step's faults, the first in this order is the cause of the others.
        return min(
            (fault for fault in faults if fault is not None),
            key=lambda fault: fault.step,
            default=None,
        )

    def _fault_of_loss(self) -> _Fault | None:
        for watched in self._steps:
            for number, batch in enumerate(watched.batches, watched.first_batch):
                loss = batch.loss.item()
                if not math.isfinite(loss):
                    where = f"at step {watched.step}, batch {number} of epoch {watched.epoch}"
                    return _Fault(watched.step, *self._cause_of_loss(batch, loss, where))
        return None

    def _cause_of_loss(self, batch: WatchedBatch, loss: float, where: str) -> tuple[str, str]:
        sums = batch.image_sums
        if sums is not None and not sums.isfinite().all():
            return (
                f"images of the training loader hold NaN or inf, {where}: "
                f"{self._named(batch.indices[~sums.isfinite()])}",
                f"mend what it yields; {_GOOD_CHECKPOINTS}",
            )
        return (
            f"the training loss became {loss} {where}: {self._named(batch.indices)}",
            f"{_LOWER}; {_GOOD_CHECKPOINTS}",
        )

    def _fault_of_gradient(self) -> _Fault | None:
        for step, norm in self._norms:
            value = norm.item()
            if not math.isfinite(value):
                return _Fault(
                    step,
                    f"the gradient became {value} at step {step}, {self._batches_of(step)}",
                    f"{_LOWER}; {_GOOD_CHECKPOINTS}",
                )
        if self._scale_collapsed() and self._steps:
            step = self._steps[-1].step
            return _Fault(
                step,
                "fp16 gradients overflow whatever their scale, which has fallen to "
                f"{self._step.scaler.get_scale():.1g} at step {step}, {self._batches_of(step)}",
                f"use precision bf16-mixed or 32, or lower lr; {_GOOD_CHECKPOINTS}",
            )
        return None

    def _fault_of_state(self, step: int) -> _Fault | None:
        # Every loss up to this step was finite, so it was this step's update or forward pass.
        for name, tensor in [*self._state(), *self._buffers]:
            bad = tensor[~tensor.isfinite()]
            if len(bad):
                return _Fault(
                    step,
                    f"{name} became {bad[0].item()} at step {step}, {self._batches_of(step)}",
                    f"{_LOWER}; {_GOOD_CHECKPOINTS}",
                )
        return None

    def _batches_of(self, step: int) -> str:
        return "; ".join(
            f"batch {number} of epoch {watched.epoch}: {self._named(batch.indices)}"
            for watched in self._steps
            if watched.step == step
            for number, batch in enumerate(watched.batches, watched.first_batch)
        )

    def _named(self, indices: Tensor) -> str:
        names = [self._sample_name(index) for index in indices[:_MOST_NAMED_SAMPLES].tolist()]
        more = len(indices) - len(names)
        return f"samples {', '.join(names)}" + (f" and {more} more" if more else "")
