"""torch's fused optimizers on CPUs, without their copies of channels_last gradients.

The CPU kernels behind `fused=True` first make a contiguous copy of every gradient. Their arithmetic
is elementwise, so it does not need one. For ResNet-18's weights in channels_last, the copies take
more than half of the update (docs/experiments.md). The optimizers here pass the same memory as
views whose dimensions are in memory order.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

__all__ = ["FusedAdamOnCpu", "FusedAdamWOnCpu", "FusedSGDOnCpu"]


def _view_as_contiguous(lists: list[list[Tensor]]) -> None:
    """Where the tensors of all lists are in channels_last, replace them by contiguous views."""
    for place, tensors in enumerate(zip(*lists, strict=True)):
        if tensors[0].dim() == 4 and all(
            tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors
        ):
            for tensors_of_a_kind in lists:
                tensors_of_a_kind[place] = tensors_of_a_kind[place].permute(0, 2, 3, 1)


class FusedSGDOnCpu(torch.optim.SGD):
    """torch.optim.SGD(fused=True) for parameters on a CPU; see the module."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step, like torch.optim.SGD."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            lists = [params, [parameter.grad for parameter in params]]
            if group["momentum"]:
                for parameter in params:
                    state = self.state[parameter]
                    if state.get("momentum_buffer") is None:
                        # Same result as torch's own first step: momentum * 0 + gradient.
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                lists.append([self.state[parameter]["momentum_buffer"] for parameter in params])
            _view_as_contiguous(lists)
            sgd(
                lists[0],
                lists[1],
                lists[2] if group["momentum"] else [],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                fused=True,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )
        return loss


class _ContiguousViews:
    """Mixin for Adam and AdamW."""

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *rest: list[Tensor]
    ) -> Any:
        found = super()._init_group(group, params, grads, *rest)  # type: ignore[misc]
        moments = [
            tensors for tensors in rest[:-1] if tensors
        ]  # the last list contains step counts
        _view_as_contiguous([params, grads, *moments])
        return found


class FusedAdamOnCpu(_ContiguousViews, torch.optim.Adam):
    """torch.optim.Adam(fused=True) for parameters on a CPU; see the module."""


class FusedAdamWOnCpu(_ContiguousViews, torch.optim.AdamW):
    """torch.optim.AdamW(fused=True) for parameters on a CPU; see the module."""
