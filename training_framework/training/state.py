"""What training changes, saved and restored together."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training_framework.optimizers import Lookahead, WeightAverage
from training_framework.training.data_parallel import InnerForward
from training_framework.training.metrics import ClassificationSums

__all__ = ["TrainState"]

_NO_CONTEXT = nullcontext()
_Result = TypeVar("_Result")


class TrainState:
    """The network, its optimizer and what goes with them from step to step.

    Attributes:
        model: The network, in DDP or not.
        optimizer: Over the model's parameters.
        scaler: Scales the loss with fp16; disabled otherwise.
        sums: Sums of the training batches' loss and hits; None: none are kept.
        average: The weight average; None: there is none.
        lookahead: The slow weights behind the optimizer's; None: there are none.
    """

    lookahead: Lookahead | None = None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: torch.amp.GradScaler,
        sums: ClassificationSums | None,
        average: WeightAverage | None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.sums = sums
        self.average = average
        self._parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as live tensors: copy them before the next step."""
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": None if self.sums is None else self.sums.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "lookahead": None if self.lookahead is None else self.lookahead.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, with_sums: bool = True) -> None:
        """Restore what `state_dict` returned. A part that either side lacks stays as it is.

        The optimizer keeps its own options, such as its momentum, and a weight average that the
        state lacks begins at the weights.

        Args:
            state: Of a step with an equal network and optimizer.
            with_sums: Take the sums too. Several processes add theirs up, so one of them takes
                these.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: The state is of another network or
                optimizer, or not a state at all.
        """
        self.network.load_state_dict(state["model"])
        self._load_optimizer(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            averaged = state["average"]
            self.average.load_state_dict(state["model"] if averaged is None else averaged)
        if self.lookahead is not None:
            self.lookahead.load_state_dict(state.get("lookahead"))
        if self.sums is not None and state["sums"] is not None and with_sums:
            self.sums.load_state_dict(state["sums"])

    @torch.no_grad()
    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Take over moments and counts of steps, in the layout of the weights; no options."""
        groups = self.optimizer.param_groups
        kinds = ["betas" in group for group in groups for _ in group["params"]]
        has_moments = dict(enumerate(kinds))
        for place, kept in state["state"].items():
            if (kept.keys() <= {"momentum_buffer"}) == has_moments[place]:
                raise ValueError("it is the state of another optimizer")
        options = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state)
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        for parameter in self._parameters:
            kept = self.optimizer.state.get(parameter, {})
            for key, value in kept.items():
                if key == "step" or value is None:
                    continue
                # Fused kernels read as much of it as the weight is long.
                if value.shape != parameter.shape:
                    raise ValueError(f"{key} of shape {tuple(value.shape)}")
                if value.stride() != parameter.stride():
                    # And they read it in the order of the weight, or refuse another one.
                    kept[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def checkpoint_bytes(self) -> int:
        """Approximate size of a checkpoint: weights, their average, the optimizer's state."""
        weights = sum(parameter.nbytes for parameter in self._parameters)
        copies = 1 + (self.average is not None) + (self.lookahead is not None)
        if isinstance(self.optimizer, torch.optim.SGD):
            copies += any(group["momentum"] for group in self.optimizer.param_groups)
        else:
            copies += 2
        return weights * copies

    @property
    def network(self) -> nn.Module:
        """The model itself, without DDP around it."""
        if isinstance(self.model, DistributedDataParallel):
            inner: InnerForward = self.model.module
            return inner.network
        return self.model

    def synchronized(self, forward: Callable[..., _Result]) -> Callable[..., _Result]:
        """The same forward pass of the network, called through DDP where that is around it.

        From then on DDP calls this one.
        """
        if not isinstance(self.model, DistributedDataParallel):
            return forward
        inner: InnerForward = self.model.module
        inner.compute = forward
        return self.model

    def synchronization(self, on: bool) -> AbstractContextManager[object]:
        """Whether a backward pass inside adds up the gradients of all processes."""
        if on or not isinstance(self.model, DistributedDataParallel):
            return _NO_CONTEXT
        return self.model.no_sync()
