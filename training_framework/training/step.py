"""One optimizer step: forward, loss, backward over a group of batches, then one update."""

import torch
from torch import Tensor, nn

from training_framework.machine.precision import Precision, autocast
from training_framework.optimizers import WeightAverage, set_rates
from training_framework.training.compiled_forward import CompiledForward
from training_framework.training.loss import MixedWith, classification_loss
from training_framework.training.metrics import ClassificationSums
from training_framework.training.phases import EnterPhase, untimed
from training_framework.training.state import TrainState

__all__ = ["TrainStep"]


class TrainStep(TrainState):
    """Makes optimizer steps and never waits for the device while doing so.

    A step is `accumulate` for each batch of a group, then `update`. (With fp16 and an optimizer
    that is not fused, torch's GradScaler reads one flag from the device in every step.)

    Args:
        model: The network, in DDP or not, on its device and in its memory format.
        optimizer: Over the model's parameters.
        device_type: `cpu`, `cuda`, ...
        precision: What the forward pass computes in; weights stay in fp32.
        label_smoothing: Label smoothing of the training loss, 0 to 1.
        grad_clip_val: Largest norm of the gradient; None: no clipping.
        sums: Sums of the training batches' loss and hits.
        average: Weight average to keep up to date.
        compile_mode: torch.compile's mode for forward and loss; None runs them eagerly.
        needs_compile: Whether a step that cannot be compiled is an error, or runs eagerly.

    Attributes:
        grad_norm: Norm before clipping, a scalar on the device, of the last step that measured it.
        micro_batch_size: Maximum images of one forward pass. A larger batch is computed in even
            parts (batch norm sees one part at a time). None: all at once.
        phase: Entered around each phase of a step: a profiler's clock, or `untimed`.
        compiled: The compiled forward pass; None where it is eager.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device_type: str,
        precision: Precision = "32",
        label_smoothing: float = 0.0,
        grad_clip_val: float | None = None,
        sums: ClassificationSums | None = None,
        average: WeightAverage | None = None,
        compile_mode: str | None = None,
        needs_compile: bool = True,
    ) -> None:
        scaler = torch.amp.GradScaler(device_type, enabled=precision == "16-mixed")
        super().__init__(model, optimizer, scaler=scaler, sums=sums, average=average)
        self.grad_norm: Tensor | None = None
        self.micro_batch_size: int | None = None
        self.phase: EnterPhase = untimed
        self._device_type = device_type
        self._precision: Precision = precision
        self._smoothing = label_smoothing
        self._grad_clip_val = grad_clip_val
        self.compiled: CompiledForward | None = None
        if compile_mode is not None:
            self.compiled = CompiledForward(self._logits_and_loss, compile_mode, needs_compile)
        self._forward = self.synchronized(self.compiled or self._logits_and_loss)
        self._group_starts = True

    def _logits_and_loss(
        self, images: Tensor, labels: Tensor, mixed: MixedWith | None
    ) -> tuple[Tensor, Tensor]:
        with autocast(self._device_type, self._precision):
            logits = self.network(images)
        loss = classification_loss(logits, labels, label_smoothing=self._smoothing, mixed=mixed)
        return logits, loss

    def accumulate(
        self,
        images: Tensor,
        labels: Tensor,
        mixed: MixedWith | None = None,
        *,
        group_size: int = 1,
        last_of_group: bool = True,
    ) -> Tensor:
        """Add one batch's gradient to the step's.

        Args:
            images: (N, C, H, W) float.
            labels: (N,) int64.
            mixed: The other labels and the share, if images were mixed.
            group_size: Batches of this step: the gradient is their mean.
            last_of_group: Whether `update` comes next; until then DDP does not exchange gradients.

        Returns:
            The batch's mean loss, a scalar on the device.
        """
        replays_graphs = self.compiled is not None and self.compiled.replays_graphs
        if replays_graphs and self._group_starts:
            # From now on the graphs may overwrite the results of earlier steps in their memory, but
            # not the gradients of this group's earlier batches.
            torch.compiler.cudagraph_mark_step_begin()
        self._group_starts = last_of_group
        parts = self._parts(images, labels, mixed)
        outputs = []
        with self.synchronization(last_of_group):
            for part in parts:
                with self.phase("forward"):
                    logits, loss = self._forward(*part)
                    if len(parts) > 1:
                        loss = loss * (len(logits) / len(labels))
                with self.phase("backward"):
                    self.scaler.scale(loss if group_size == 1 else loss / group_size).backward()
                if replays_graphs:  # the next replay writes into the same memory
                    logits, loss = logits.clone(), loss.clone()
                outputs.append((logits, loss.detach()))
        logits, loss = outputs[0]
        if len(parts) > 1:
            logits = torch.cat([logits.detach() for logits, _ in outputs])
            loss = torch.stack([loss for _, loss in outputs]).sum()
        with self.phase("logging"):
            if self.sums is not None:
                self.sums.update(logits, labels, loss)
        return loss

    def _parts(
        self, images: Tensor, labels: Tensor, mixed: MixedWith | None
    ) -> list[tuple[Tensor, Tensor, MixedWith | None]]:
        """The batch, in as few even parts as possible."""
        if self.micro_batch_size is None or len(labels) <= self.micro_batch_size:
            return [(images, labels, mixed)]
        count = -(-len(labels) // self.micro_batch_size)
        parts = zip(images.tensor_split(count), labels.tensor_split(count), strict=True)
        if mixed is None:
            return [(*part, None) for part in parts]
        others = mixed[0].tensor_split(count)
        return [(*part, (other, mixed[1])) for part, other in zip(parts, others, strict=True)]

    def update(self, lr: float, *, step: int, measure_grad_norm: bool = False) -> Tensor | None:
        """Move the weights by the gathered gradient and forget it.

        Args:
            lr: Learning rate of this step.
            step: Optimizer steps made before, counted from 0.
            measure_grad_norm: Keep the gradient's norm before clipping in `grad_norm`, a scalar on
                the device.

        Returns:
            That norm, if it was measured or needed for clipping.
        """
        norm = None
        set_rates(self.optimizer, lr, step)
        if self._grad_clip_val is not None or measure_grad_norm:
            self.scaler.unscale_(self.optimizer)
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            norm = self.grad_norm = torch.nn.utils.get_total_norm(gradients)
            if self._grad_clip_val is not None:
                torch.nn.utils.clip_grads_with_norm_(self._parameters, self._grad_clip_val, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model, step)
        return norm

    def discard(self) -> None:
        """Drop the gathered gradients, so that the step can be repeated from its start."""
        self.optimizer.zero_grad(set_to_none=True)
        self._group_starts = True
