"""Muon: momentum whose matrix is made orthogonal before it moves a convolution's weight.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024,
kellerjordan.github.io/posts/muon), and cifar10-airbench's airbench94_muon. A weight
(out, in, height, width) is the matrix (out, in x height x width). Its momentum's singular values
are all brought near 1 by Newton-Schulz iterations, so that a step goes equally far in every
direction that the gradients have.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalized"]

# Jordan's polynomial a x + b x^3 + c x^5. It leads small singular values quickly into [0.7, 1.2],
# and does not converge to 1.
A, B, C = 3.4445, -4.7750, 2.0315
# Added to norms: a weight or gradient of zeros stays zero.
EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon for convolutions, and another optimizer for the remaining parameters.

    To its users it is one optimizer: `param_groups` and `state` contain those of both.

    Args:
        groups: Parameter groups of weights with 4 dimensions; `weight_decay` is decoupled from the
            gradient, and does nothing with `normalize`.
        rest: Updates the other parameters; None: there are none. It is not used otherwise.
        lr: Learning rate: the spectral norm of a step.
        momentum: Nesterov's, 0 to 1.
        iterations: Newton-Schulz iterations.
        normalize: Before its update, scale each weight so that its filters have a mean square norm
            of 1; without it, the weights of networks with norms only grow.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        rest: torch.optim.Optimizer | None,
        *,
        lr: float,
        momentum: float = 0.6,
        iterations: int = 3,
        normalize: bool = True,
    ) -> None:
        options = {"momentum": momentum, "iterations": iterations, "normalize": normalize}
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, **options})
        self._own_groups = len(self.param_groups)
        self._rest = rest
        if rest is not None:
            self.param_groups += rest.param_groups
            self.state.update(rest.state)
        self._share_with_rest()

    def _share_with_rest(self) -> None:
        if self._rest is not None:
            self._rest.param_groups = self.param_groups[self._own_groups :]
            self._rest.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's, which `load_state_dict` calls with new groups and a new state."""
        super().__setstate__(state)
        self._share_with_rest()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step with both optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups[: self._own_groups]:
            self._update([weight for weight in group["params"] if weight.grad is not None], group)
        if self._rest is not None:
            self._rest.step()
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        if not weights:
            return
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=group["momentum"])
        if group["normalize"]:
            _normalize(weights)
        elif group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        by_shape: defaultdict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for weight, direction in zip(weights, ahead, strict=True):
            by_shape[weight.shape].append((weight, direction))
        for shape, pairs in by_shape.items():
            # In the order of channels_last, in which flattening copies nothing.
            rows, columns = shape[0], shape[1:].numel()
            matrices = torch.stack(
                [direction.permute(0, 2, 3, 1).reshape(rows, columns) for _, direction in pairs]
            )
            moves = orthogonalized(matrices, iterations=group["iterations"])
            moves *= group["lr"] * max(1, rows / columns) ** 0.5
            for (weight, _), move in zip(pairs, moves, strict=True):
                weight.sub_(move.view(rows, *shape[2:], shape[1]).permute(0, 3, 1, 2))


def _normalize(weights: list[Tensor]) -> None:
    norms = torch._foreach_norm(weights)
    scales = [
        len(weight) ** 0.5 / (norm + EPSILON) for weight, norm in zip(weights, norms, strict=True)
    ]
    torch._foreach_mul_(weights, scales)


def orthogonalized(matrices: Tensor, *, iterations: int) -> Tensor:
    """The matrices with all singular values near 1, and the same singular vectors.

    Args:
        matrices: (n, rows, columns). On a CPU they are computed as they are; elsewhere in bf16,
            for which this polynomial was found to be stable.
        iterations: Of Newton and Schulz; singular values that are far below the largest need more.

    Returns:
        (n, rows, columns) in the dtype of the matrices.
    """
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    wide = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + EPSILON)
    on_cpu = wide.device.type == "cpu"
    result = (through_products if on_cpu else in_half_precision)(wide, iterations)
    return (result.mT if matrices.shape[1] > matrices.shape[2] else result).to(matrices.dtype)


def in_half_precision(wide: Tensor, iterations: int) -> Tensor:
    """The iterations as they are written, in bf16, whose products GPUs compute fastest."""
    result = wide.bfloat16()
    for _ in range(iterations):
        result = _polynomial(result @ result.mT) @ result
    return result


def through_products(wide: Tensor, iterations: int) -> Tensor:
    """The iterations on X X^T alone, and one product with X at the end.

    Every iterate is a polynomial of X X^T times X, so this is the same in exact arithmetic. The
    weight of a 3x3 convolution has nine times as many columns as rows, and X X^T is small. It needs
    the precision of fp32, in which squares of singular values keep enough digits.
    """
    square = wide @ wide.mT
    total: Tensor | None = None
    for iteration in range(iterations):
        polynomial = _polynomial(square)
        total = polynomial if total is None else polynomial @ total
        if iteration < iterations - 1:
            square = polynomial @ square @ polynomial
    assert total is not None
    return total @ wide


def _polynomial(square: Tensor) -> Tensor:
    """A + B X X^T + C (X X^T)^2 of (n, rows, rows) matrices X X^T."""
    result = torch.baddbmm(square, square, square, beta=B, alpha=C)
    result.diagonal(dim1=-2, dim2=-1).add_(A)
    return result
