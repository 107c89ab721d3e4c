"""Making a step again in smaller parts, where memory was short."""

import torch
from torch import Tensor

from training_framework.machine.randomness import random_states, restore_random_states
from training_framework.training.step import TrainStep

__all__ = ["StepStart", "smaller_micro_batch"]


class StepStart:
    """What the forward passes of a step change before its update, kept to make the step again.

    That is the buffers (a batch norm's running statistics), the sums of loss and hits, and the
    states of the random generators (a dropout's draws). Keeping them costs a copy of each in every
    step, so it is for runs that ask for it.

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
        """Take note of the state before a step's first forward pass, without waiting for it."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)
        sums = self._step.sums
        self._sums: dict[str, Tensor] | None = None if sums is None else sums.state_dict()
        self._random = random_states(self._device)

    @torch.no_grad()
    def restore(self) -> None:
        """Back to where `keep` was called, with no gradients, and free what is cached."""
        self._step.discard()
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
        if self._step.sums is not None and self._sums is not None:
            self._step.sums.load_state_dict(self._sums)
        restore_random_states(self._random, self._device)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # pieces of memory that fit the larger parts alone


def smaller_micro_batch(images: int) -> int | None:
    """Half of the images of a forward pass, rounded up; None where there is but one."""
    return None if images == 1 else (images + 1) // 2
