"""An exponential moving average of a model's weights."""

import copy

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """Averaged copy of a model, to evaluate and to save (Polyak and Juditsky, 1992).

    Averages all floating parameters and buffers alike: a batch norm's running statistics belong to
    the averaged weights as little as the last step's do, so they are averaged too. Integer buffers
    are copied. Parameters that the model shares stay shared.

    Weights held in bf16 or fp16 are averaged in that precision, where small updates round to
    nothing; keep the weights in fp32 and compute under autocast.

    Args:
        model: The network, without DDP or torch.compile around it.
        decay: Share of the average that a step keeps, 0 <= decay < 1, once warmed up.

    Attributes:
        model: The averaged network, in evaluation mode, its parameters frozen. Its state_dict has
            the names of the original's.
        decay: As given.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        with torch.no_grad():  # else a scripted module's copy is computed from the original
            self.model = copy.deepcopy(model).eval()
        for parameter in self.model.parameters():  # a scripted module knows no requires_grad_
            parameter.requires_grad_(False)
        # A deep copy takes gradients along: as much memory again.
        self.model.zero_grad(set_to_none=True)
        self._averaged = _tensors(self.model)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards `model`. Does not synchronize.

        The decay is min(decay, (1 + step) / (10 + step)), as in TensorFlow's
        ExponentialMovingAverage, so that the random first weights are soon forgotten.

        Args:
            model: The network after its step; DDP or torch.compile around it do no harm.
            step: The optimizer step just made, counted from 0.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        current = _tensors(model)
        assert len(current) == len(self._averaged), "not the model that is averaged"
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

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged model's state_dict: the live tensors, so save or copy them before a step."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state that `state_dict` gave.

        Raises:
            RuntimeError: Names or shapes differ from the model's.
        """
        self.model.load_state_dict(state)


def _tensors(model: nn.Module) -> list[Tensor]:
    """All parameters, then all buffers, each once, in the model's order."""
    return [*model.parameters(), *model.buffers()]
