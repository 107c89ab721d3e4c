"""NaN and infinity: found where the device is waited for anyway, named by step and samples."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from training_framework.data import Batch
from training_framework.errors import UserError
from training_framework.machine.distributed import gathered, share_largest
from training_framework.training.state import TrainState

__all__ = ["FinitenessGuard", "WatchedBatch"]

_MAX_NAMED_SAMPLES = 16
# Below fp16's smallest normal number not even a gradient of 1 is left of a scaled loss; a scale
# gets there from its first value by 30 skipped steps in a row.
_SMALLEST_SCALE = 2.0**-14
_GOOD_CHECKPOINTS = "the checkpoints of this run are from before it"
_CURE = f"lower lr, lengthen the warm-up or set grad_clip_val; {_GOOD_CHECKPOINTS}"


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
    """A watched step: counted from 1; its epoch and its first batch's place in that from 0."""

    step: int
    epoch: int
    first_batch: int
    batches: Sequence[WatchedBatch]

    def numbered(self) -> Iterator[tuple[str, WatchedBatch]]:
        """Its batches, and what to call each."""
        for number, batch in enumerate(self.batches, self.first_batch):
            yield f"batch {number} of epoch {self.epoch}", batch


class _Fault(NamedTuple):
    """What went wrong, ordered by the step that it happened in."""

    step: int
    fault: str
    cure: str


