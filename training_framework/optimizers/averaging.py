"""An exponential moving average of a model's weights."""

import copy

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """An averaged copy of a model, to evaluate and to save (Polyak and Juditsky, 1992).

    It averages all floating-point parameters and buffers: the last step's running statistics of
    batch norm would not fit the averaged weights, so they are averaged too. Integer buffers are
    copied. Shared parameters stay shared.

    Weights in bf16 or fp16 are averaged in that precision, which loses small updates to rounding.
    So keep the weights in fp32 and compute under autocast.

    Args:
        model: The network, without a wrapper of DDP or torch.compile.
        decay: Share of the average that a step keeps after the warm-up, 0 <= decay < 1.

    Attributes:
        model: The averaged network, in evaluation mode and with frozen parameters. Its state_dict
            has the same names as the original's.
        decay: See above.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        with (
            torch.no_grad()
        ):  # otherwise autograd connects the copy of a scripted module to the original
            self.model = copy.deepcopy(model).eval()
        for parameter in self.model.parameters():  # a scripted module has no requires_grad_
            parameter.requires_grad_(False)
        # A deep copy includes gradients, which would take as much memory again.
        self.model.zero_grad(set_to_none=True)
        self._averaged = _tensors(self.model)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards `model`. Does not synchronize.

        The decay is min(decay, (1 + step) / (10 + step)), as in TensorFlow's
        ExponentialMovingAverage, so that the random initial weights soon lose their influence.

        Args:
            model: The network after its step, with or without a wrapper of DDP or torch.compile.
            step: Number of this optimizer step, from 0.
        """
        weight = 1 - self._decay_at(step)
        current = _tensors(model)
        assert len(current) == len(self._averaged), "this is not the averaged model"
        averaged_floats, current_floats = [], []
        averaged_others, current_others = [], []
        for averaged, now in zip(self._averaged, current, strict=True):
            if averaged.is_floating_point():
                averaged_floats.append(averaged)
                current_floats.append(now)
            else:
                averaged_others.append(averaged)
                current_others.append(now)
        torch._foreach_lerp_(averaged_floats, current_floats, weight)
        if averaged_others:
            torch._foreach_copy_(averaged_others, current_others)

    def _decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step))

    def state_dict(self) -> dict[str, Tensor]:
        """The state_dict of the averaged model. The next update changes its tensors."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a state of `state_dict`.

        Raises:
            RuntimeError: Names or shapes differ from the model's.
        """
        self.model.load_state_dict(state)


def _tensors(model: nn.Module) -> list[Tensor]:
    """All parameters, then all buffers, each once, in the order of the model."""
    return [*model.parameters(), *model.buffers()]
