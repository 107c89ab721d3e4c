"""One optimizer step: forward, loss, backward over a group of batches, then one update."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training_framework.machine.precision import Precision, autocast
from training_framework.optimizers import WeightAverage
from training_framework.training.loss import classification_loss
from training_framework.training.metrics import ClassificationSums

__all__ = ["TrainStep"]

_NO_CONTEXT = contextlib.nullcontext()


class TrainStep:
    """Makes optimizer steps and never waits for the device while doing so.

    A step is `accumulate` for each batch of a group, then `update`. With fp16 the order is:
    unscale, clip, step, once a group. (With fp16 and an optimizer that is not fused, torch's
    GradScaler reads one flag from the device in every step.)

    Args:
        model: The network, in DDP or not, on its device and in its memory format.
        optimizer: Over the model's parameters.
        device_type: `cpu`, `cuda`, ...
        precision: What the forward pass computes in; weights stay in fp32.
        label_smoothing: Of the training loss, 0 to 1.
        grad_clip_val: Largest norm of the gradient; None does not clip.
        sums: Where loss and hits of the training batches gather.
        average: Weight average to keep up to date.
        compile_mode: torch.compile's mode for forward and loss; None runs them eagerly.

    Attributes:
        grad_norm: The gradient's norm before clipping, a scalar on the device, of the last step
            that measured it.
        micro_batch_size: Most images of one forward pass; a larger batch is computed in even parts
            whose gradients add up to its own. None: batches are not divided. A batch norm sees one
            part at a time.
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
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.average = average
        self.sums = sums
        self.scaler = torch.amp.GradScaler(device_type, enabled=precision == "16-mixed")
        self.grad_norm: Tensor | None = None
        self.micro_batch_size: int | None = None
        self._device_type = device_type
        self._precision: Precision = precision
        self._label_smoothing = label_smoothing
        self._grad_clip_val = grad_clip_val
        self._parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        self._forward: Callable[..., tuple[Tensor, Tensor]] = self._logits_and_loss
        if compile_mode is not None:
            self._forward = torch.compile(self._logits_and_loss, mode=compile_mode)
        self._group_starts = True
        self._replays_graphs = compile_mode in ("reduce-overhead", "max-autotune")

    def _logits_and_loss(
        self, images: Tensor, labels: Tensor, mixed: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        with autocast(self._device_type, self._precision):
            logits = self.model(images)
        loss = classification_loss(
            logits, labels, label_smoothing=self._label_smoothing, mixed=mixed
        )
        return logits, loss

    def accumulate(
        self,
        images: Tensor,
        labels: Tensor,
        mixed: tuple[Tensor, Tensor] | None = None,
        *,
        group_size: int = 1,
        last_of_group: bool = True,
    ) -> Tensor:
        """Add one batch's gradient to the step's.

        Args:
            images: (N, C, H, W) float.
            labels: (N,) int64.
            mixed: The other labels, (N,) int64, and the own labels' share, a scalar, where images
                were mixed.
            group_size: Batches of this step: the gradient is their mean.
            last_of_group: Whether `update` comes next; until then DDP keeps gradients to itself.

        Returns:
            The batch's mean loss, a scalar on the device.
        """
        if self._replays_graphs and self._group_starts:
            # What earlier steps left in the graphs' memory may be overwritten from here on; the
            # gradients of this group's earlier batches must not.
            torch.compiler.cudagraph_mark_step_begin()
        self._group_starts = last_of_group
        with _NO_CONTEXT if last_of_group else self._without_synchronization():
            if self.micro_batch_size is None or len(labels) <= self.micro_batch_size:
                logits, loss = self._forward(images, labels, mixed)
                self.scaler.scale(loss if group_size == 1 else loss / group_size).backward()
                if self._replays_graphs:  # the next replay writes into the same memory
                    logits, loss = logits.clone(), loss.clone()
            else:
                logits, loss = self._accumulate_in_parts(images, labels, mixed, group_size)
        loss = loss.detach()
        if self.sums is not None:
            self.sums.update(logits, labels, loss)
        return loss

    def _accumulate_in_parts(
        self,
        images: Tensor,
        labels: Tensor,
        mixed: tuple[Tensor, Tensor] | None,
        group_size: int,
    ) -> tuple[Tensor, Tensor]:
        assert self.micro_batch_size is not None
        count = -(-len(labels) // self.micro_batch_size)
        tensors = [images, labels] if mixed is None else [images, labels, mixed[0]]
        all_logits, losses = [], []
        for part in zip(*(tensor.tensor_split(count) for tensor in tensors), strict=True):
            part_mixed = None if mixed is None else (part[2], mixed[1])
            logits, loss = self._forward(part[0], part[1], part_mixed)
            loss = loss * (len(part[1]) / len(labels))
            self.scaler.scale(loss / group_size).backward()
            all_logits.append(logits.detach().clone() if self._replays_graphs else logits.detach())
            losses.append(loss.detach())
        return torch.cat(all_logits), torch.stack(losses).sum()

    def discard(self) -> None:
        """Forget what `accumulate` gathered, so that the step can be made again from its start."""
        self.optimizer.zero_grad(set_to_none=True)
        self._group_starts = True

    def _without_synchronization(self) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return _NO_CONTEXT

    def update(self, lr: float, *, step: int, measure_grad_norm: bool = False) -> Tensor | None:
        """Move the weights by the gathered gradient and forget it.

        Args:
            lr: Learning rate of this step.
            step: Optimizer steps made before, counted from 0.
            measure_grad_norm: Keep the gradient's norm before clipping in `grad_norm`, a scalar on
                the device.

        Returns:
            That norm, where it was measured or needed for clipping.
        """
        norm = None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
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

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of a step: the live tensors, so copy them before the next one."""
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": None if self.sums is None else self.sums.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint becomes: weights, their average, the optimizer's state."""
        weights = sum(parameter.nbytes for parameter in self._parameters)
        copies = 1 + (self.average is not None)
        if isinstance(self.optimizer, torch.optim.SGD):
            copies += any(group["momentum"] for group in self.optimizer.param_groups)
        else:
            copies += 2
        return weights * copies

    @property
    def network(self) -> nn.Module:
        """The model itself, without DDP around it."""
        if isinstance(self.model, DistributedDataParallel):
            inner: nn.Module = self.model.module
            return inner
        return self.model