class FinitenessGuard:
    """Finds the first step whose loss, gradient, weights or norm statistics are not finite.

    `watch` keeps references only. `check` reads one number from the device, whether a sum of all is
    finite: it looks closer only where that is not. A sum may overflow where every number is finite;
    then nothing is wrong.

    With fp16, gradients overflow at times: those steps are skipped and the scale is lowered. So an
    fp16 gradient is no fault, but a scale that has fallen to nearly nothing is.

    Args:
        state: Whose model and optimizer are watched.
        sample_name: From a sample's position in the training split to its name.
        device: Where the model is.
    """

    def __init__(
        self, state: TrainState, sample_name: Callable[[int], str], device: torch.device
    ) -> None:
        self._trained = state
        self._sample_name = sample_name
        self._device = device
        self._buffers = [
            (name, buffer)
            for name, buffer in state.network.named_buffers()
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
        if gradient_norm is not None and not self._trained.scaler.is_enabled():
            self._norms.append((step, gradient_norm))

    def check(self, step: int, *, weights: bool) -> None:
        """Raise an error if anything since the last check is not finite. Waits for the device.

        All processes must call it at the same point.

        Args:
            step: Steps made.
            weights: Also check the weights and the optimizer's state, as before a save or an
                evaluation; this takes about as long as copying them.

        Raises:
            UserError: Something is not finite; it names the first step and its samples.
        """
        if not (weights and step == self._sound_step):
            suspicion = self.suspicion(weights=weights).item()
            self.settle(suspicion, step=step, weights=weights)

    @torch.no_grad()
    def suspicion(self, *, weights: bool) -> Tensor:
        """1 if any process has to look closer, or 0: the first half of a `check`, without a wait.

        Args:
            weights: As for `check`.

        Returns:
            A scalar on the device, float32, to be read and given to `settle`.
        """
        suspects = [torch.zeros((), device=self._device)]
        losses = [batch.loss for watched in self._steps for batch in watched.batches]
        if losses:
            suspects.append(torch.stack(losses).sum())
        if self._norms:
            suspects.append(torch.stack([norm for _, norm in self._norms]).sum())
        if self._buffers:
            suspects.append(get_total_norm([buffer for _, buffer in self._buffers]))
        if weights:
            suspects.append(get_total_norm([tensor for _, tensor in self._state()]))
        found = ~torch.stack(suspects).sum().isfinite()
        scaler = self._trained.scaler
        if scaler.is_enabled():
            found |= scaler.scale(torch.ones((), device=self._device)) < _SMALLEST_SCALE
        return share_largest(found.float())

    def settle(self, suspicion: float, *, step: int, weights: bool) -> None:
        """The second half of a `check`, once its suspicion has been read.

        Raises:
            UserError: As for `check`.
        """
        if suspicion:
            found = [fault for fault in gathered(self._first_fault(step)) if fault is not None]
            if found:
                raise UserError(*min(found)[1:])
        # Another check before a save needs the samples of this step.
        self._steps = [watched for watched in self._steps if watched.step == step]
        self._norms.clear()
        if weights:
            self._sound_step = step

    def _scale_collapsed(self) -> bool:
        scaler = self._trained.scaler
        return scaler.is_enabled() and scaler.get_scale() < _SMALLEST_SCALE

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """The weights, and the optimizer's state if faults in it do not show in the weights."""
        parameters = [
            (name, parameter.detach())
            for name, parameter in self._trained.network.named_parameters()
            if parameter.numel()
        ]
        yield from parameters
        optimizer = self._trained.optimizer
        if isinstance(optimizer, torch.optim.SGD):
            return  # its momentum is added to the weights
        # If Adam's second moment becomes infinite, it silently stops a weight from changing.
        for name, parameter in self._trained.network.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                if key != "step" and isinstance(value, Tensor) and value.is_floating_point():
                    yield f"{key} of {name}", value

    def _first_fault(self, step: int) -> _Fault | None:
        # Of one step's faults, the first in this order is the cause of the others.
        faults = [*self._bad_losses(), *self._bad_gradients(), *self._bad_state(step)]
        return min(faults, key=lambda fault: fault.step, default=None)

    def _bad_losses(self) -> Iterator[_Fault]:
        for watched in self._steps:
            for place, batch in watched.numbered():
                loss = batch.loss.item()
                if not math.isfinite(loss):
                    yield self._bad_loss(watched.step, f"at step {watched.step}, {place}", batch)

    def _bad_loss(self, step: int, where: str, batch: WatchedBatch) -> _Fault:
        sums = batch.image_sums
        if sums is not None and not sums.isfinite().all():
            return _Fault(
                step,
                f"images of the training loader hold NaN or inf, {where}: "
                f"{self._named(batch.indices[~sums.isfinite()])}",
                f"fix what it yields; {_GOOD_CHECKPOINTS}",
            )
        became = f"the training loss became {batch.loss.item()}"
        return _Fault(step, f"{became} {where}: {self._named(batch.indices)}", _CURE)

    def _bad_gradients(self) -> Iterator[_Fault]:
        for step, norm in self._norms:
            if not math.isfinite(norm.item()):
                became = f"the gradient became {norm.item()}"
                yield _Fault(step, f"{became} {self._place_of(step)}", _CURE)
        if self._scale_collapsed() and self._steps:
            step = self._steps[-1].step
            yield _Fault(
                step,
                "fp16 gradients overflow whatever their scale, which has fallen to "
                f"{self._trained.scaler.get_scale():.1g} {self._place_of(step)}",
                f"use precision bf16-mixed or 32, or lower lr; {_GOOD_CHECKPOINTS}",
            )

    def _bad_state(self, step: int) -> Iterator[_Fault]:
        # If every loss up to this step was finite, its update or forward pass is the cause.
        for name, tensor in [*self._state(), *self._buffers]:
            bad = tensor[~tensor.isfinite()]
            if len(bad):
                became = f"{name} became {bad[0].item()}"
                yield _Fault(step, f"{became} {self._place_of(step)}", _CURE)
                return

    def _place_of(self, step: int) -> str:
        batches = "; ".join(
            f"{place}: {self._named(batch.indices)}"
            for watched in self._steps
            if watched.step == step
            for place, batch in watched.numbered()
        )
        return f"at step {step}, {batches}"

    def _named(self, indices: Tensor) -> str:
        names = [self._sample_name(index) for index in indices[:_MAX_NAMED_SAMPLES].tolist()]
        more = len(indices) - len(names)
        return f"samples {', '.join(names)}" + (f" and {more} more" if more else "")
