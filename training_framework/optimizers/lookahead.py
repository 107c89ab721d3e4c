"""Lookahead: slow weights that go part of the way that the trained weights went."""

from typing import Any

import torch

__all__ = ["Lookahead"]


class Lookahead:
    """Every few steps, moves slow weights towards the weights, and the weights to them.

    M. Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", arXiv 1907.08610. The
    optimizer's momentum stays, as in the authors' experiments. Norm statistics are not changed.

    Args:
        optimizer: All of its parameters are the weights; each of its steps counts.
        every: Steps between two of these moves.
        share: Share of the way that the slow weights go, 0 to 1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, every: int, share: float) -> None:
        self._every = every
        self._share = share
        self._steps = 0
        self._weights = [p for group in optimizer.param_groups for p in group["params"]]
        self._slow = [weight.detach().clone() for weight in self._weights]
        optimizer.register_step_post_hook(lambda *_: self._count())

    @torch.no_grad()
    def _count(self) -> None:
        self._steps += 1
        if self._steps % self._every == 0:
            torch._foreach_lerp_(self._slow, self._weights, self._share)
            torch._foreach_copy_(self._weights, self._slow)

    def state_dict(self) -> dict[str, Any]:
        """The slow weights, as live tensors, and the number of steps."""
        return {"slow": self._slow, "steps": self._steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from a state of `state_dict`; None: begin anew at the weights as they are.

        Raises:
            KeyError, TypeError, ValueError: It is of another network, or not a state at all.
        """
        slow = self._weights if state is None else state["slow"]
        if [tensor.shape for tensor in slow] != [tensor.shape for tensor in self._slow]:
            raise ValueError("the slow weights are those of another network")
        torch._foreach_copy_(self._slow, slow)
        self._steps = 0 if state is None else int(state["steps"])
