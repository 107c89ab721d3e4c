"""Optimizer steps that are recorded once as CUDA graphs and replayed.

A step launches several hundred kernels one by one; a graph launches them all at once. With small
images and small batches, a fast GPU waits for these launches ("CUDA Graphs" in PyTorch's notes on
CUDA semantics).
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from training_framework.data import Batch, DrawnBatch, TrainTransform
from training_framework.errors import UserError
from training_framework.machine.distributed import gathered, largest
from training_framework.training.loss import StepInput
from training_framework.training.recording import (
    CudaRecord,
    Record,
    on_stream,
    reason_of,
    root_cause,
)
from training_framework.training.step import TrainStep

__all__ = ["CudaGraphStep"]

# PyTorch's notes require a few steps on a side stream before a capture: libraries initialize,
# kernels are chosen, and the optimizer creates its state.
WARM_UP_STEPS = 3
# And 11 with DistributedDataParallel, which reads clocks of CUDA in its first ten.
DDP_WARM_UP_STEPS = 11

_Inputs = Sequence[Tensor | None]
_Kinds = tuple[tuple[torch.Size, torch.dtype] | None, ...]


class CudaGraphStep(TrainStep):
    """A `TrainStep` that replays two graphs.

    The first holds augmentation, forward, backward and the sums of the metrics; the second clips,
    updates the weights and moves their average. What changes from step to step is copied in: the
    batch with its draws, the learning rate and the average's decay.

    The first steps run normally, on a side stream. Then the step is recorded, with a batch as large
    as any so far, of a shape that has run normally before. Some batches still run normally in
    between: those of another shape, those divided to save memory, and those of a group of several.
    The numbers are those of kernels launched one by one, with the learning rate rounded to fp32.

    With several processes, the first graph also adds up their gradients. Either all processes
    replay or none, so all must be given batches of the same shapes in the same steps.

    Args:
        *arguments: As for `TrainStep`, whose compile_mode must leave graphs to this class, and
            whose precision must need no gradient scaling.
        record: How work is recorded; None: as a CUDA graph.
        is_required: Whether a step that cannot be recorded is an error, or runs normally; with
            several processes it must be an error, since DistributedDataParallel may be in the
            middle of a pass.
        ddp_stream: With several processes, the stream that DistributedDataParallel was made on. It
            is what all steps run on that are not replayed, and what they are recorded on.
        **options: As for `TrainStep`. The optimizer must be a fused one, and the weight average
            must keep its decay on the device.
    """

    def __init__(
        self,
        *arguments: Any,
        record: Record | None = None,
        is_required: bool = True,
        ddp_stream: torch.cuda.Stream | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        assert not (self.compiled and self.compiled.replays_graphs) and not self.scaler.is_enabled()
        self._record: Record | None = record or CudaRecord(ddp_stream)  # None after a failure
        self._is_required = is_required
        self._report: Callable[[str], None] = _warn
        self._warm_up_steps = WARM_UP_STEPS
        if isinstance(self.model, DistributedDataParallel):
            on_cuda = self._parameters[0].device.type == "cuda"
            assert is_required and on_cuda == (ddp_stream is not None)
            self._warm_up_steps = DDP_WARM_UP_STEPS
        self._steps_made = 0
        self._kinds: _Kinds | None = None  # of the present step, if it computes its batch at once
        self._steps_of: Counter[_Kinds] = Counter()
        self._largest_batch = 0
        self._drawn: tuple[TrainTransform, DrawnBatch] | None = None
        self._transform: TrainTransform | None = None
        self._inputs: _Inputs = ()
        self._loss: Tensor | None = None
        self._gradients: list[Tensor | None] = []
        self._replay_backward: Callable[[], None] | None = None
        self._replay_update: Callable[[], None] | None = None
        self._lr: Tensor | None = None
        self._recorded_norm: Tensor | None = None
        self._side_stream = self._ddp_stream = ddp_stream
        self._replays = False

    def report_to(self, report: Callable[[str], None]) -> None:
        """Say through `report` where a step cannot be compiled or recorded, and runs without."""
        super().report_to(report)
        self._report = report

    def transformed(
        self, transform: TrainTransform, batch: Batch, *, step: int, epoch: int
    ) -> StepInput:
        """A loaded batch as it is: `accumulate` augments it, in the graph where there is one."""
        drawn = transform.drawn(batch, step=step, epoch=epoch)
        self._drawn = (transform, drawn)
        return drawn.images, drawn.labels, None

    def accumulate(
        self,
        images: Tensor,
        labels: Tensor,
        mixed: tuple[Tensor, Tensor] | None = None,
        *,
        group_size: int = 1,
        last_of_group: bool = True,
    ) -> Tensor:
        """Add one batch's gradient to the step's; see `TrainStep`."""
        transform, inputs = self._taken(images, labels, mixed)
        self._largest_batch = max(self._largest_batch, len(labels))
        at_once = self.micro_batch_size is None or len(labels) <= self.micro_batch_size
        self._kinds = _kinds(inputs) if at_once and group_size == 1 else None
        self._replays = (
            self._record is not None
            and self._kinds is not None
            and self._fits(transform, inputs)
            and (self._replay_update is not None or self._record_step(transform, inputs))
        )
        if not self._replays:
            if self._gradients and self._group_starts:  # those belong to the graphs
                self.optimizer.zero_grad(set_to_none=True)
            with self._warming_up():
                with self.phase("transform"):
                    prepared = _prepared(transform, inputs)
                return super().accumulate(
                    *prepared, group_size=group_size, last_of_group=last_of_group
                )
        assert self._replay_backward is not None
        with self.phase("backward"):  # and all that is before it: they are one graph
            torch._foreach_copy_(_present(self._inputs), _present(inputs), non_blocking=True)
            self._replay_backward()
            assert self._loss is not None
            return self._loss.clone()  # the next replay writes into the same memory

    def update(self, lr: float, *, step: int, measure_grad_norm: bool = False) -> Tensor | None:
        """Move the weights by the gathered gradient; see `TrainStep`."""
        if not self._replays:
            with self._warming_up():
                norm = super().update(lr, step=step, measure_grad_norm=measure_grad_norm)
            self._steps_made += 1
            if self._kinds is not None:
                self._steps_of[self._kinds] += 1
            self._give_back_gradients()
            return norm
        norm = None
        if measure_grad_norm and self._grad_clip_val is None:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            norm = self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        assert self._replay_update is not None and self._lr is not None
        self._lr.fill_(lr)
        if self.average is not None:
            self.average.set_decay(step)
        self._replay_update()
        if self._recorded_norm is not None:  # the next replay writes into the same memory
            norm = self.grad_norm = self._recorded_norm.clone()
        for group in self.optimizer.param_groups:
            group["lr"] = lr  # a checkpoint holds the number
        return norm

    def discard(self) -> None:
        """Forget what `accumulate` gathered; see `TrainStep`."""
        super().discard()
        self.forget_recording()  # memory is short, and only whole batches are replayed

    def load_state_dict(self, state: dict[str, Any], *, with_sums: bool = True) -> None:
        """Restore what `state_dict` returned; see `TrainState`."""
        self.forget_recording()  # it reads and writes the optimizer's tensors of before
        super().load_state_dict(state, with_sums=with_sums)

    def _taken(
        self, images: Tensor, labels: Tensor, mixed: tuple[Tensor, Tensor] | None
    ) -> tuple[TrainTransform | None, _Inputs]:
        """What is to be computed with: a batch from `transformed`, or one that is ready."""
        drawn, self._drawn = self._drawn, None
        if drawn is not None and drawn[1].images is images:
            return drawn
        return None, (images, labels, *(mixed or (None, None)))

    def _fits(self, transform: TrainTransform | None, inputs: _Inputs) -> bool:
        """Whether the batch is like the recorded one, or may be the one to record."""
        if self._inputs:
            return transform is self._transform and _kinds(inputs) == _kinds(self._inputs)
        # The last batch of an epoch, which may be small, is not the one to record. And where a
        # shape is new, cuDNN times its kernels, which cannot be recorded.
        images = inputs[0]
        is_warm = self._steps_of[_kinds(inputs)] >= self._warm_up_steps
        return is_warm and images is not None and len(images) == self._largest_batch

    def _warming_up(self) -> AbstractContextManager[None]:
        device, is_warm = self._parameters[0].device, self._steps_made >= self._warm_up_steps
        if device.type != "cuda" or (is_warm and self._ddp_stream is None):
            return nullcontext()
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(device)
        return on_stream(self._side_stream)

    def _give_back_gradients(self) -> None:
        """Restore the gradient tensors that the graphs read and write; they must not change."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=False):
            parameter.grad = gradient

    def _record_step(self, transform: TrainTransform | None, inputs: _Inputs) -> bool:
        """Record both graphs, or neither; the same in all processes.

        Raises:
            UserError: The step cannot be recorded, here or in another process, and recording is
                required.
            torch.OutOfMemoryError: Memory is full, recording is required, and this process is the
                only one.
        """
        failure: RuntimeError | None = None
        try:
            self._record_backward(transform, inputs)
            self._record_update()
        except RuntimeError as error:
            failure = error
        # A process that launches what another one has recorded would wait for it for ever.
        if not largest([float(failure is not None)], self._parameters[0].device)[0]:
            return True
        cause = None if failure is None else root_cause(failure)
        reasons = gathered("" if cause is None else reason_of(cause))
        fault = f"the training step cannot be recorded as a CUDA graph: {max(reasons, key=bool)}"
        if self._is_required:
            if isinstance(cause, torch.OutOfMemoryError) and len(reasons) == 1:
                raise cause from None
            raise UserError(fault, "set cuda_graph to false") from failure
        failure = cause = None  # their traceback would keep the recording's memory alive
        self._record = None
        self.forget_recording()
        self._report(f"note: {fault}; it runs without")
        return False

    def forget_recording(self) -> None:
        """Free the graphs, which must be gone before the group of the processes ends.

        NCCL waits for all graphs with its operations before it ends.
        """
        self._replay_backward = self._replay_update = None
        self._inputs, self._gradients = (), []
        self._loss = self._recorded_norm = None
        self.optimizer.zero_grad(set_to_none=True)

    def _record_backward(self, transform: TrainTransform | None, inputs: _Inputs) -> None:
        self._transform = transform
        self._inputs = [None if tensor is None else tensor.clone() for tensor in inputs]

        def work() -> None:
            # Without gradients before it, the backward pass writes them instead of adding.
            self.optimizer.zero_grad(set_to_none=True)
            images, labels, mixed = _prepared(transform, self._inputs)
            logits, loss = self._forward(images, labels, mixed)
            loss.backward()
            self._loss = loss.detach()
            if self.sums is not None:
                self.sums.count(logits.detach(), labels, self._loss)

        assert self._record is not None
        self._replay_backward = self._record(work)
        self._gradients = [parameter.grad for parameter in self._parameters]

    def _record_update(self) -> None:
        self._lr = torch.zeros((), device=self._parameters[0].device)
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]

        def work() -> None:
            if self._grad_clip_val is not None:
                gradients = [p.grad for p in self._parameters if p.grad is not None]
                self._recorded_norm = torch.nn.utils.get_total_norm(gradients)
                torch.nn.utils.clip_grads_with_norm_(
                    self._parameters, self._grad_clip_val, self._recorded_norm
                )
            for group in groups:
                group["lr"] = self._lr
            self.optimizer.step()
            if self.average is not None:
                self.average.blend(self.model)

        # Adam needs this flag, although its fused kernels keep everything on the device.
        told = [group for group in groups if "capturable" in group]
        for group in told:
            group["capturable"] = True
        assert self._record is not None
        try:
            self._replay_update = self._record(work)
        finally:
            for group in told:
                group["capturable"] = False
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate


def _prepared(transform: TrainTransform | None, inputs: _Inputs) -> StepInput:
    """What the network computes with: the batch augmented, if it is one from a loader."""
    if transform is None:
        images, labels, others, share = inputs
        assert images is not None and labels is not None
        return images, labels, None if others is None or share is None else (others, share)
    images, labels, *draws = inputs
    assert images is not None and labels is not None
    images, labels, mixed = transform.augmented(DrawnBatch(images, labels, *draws))
    return images, labels, None if mixed is None else (mixed.other_labels, mixed.lam)


def _present(inputs: _Inputs) -> list[Tensor]:
    return [tensor for tensor in inputs if tensor is not None]


def _kinds(inputs: _Inputs) -> _Kinds:
    return tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in inputs)


def _warn(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=2)
