"""The even average of a model's weights over the last part of a run."""

from torch import nn

from training_framework.optimizers.averaging import WeightAverage

__all__ = ["EvenAverage"]


class EvenAverage(WeightAverage):
    """The mean of the weights after each step from a step on; before it, the weights themselves.

    Source: Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization,
    arXiv 1803.05407, which averages once an epoch. The average is a function of the step's number
    and of its own weights, so a resumed run goes on as it was.

    Args:
        model: The network, without a wrapper of DDP or torch.compile.
        first_step: The first step, from 0, whose weights count.
    """

    def __init__(self, model: nn.Module, *, first_step: int) -> None:
        super().__init__(model, decay=0.0)
        self._first_step = first_step

    def _decay_at(self, step: int) -> float:
        averaged = max(0, step - self._first_step)
        return averaged / (averaged + 1)
