"""Optimizer steps that are recorded once as CUDA graphs and replayed.

A step launches several hundred kernels one by one; a graph launches them all at once. With small
images and small batches, a fast GPU waits for these launches ("CUDA Graphs" in PyTorch's notes on
CUDA semantics).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from training_framework.errors import UserError
from training_framework.training.step import TrainStep

__all__ = ["CudaGraphStep", "Record"]

# PyTorch's notes require a few steps on a side stream before a capture: libraries initialize,
# kernels are chosen, and the optimizer creates its state.
WARM_UP_STEPS = 3

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Records the given work, which need not run yet; returns a function that runs it."""


class CudaGraphStep(TrainStep):
    """A `TrainStep` that replays two graphs: forward and backward, and the update.

    The first steps run normally, on a side stream. Then the step is recorded, with a batch as large
    as any so far. Some batches still run normally in between: those of another shape, those divided
    to save memory, and those of a group of several. The numbers are the same as with kernels
    launched one by one.

    The weight average, whose weight changes with the step, and the sums of the metrics stay
    outside: they are a few launches.

    Args:
        *arguments: As for `TrainStep`, whose compile_mode must leave graphs to this class, and
            whose precision must need no gradient scaling.
        record: How work is recorded; None: as a CUDA graph.
        **options: As for `TrainStep`. The optimizer must be a fused one.
    """

    def __init__(self, *arguments: Any, record: Record | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        assert not (self.compiled and self.compiled.replays_graphs) and not self.scaler.is_enabled()
        self._record = record or _CudaRecord()
        self._steps_made = 0
        self._largest_batch = 0
        self._inputs: list[Tensor] = []
        self._outputs: tuple[Tensor, Tensor] | None = None
        self._gradients: list[Tensor | None] = []
        self._replay_backward: Callable[[], None] | None = None
        self._replay_update: Callable[[], None] | None = None
        self._lr: Tensor | None = None
        self._recorded_norm: Tensor | None = None
        self._side_stream: torch.cuda.Stream | None = None
        self._replays = False

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
        inputs = [images, labels, *(mixed or ())]
        self._largest_batch = max(self._largest_batch, len(labels))
        if self._inputs:
            fits = _kinds(inputs) == _kinds(self._inputs)
        else:  # the last batch of an epoch, which may be small, is not the one to record
            fits = len(labels) == self._largest_batch
        self._replays = (
            fits
            and self._steps_made >= WARM_UP_STEPS
            and group_size == 1
            and (self.micro_batch_size is None or len(labels) <= self.micro_batch_size)
        )
        if not self._replays:
            if self._gradients and self._group_starts:  # those belong to the graphs
                self.optimizer.zero_grad(set_to_none=True)
            with self._warming_up():
                return super().accumulate(
                    images, labels, mixed, group_size=group_size, last_of_group=last_of_group
                )
        with self.phase("backward"):  # and forward: they are one graph
            if self._replay_backward is None:
                self._record_backward(inputs)
            assert self._replay_backward is not None
            torch._foreach_copy_(self._inputs, inputs, non_blocking=True)
            self._replay_backward()
            assert self._outputs is not None
            # The next replay writes into the same memory.
            logits, loss = (output.detach().clone() for output in self._outputs)
        with self.phase("logging"):
            if self.sums is not None:
                self.sums.update(logits, labels, loss)
        return loss

    def update(self, lr: float, *, step: int, measure_grad_norm: bool = False) -> Tensor | None:
        """Move the weights by the gathered gradient; see `TrainStep`."""
        if not self._replays:
            with self._warming_up():
                norm = super().update(lr, step=step, measure_grad_norm=measure_grad_norm)
            self._steps_made += 1
            self._give_back_gradients()
            return norm
        norm = None
        if measure_grad_norm and self._grad_clip_val is None:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            norm = self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        if self._replay_update is None:
            self._record_update()
        assert self._replay_update is not None and self._lr is not None
        self._lr.fill_(lr)
        self._replay_update()
        if self._recorded_norm is not None:  # the next replay writes into the same memory
            norm = self.grad_norm = self._recorded_norm.clone()
        for group in self.optimizer.param_groups:
            group["lr"] = lr  # a checkpoint holds the number
        if self.average is not None:
            self.average.update(self.model, step)
        return norm

    def discard(self) -> None:
        """Forget what `accumulate` gathered; see `TrainStep`."""
        super().discard()
        self._give_back_gradients()

    @contextmanager
    def _warming_up(self) -> Iterator[None]:
        device = self._parameters[0].device
        if device.type != "cuda" or self._steps_made >= WARM_UP_STEPS:
            yield
            return
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        self._side_stream.wait_stream(current)
        with torch.cuda.stream(self._side_stream):
            yield
        current.wait_stream(self._side_stream)

    def _give_back_gradients(self) -> None:
        """Restore the gradient tensors that the graphs read and write; they must not change."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=False):
            parameter.grad = gradient

    def _record_backward(self, inputs: list[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        images, labels, *mixed = self._inputs

        def work() -> None:
            # Without gradients before it, the backward pass writes them instead of adding.
            self.optimizer.zero_grad(set_to_none=True)
            logits, loss = self._forward(images, labels, tuple(mixed) or None)
            loss.backward()
            self._outputs = (logits.detach(), loss.detach())

        with _recording():
            self._replay_backward = self._record(work)
        self._gradients = [parameter.grad for parameter in self._parameters]

    def _record_update(self) -> None:
        self._lr = torch.zeros((), device=self._parameters[0].device)
        groups = self.optimizer.param_groups

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

        # Adam needs this flag, although its fused kernels keep everything on the device.
        told = [group for group in groups if "capturable" in group]
        for group in told:
            group["capturable"] = True
        try:
            with _recording():
                self._replay_update = self._record(work)
        finally:
            for group in told:
                group["capturable"] = False


class _CudaRecord:
    """Records CUDA graphs that share memory, since they are always replayed in the same order."""

    def __init__(self) -> None:
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        pool = self._graphs[0].pool() if self._graphs else None
        # Other threads may meanwhile pin memory for the loader or copy a checkpoint.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        self._graphs.append(graph)
        return graph.replay


@contextmanager
def _recording() -> Iterator[None]:
    """Turn a failed recording into an error with a cure."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"the training step cannot be recorded as a CUDA graph: {first}",
            "set cuda_graph to false",
        ) from error


def _kinds(tensors: list[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]
